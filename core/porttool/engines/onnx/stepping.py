"""Steps for graphs whose batch is one block: what does not fit the block is fed row by row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from porttool.nn import Step

Run = Callable[..., Tensor]


def fed(run: Run, step: Step, capacity: int, *, all_positions: bool) -> Tensor:
    """Run a step; rows whose padding would leave the cache go one at a time, without padding."""
    width = step.tokens.shape[1]
    if int(step.starts.max()) + width <= capacity:
        return run(step, all_positions=all_positions)
    parts = [run(alone(step, row), all_positions=all_positions) for row in range(len(step.slots))]
    if not all_positions:
        return torch.cat(parts)
    out = parts[0].new_zeros(len(parts), width, parts[0].shape[-1])
    for row, part in enumerate(parts):
        out[row, : part.shape[1]] = part[0]
    return out


def alone(step: Step, row: int) -> Step:
    """Return one row of a step, cut to its real tokens."""
    only = slice(row, row + 1)
    n = int(step.lengths[row])
    return Step(step.slots[only], step.tokens[only, :n], step.starts[only], step.lengths[only])


def fed_in_pieces(run: Run, step: Step, capacity: int, *, width: int) -> Tensor:
    """Return logits of all positions [n, step's width, vocab_size], a few tokens a run."""
    found: list[tuple[Tensor, Tensor]] = []
    for first in range(0, step.tokens.shape[1], width):
        rows = (step.lengths > first).nonzero()[:, 0]
        tokens = step.tokens[rows, first : first + width]
        lengths = (step.lengths[rows] - first).clamp(max=tokens.shape[1])
        piece = Step(step.slots[rows], tokens, step.starts[rows] + first, lengths)
        found.append((rows, fed(run, piece, capacity, all_positions=True)))
    logits = found[0][1]
    out = logits.new_zeros(len(step.slots), step.tokens.shape[1], logits.shape[-1])
    for i, (rows, part) in enumerate(found):
        out[rows.to(out.device), i * width : i * width + part.shape[1]] = part
    return out


def filled(step: Step, n_slots: int, capacity: int) -> Step:
    """Return a step of every slot: those that take no part write behind the cache, to nowhere.

    Only for libraries that leave out what is written beyond the capacity, as TensorRT does.
    """
    idle = torch.tensor(sorted(set(range(n_slots)) - set(step.slots.tolist())), dtype=torch.int64)
    n = len(idle)
    return Step(
        torch.cat((step.slots, idle)),
        torch.cat((step.tokens, step.tokens.new_zeros(n, step.tokens.shape[1]))),
        torch.cat((step.starts, torch.full((n,), capacity))),
        torch.cat((step.lengths, torch.ones(n, dtype=torch.int64))),
    )
