"""Teacher-forced logits: what an engine gives in prefill and in decode, and how far it is off."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from porttool.config import Dtype
from porttool.evaluator import Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.nn import Step
    from porttool.runner import Runner

YARDSTICK_FACTOR = 4.0
"""How many times Hugging Face's own squared error in a half-precision type an engine may have."""

WORST_FACTOR = 3.0
"""The same for the largest error."""


@dataclass(frozen=True)
class LogitBound:
    """Bounds of the normalised mean squared error, and of the largest error over the scale."""

    nmse: float
    worst: float


BOUNDS: dict[Dtype, LogitBound] = {
    "float64": LogitBound(nmse=1e-20, worst=1e-9),
    "float32": LogitBound(nmse=1e-10, worst=2e-4),
    "float16": LogitBound(nmse=2e-5, worst=0.1),
    "bfloat16": LogitBound(nmse=2e-3, worst=1.0),
}
"""Calibrated as docs/validation.md describes."""


@dataclass(frozen=True)
class LogitError:
    """How far logits lie from the reference's; infinitely where one is NaN or infinite.

    scale     standard deviation of the reference's logits over the vocabulary, mean of positions
    max_abs   largest |difference|, found first at `row` and `position`
    nmse      mean squared difference over scale squared
    cosine    lowest cosine of any position's logits, centred
    top1      share of positions with the same most likely token
    ours_nonfinite, theirs_nonfinite   positions with a logit that is NaN or infinite, on each side
    """

    n_positions: int
    scale: float
    max_abs: float
    nmse: float
    cosine: float
    top1: float
    row: int
    position: int
    ours_nonfinite: int = 0
    theirs_nonfinite: int = 0

    @property
    def worst(self) -> float:
        """The largest difference over the scale."""
        return self.max_abs / self.scale if self.finite else math.inf

    @property
    def finite(self) -> bool:
        """True where every logit of both sides is a number."""
        return not (self.ours_nonfinite or self.theirs_nonfinite)

    @property
    def nonfinite(self) -> str:
        """Say on which side logits are NaN or infinite, at how many positions, where first."""
        sides = {"the engine's": self.ours_nonfinite, "Hugging Face's": self.theirs_nonfinite}
        counts = (f"{whose} at {n or 'none'} of {self.n_positions}" for whose, n in sides.items())
        return (
            f"logits that are NaN or infinite: {', '.join(counts)} positions; first in prompt "
            f"{self.row} at position {self.position}"
        )


