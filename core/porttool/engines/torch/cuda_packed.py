"""A step's tokens without their padding, and logits back in the shape that was asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from porttool.nn import Step


class Packed:
    """A step's real tokens, one after the other without padding; all of it on the CPU.

    `flat` int32 [3, n_tokens] holds their tokens, positions and slots. Rows that were cut from a
    larger step begin at its `first_row`, and are given their columns of its `flat`.
    """

    def __init__(self, step: Step, first_row: int = 0, flat: Tensor | None = None) -> None:
        self.step, self.first_row = step, first_row
        self.lengths: list[int] = step.lengths.tolist()
        self.n_rows, self.n_tokens = len(self.lengths), sum(self.lengths)
        self.width = max(self.lengths)
        self.flat = self._flatten() if flat is None else flat

    def _flatten(self) -> Tensor:
        """What `flat` is."""
        s = self.step
        if s.tokens.shape[1] == 1 == min(self.lengths):  # a step that is decoded waits for this
            return torch.stack((s.tokens[:, 0], s.starts, s.slots)).int()
        column = torch.arange(s.tokens.shape[1])
        real = column < s.lengths[:, None]
        slots = s.slots[:, None].expand_as(s.tokens)
        position = s.starts[:, None] + column
        return torch.stack([t[real] for t in (s.tokens, position, slots)]).int()

    def block(self, n: int) -> Tensor:
        """As `flat`, filled up to n columns with padding."""
        if n == self.n_tokens:
            return self.flat
        out = torch.zeros(3, n, dtype=torch.int32)
        out[2] = -1
        out[:, : self.n_tokens] = self.flat
        return out

    def spans(self) -> list[tuple[int, int]]:
        """First and past-last packed token of each row."""
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return [(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]

    def padded(self, n: int, columns: int) -> Tensor:
        """Everything that a prompt's kernels read, with padding: int32 [3 * (n + columns)].

        `block(n)`, then three lines of `columns`: the rows' slots, their starts, and the first
        packed token of each, which ends with n_tokens. What follows is of rows without tokens.
        """
        bounds = torch.zeros(3, columns, dtype=torch.int32)
        bounds[0, : self.n_rows] = self.step.slots
        bounds[1, : self.n_rows] = self.step.starts
        bounds[2, 1:] = self.n_tokens
        bounds[2, 1 : self.n_rows + 1] = torch.tensor([end for _, end in self.spans()])
        return torch.cat((self.block(n).flatten(), bounds.flatten()))

    def groups(self, limit: int) -> list[Packed]:
        """Cut into runs of whole rows of at most `limit` tokens, one row at least."""
        out, begin, taken, size = [], 0, 0, 0
        for i, length in enumerate([*self.lengths, limit + 1]):
            if size and size + length > limit:
                s, part = self.step, slice(begin, i)
                cut = Step(s.slots[part], s.tokens[part], s.starts[part], s.lengths[part])
                out.append(Packed(cut, begin, self.flat[:, taken : taken + size]))
                begin, taken, size = i, taken + size, 0
            size += length
        return out


def arrange(logits: Tensor, packed: Packed, *, all_positions: bool) -> Tensor:
    """Give packed logits [tokens, vocab] the contract's shape."""
    if packed.width == 1:
        return logits[:, None] if all_positions else logits
    if not all_positions:
        return logits[[b - 1 for _, b in packed.spans()]]
    out = logits.new_zeros(packed.n_rows, packed.width, logits.shape[1])
    for i, (a, b) in enumerate(packed.spans()):
        out[i, : b - a] = logits[a:b]
    return out
