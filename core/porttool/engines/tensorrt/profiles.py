"""Optimisation profiles: the sizes that TensorRT chooses kernels for, and holds a step to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from porttool.config import Limits
from porttool.errors import UsageError

ALL_POSITIONS_WIDTH = 16
"""Tokens of a row that get logits in one run: more would reserve memory for a whole prompt's."""

Sizes = tuple[int, int, int]
"""Smallest, most usual and largest value of a dimension."""


@dataclass(frozen=True)
class Profile:
    """Ranges of the graph's three free dimensions."""

    name: str
    batch: Sizes
    width: Sizes
    rows: Sizes

    def shapes(self, dims: Sequence[int | str]) -> list[tuple[int, ...]]:
        """Return the smallest, usual and largest shape of an input of these dimensions."""
        ranges = asdict(self)
        return [tuple(d if isinstance(d, int) else ranges[d][i] for d in dims) for i in range(3)]


def make_profiles(
    limits: Limits,
    *,
    static_batch: bool,
    opt_batch: int | None = None,
    opt_input_len: int | None = None,
) -> tuple[Profile, Profile]:
    """Return the profiles of prefill (and of a few tokens a row) and of plain decoding.

    Raises UsageError for an optimum beyond the limits.
    """
    most, longest = limits.max_batch_size, limits.max_input_len
    usual = opt_batch or most
    usual_len = opt_input_len or longest
    if usual > most or usual_len > longest:
        raise UsageError(
            f"opt_batch_size {usual} or opt_input_len {usual_len} is beyond the engine's limits: "
            f"batch {most}, input {longest}"
        )
    batch = (most, most, most) if static_batch else (1, usual, most)
    rows = (batch[0], batch[1], most * min(ALL_POSITIONS_WIDTH, longest))
    return (
        Profile("prefill", batch, (1, usual_len, longest), rows),
        Profile("decode", batch, (1, 1, 1), batch),
    )


def free_inputs(
    inputs: Mapping[str, Sequence[int | str]], *, static_batch: bool
) -> dict[str, list[int | str]]:
    """Return the inputs that profiles must speak of: those with a dimension that may vary."""
    fixed = {"batch"} if static_batch else set()
    return {
        name: list(dims)
        for name, dims in inputs.items()
        if any(isinstance(d, str) and d not in fixed for d in dims)
    }
