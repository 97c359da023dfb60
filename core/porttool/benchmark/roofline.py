"""The roofline of a run: the device's speed, measured beside it, and the least time of the work."""

from __future__ import annotations

from functools import cache

import torch

from porttool.benchmark.results import Ceiling, Cell
from porttool.config import ModelConfig
from porttool.errors import EngineError
from porttool.profiling.costs import Cost, Peak, StepSize, total_cost
from porttool.profiling.peak import best_seconds, measure_peak

READ_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
READS = {"cuda": 8, "cpu": 1}
"""Reads that one time covers: on a GPU a single one is hardly longer than its launch."""


def measure_ceiling(device: str, dtype: str) -> Ceiling:
    """Measure a matrix product, a copy and a read on a device, now."""
    try:
        peak, read = measure_peak(device, dtype), measure_read(device)
    except torch.OutOfMemoryError as error:
        raise EngineError(
            "beside the sides, the GPU has no 4 GB left to measure its own speed with; "
            "measure fewer of them at a time, or a smaller batch"
        ) from error
    return Ceiling(flops=peak.flops, copy_bandwidth=peak.bandwidth, read_bandwidth=read)


def measure_read(device: str) -> float:
    """Return bytes a second of a sum over numbers that fit no cache: the best of a few."""
    numbers = torch.zeros(READ_BYTES[device] // 4, device=device)

    def read() -> None:
        for _ in range(READS[device]):
            numbers.sum()

    return numbers.nbytes * READS[device] / best_seconds(read, cuda=device == "cuda")


def peak_of(ceiling: Ceiling) -> Peak:
    """Return the ceiling as profiles take it: the faster of copying and reading counts."""
    return Peak(ceiling.flops, max(ceiling.copy_bandwidth, ceiling.read_bandwidth))


@cache
def prefill_cost(config: ModelConfig, cell: Cell, dtype: str) -> Cost:
    """Return what the prompts need."""
    return total_cost(config, StepSize.prefill(cell.batch_size, cell.input_len, dtype))


@cache
def decode_cost(config: ModelConfig, cell: Cell, dtype: str) -> Cost:
    """Return what one token of every row needs, in the middle of the output."""
    size = StepSize.decode(cell.batch_size, cell.input_len, cell.output_len, dtype)
    return total_cost(config, size)
