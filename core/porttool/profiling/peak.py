"""What the device can do, measured: a large copy, and a large matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from porttool.profiling.costs import Peak

ROUNDS = 5
N_SMALL = 256
"""Rows of a product that shows which of two types is the faster one."""


def measure_peak(device: str, dtype: str) -> Peak:
    """Return the best of a few copies and products on a device, in a type.

    The product's operands are random: on ones a GPU draws less power and runs faster. On a CPU the
    product is in float32 where that is faster: so engines compute half precision that it has none
    of.
    """
    cuda = device == "cuda"
    kind = getattr(torch, dtype)
    if not cuda:
        kind = min(kind, torch.float32, key=lambda k: product_seconds(N_SMALL, device, k))
    n, copied = (8192, 1 << 30) if cuda else (1024, 1 << 27)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = product_seconds(n, device, kind)
    copy = best_seconds(lambda: target.copy_(source), cuda=cuda)
    return Peak(flops=2 * n**3 / product, bandwidth=2 * copied / copy)


def product_seconds(n: int, device: str, kind: torch.dtype) -> float:
    """Return the seconds of a product of two [n, n] matrices."""
    a, b = (torch.randn(n, n, dtype=kind, device=device) for _ in range(2))
    return best_seconds(lambda: a @ b, cuda=device == "cuda")


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
