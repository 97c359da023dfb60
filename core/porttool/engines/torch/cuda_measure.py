"""Timing on a GPU: random weights, recorded work, device time."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from porttool.config import Limits, ModelConfig
from porttool.engines.torch.cuda_weights import allocate
from porttool.nn import canonical_shapes, randomise

_COLD_BYTES = 400 << 20
"""Weights that one measurement passes through: several times the L2 cache."""

_MAX_LAYERS, _MAX_LAUNCHES = 256, 4096
"""Of one measurement: a tiny model's weights are never cold, neither here nor in use."""


def tuning_config(config: ModelConfig) -> ModelConfig:
    """Return the same model with as many layers as keep every matrix out of the L2 cache."""
    layer = 2 * (config.qkv_dim + config.n_head * config.head_dim + config.up_dim
                 + config.d_ff) * config.d_model  # fmt: skip
    smallest = 2 * config.n_head * config.head_dim * config.d_model
    wanted = max(2, -(-_COLD_BYTES // layer), min(128, -(-_COLD_BYTES // smallest) // 3))
    return config.model_copy(update={"n_layer": min(wanted, _MAX_LAYERS)})


def cold_passes(nbytes: int, launches: int) -> int:
    """Return how often to go through so many bytes, in so many launches, at a measurement."""
    return max(2, min(-(-_COLD_BYTES // nbytes), _MAX_LAUNCHES // launches))


def limits_of(n_slots: int, max_len: int) -> Limits:
    """Return limits of so many rows of so many tokens."""
    return Limits(max_batch_size=n_slots, max_input_len=max_len - 1, max_output_len=1)


def random_weights(config: ModelConfig, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Draw every canonical tensor."""
    kinds = {name: (shape, dtype) for name, shape in canonical_shapes(config).items()}
    out = allocate(kinds, device)
    for name, value in out.items():
        randomise(value, name, config)
    return out


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """Compile, warm up and record `work`; return its replay."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def milliseconds(run: Callable[[], None], repeats: int = 7) -> float:
    """Return the median device time of `run`."""
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(statistics.median(times[2:]))