def measure(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> LogitError:
    """Compare rows of logits, each [positions, vocab_size]."""
    import torch

    worst, row, position = -1.0, 0, 0
    squares = scales = same = 0.0
    cosine, n, wild_a, wild_b = 1.0, 0, 0, 0
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        wide_a, wide_b = a.double(), b.double()
        difference = (wide_a - wide_b).abs().nan_to_num(nan=float("inf"))
        per_position = difference.amax(-1)
        if float(per_position.max()) > worst:
            worst, row = float(per_position.max()), index
            position = int(per_position.argmax())
        wild_a += count_nonfinite(a)
        wild_b += count_nonfinite(b)
        squares += float(difference.square().mean(-1).sum())
        scales += float(wide_b.std(-1).sum())
        same += float((a.argmax(-1) == b.argmax(-1)).sum())
        n += len(b)
        flat_a, flat_b = (t - t.mean(-1, keepdim=True) for t in (wide_a, wide_b))
        cosines = torch.cosine_similarity(flat_a, flat_b, dim=-1).nan_to_num(nan=-1.0)
        cosine = min(cosine, float(cosines.min()))
    scale = max(scales / n, 1e-30)
    nmse = math.inf if wild_a or wild_b else squares / n / scale**2
    return LogitError(n, scale, worst, nmse, cosine, same / n, row, position, wild_a, wild_b)


def count_nonfinite(logits: Tensor) -> int:
    """Count the positions of [positions, vocab_size] with a logit that is NaN or infinite."""
    return int((~logits.isfinite()).any(-1).sum())


def bound_for(dtype: Dtype, yardstick: LogitError | None) -> LogitBound:
    """Return a type's bound, or what a yardstick makes of it if its logits are numbers."""
    if yardstick is None or not yardstick.finite:
        return BOUNDS[dtype]
    return LogitBound(YARDSTICK_FACTOR * yardstick.nmse, WORST_FACTOR * yardstick.worst)


def first_wrong(ours: Tensor, theirs: Tensor, bound: float) -> int | None:
    """Return the first position whose logits are off by more than the bound over their scale."""
    for at in range(len(ours)):
        error: LogitError = measure([ours[at : at + 1]], [theirs[at : at + 1]])
        if error.worst > bound:
            return at
    return None


def judge_logits(
    name: str, found: LogitError, dtype: Dtype, yardstick: LogitError | None = None
) -> Verdict:
    """Hold an error to the bounds of a type, or to a yardstick: the reference's own error in it.

    Logits that are NaN or infinite fail; a yardstick that has such is none, and said to be.
    """
    bound = bound_for(dtype, yardstick)
    own = ""
    if yardstick is not None and yardstick.finite:
        own = f", Hugging Face in {dtype} {yardstick.nmse:.1e}"
    elif yardstick is not None:
        own = f", no yardstick: Hugging Face in {dtype} has logits that are NaN or infinite"
    if not found.finite:
        return Verdict(
            name=name, passed=False, found="NaN or infinity",
            bound=f"≤ {bound.nmse:.1e}, {bound.worst:.1e}", detail=found.nonfinite + own,
        )  # fmt: skip
    return Verdict(
        name=name,
        passed=found.nmse <= bound.nmse and found.worst <= bound.worst,
        found=f"NMSE {found.nmse:.1e}, max {found.worst:.1e}",
        bound=f"≤ {bound.nmse:.1e}, {bound.worst:.1e}",
        detail=f"{found.n_positions} positions, max |Δ| {found.max_abs:.2g} at scale "
        f"{found.scale:.2g}, top-1 {found.top1:.1%}{own}",
    )


Sequences = Sequence[Sequence[int]]


def prefill_logits(runner: Runner, prompts: Sequences) -> list[Tensor]:
    """Feed whole prompts; return each row's logits [len(prompt), vocab_size]."""
    results: list[Tensor] = []
    for batch in batches(prompts, runner.n_slots):
        results += feed(runner, batch, [0] * len(batch), [len(p) for p in batch])
    return results


def decode_logits(
    runner: Runner, sequences: Sequences, n_prompt: Sequence[int], width: int
) -> list[Tensor]:
    """Feed prompts, then what follows in steps of up to `width` tokens a row.

    Returns the logits [len(sequence) - n_prompt, vocab_size] of what follows. With a width above
    one, rows get different numbers of tokens in a step.
    """
    import torch

    results: list[Tensor] = []
    pairs = list(zip(sequences, n_prompt, strict=True))
    for first in range(0, len(pairs), runner.n_slots):
        rows = [s for s, _ in pairs[first : first + runner.n_slots]]
        starts = [n for _, n in pairs[first : first + runner.n_slots]]
        feed(runner, rows, [0] * len(rows), starts)
        parts: list[list[Tensor]] = [[] for _ in rows]
        for amounts in ragged(rows, starts, width):
            live = [i for i, n in enumerate(amounts) if n]
            logits = feed(
                runner, [rows[i] for i in live], [starts[i] for i in live],
                [amounts[i] for i in live], rows=live,
            )  # fmt: skip
            for i, part in zip(live, logits, strict=True):
                parts[i].append(part)
                starts[i] += amounts[i]
        results += [torch.cat(p) for p in parts]
    return results


def ragged(rows: Sequences, starts: list[int], width: int) -> Iterator[list[int]]:
    """Yield how many tokens each row is fed next, until all are fed; `starts` grow meanwhile."""
    turn = 0
    while any(start < len(row) for row, start in zip(rows, starts, strict=True)):
        yield [
            min(len(row) - start, 1 + (turn + i) % width)
            for i, (row, start) in enumerate(zip(rows, starts, strict=True))
        ]
        turn += 1


def feed(
    runner: Runner,
    sequences: Sequences,
    starts: Sequence[int],
    amounts: Sequence[int],
    *,
    rows: Sequence[int] | None = None,
) -> list[Tensor]:
    """Feed the tokens [start, start + amount) of every sequence; return their logits.

    Row i of a batch lives in slot n_slots - 1 - i, so that rows and slots are told apart.
    """
    logits = runner.step(make_step(runner, sequences, starts, amounts, rows), all_positions=True)
    return [logits[i, :n].cpu() for i, n in enumerate(amounts)]


def make_step(
    runner: Runner,
    sequences: Sequences,
    starts: Sequence[int],
    amounts: Sequence[int],
    rows: Sequence[int] | None,
) -> Step:
    """Build the step that feeds parts of sequences."""
    import torch

    from porttool.nn import Step

    tokens = torch.zeros(len(sequences), max(amounts), dtype=torch.int64)
    for i, (sequence, start, amount) in enumerate(zip(sequences, starts, amounts, strict=True)):
        tokens[i, :amount] = torch.tensor(list(sequence[start : start + amount]))
    slots = [runner.n_slots - 1 - i for i in (rows or range(len(sequences)))]
    return Step(torch.tensor(slots), tokens, torch.tensor(list(starts)),
                torch.tensor(list(amounts)))  # fmt: skip


def batches(items: Sequences, size: int) -> Iterator[list[Sequence[int]]]:
    """Yield items in lists of at most `size`."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
