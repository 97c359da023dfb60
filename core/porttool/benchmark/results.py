"""Closed models of a benchmark: what was asked, every round as it was measured, and medians."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from porttool.config import Closed, Limits, ModelConfig
from porttool.errors import UsageError


class Cell(Closed):
    """One point of the grid: rows at a time, tokens of each prompt, tokens made for each."""

    batch_size: PositiveInt
    input_len: PositiveInt
    output_len: int = Field(ge=2)

    def __str__(self) -> str:
        """Return it in words."""
        return f"batch {self.batch_size}, input {self.input_len}, output {self.output_len}"


class Method(Closed):
    """How it is measured: rounds before those that count, rounds that do, seed of the prompts."""

    warmup: NonNegativeInt = 2
    repeats: PositiveInt = 5
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)


class Ceiling(Closed):
    """What a device was measured to do in one round: operations, and bytes copied and read, a s."""

    flops: float
    copy_bandwidth: float
    read_bandwidth: float


class Round(Closed):
    """One run of a cell. Shares are of the round's own ceiling."""

    first_token_ms: float
    token_ms: float
    total_ms: float
    prefill_roofline: float
    decode_roofline: float
    ceiling: Ceiling


class Measurement(Closed):
    """One side in one cell: medians over the rounds; the percentiles are over all their tokens.

    `first_token_ms` runs from the prompts' token ids to the first new token on the host.
    `peak_memory_bytes` is what the side held at most, None where the system does not say.
    `times_as_fast` is by milliseconds a token, round by round beside `HF eager`.
    """

    side: str
    cell: Cell
    first_token_ms: float
    token_ms: float
    token_ms_p90: float
    token_ms_p99: float
    tokens_per_second: float
    peak_memory_bytes: int | None
    prefill_roofline: float
    decode_roofline: float
    times_as_fast: float | None
    rounds: tuple[Round, ...]


class SideRecord(Closed):
    """Who was measured. `tokens_a_sample`: tokens that the host gets at a time, whose mean counts.

    `memory_counter` says what peak memory was read from.
    """

    name: str
    description: str
    device: str
    dtype: str
    random_weights: bool
    bytes_on_disk: int
    load_seconds: float
    tokens_a_sample: PositiveInt
    memory_counter: str


class Failure(Closed):
    """A side that did not run, in one cell or (None) in none, and why."""

    side: str
    cell: Cell | None
    reason: str


class Machine(Closed):
    """Where and with what it was measured."""

    porttool: str
    torch: str
    python: str
    processor: str
    gpu: str | None
    threads: int


class BenchmarkResult(Closed):
    """A whole benchmark. Operations and bytes behind the shares are `profiling.costs`'."""

    format: Literal["porttool-benchmark"] = "porttool-benchmark"
    format_version: Literal[1] = 1
    machine: Machine
    method: Method
    model: ModelConfig
    sides: tuple[SideRecord, ...]
    measurements: tuple[Measurement, ...]
    failures: tuple[Failure, ...]

    @property
    def random_weights(self) -> bool:
        """True if a side ran random weights: its tokens mean nothing, its times do."""
        return any(side.random_weights for side in self.sides)


def grid(
    batch_sizes: Sequence[int], input_lens: Sequence[int], output_lens: Sequence[int]
) -> tuple[Cell, ...]:
    """Return every combination, batches within lengths."""
    lengths = product(input_lens, output_lens, batch_sizes)
    return tuple(Cell(batch_size=b, input_len=i, output_len=o) for i, o, b in lengths)


def require_fit(cells: Sequence[Cell], limits: Limits, engine: str) -> None:
    """Refuse a grid that reaches beyond an engine's limits, and say how to build one for it."""
    for flag, most in (
        ("batch_size", limits.max_batch_size),
        ("input_len", limits.max_input_len),
        ("output_len", limits.max_output_len),
    ):
        wanted = max(getattr(cell, flag) for cell in cells)
        if wanted > most:
            name = flag.replace("_", "-")
            raise UsageError(
                f"--{name} {wanted} asked for, {engine} holds {most}; "
                f"build it with --max-{name} {wanted}"
            )
