"""What the device can do, measured: a large copy, and a large matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from porttool.profiling.costs import Peak

ROUNDS = 5


def measure_peak(device: str, dtype: str) -> Peak:
    """Return the best of a few copies and products on a device, in a type.

    The product's operands are random: on ones a GPU draws less power and runs faster.
    """
    cuda = device == "cuda"
    kind = getattr(torch, dtype)
    n, copied = (8192, 1 << 30) if cuda else (1024, 1 << 27)
    a, b = (torch.randn(n, n, dtype=kind, device=device) for _ in range(2))
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = best_seconds(lambda: a @ b, cuda=cuda)
    copy = best_seconds(lambda: target.copy_(source), cuda=cuda)
    return Peak(flops=2 * n**3 / product, bandwidth=2 * copied / copy)


def best_seconds(call: Callable[[], object], *, cuda: bool) -> float:
    """Return the shortest of a few runs."""
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)
