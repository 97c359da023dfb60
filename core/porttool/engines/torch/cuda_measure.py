"""Timing on a GPU: random weights, recorded work, device time."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from porttool.config import Limits, ModelConfig
from porttool.nn import meta_decoder


def limits_of(n_slots: int, max_len: int) -> Limits:
    """Return limits of so many rows of so many tokens."""
    return Limits(max_batch_size=n_slots, max_input_len=max_len - 1, max_output_len=1)


def random_weights(config: ModelConfig, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Draw every canonical tensor from a normal distribution scaled for finite activations."""
    out = {}
    for name, meta in meta_decoder(config).state_dict().items():
        scale = 0.02 if meta.ndim == 1 else min(0.02, meta.shape[-1] ** -0.5)
        value = torch.empty(meta.shape, dtype=dtype, device=device).normal_(0, scale)
        plain = "norm" in name and name.endswith("weight") and config.norm != "layernorm1p"
        out[name] = value + 1 if plain else value
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
