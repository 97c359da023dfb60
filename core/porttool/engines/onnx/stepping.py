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
