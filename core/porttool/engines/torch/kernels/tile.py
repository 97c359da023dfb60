"""The tensor-core form of the skinny linear: up to 16 (or 32, 64, ...) rows in one product.

The product is batched over GROUPS slices of K so that every warp has a slice of its own although
a tile has few columns; the slices' sums are added in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from porttool.engines.torch.kernels.activation import activate
from porttool.engines.torch.kernels.chain import announce, await_predecessor, prefetch_share


@triton.jit
def _statistics(x, m, M, eps, K: tl.constexpr, BLOCK_M: tl.constexpr, NORM: tl.constexpr,
                SPAN: tl.constexpr):  # fmt: skip
    """Mean and reciprocal deviation of rows m [BLOCK_M] of x [M, K]."""
    sum_x = tl.zeros((BLOCK_M,), tl.float32)
    sum_xx = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, K, SPAN):
        k = first + tl.arange(0, SPAN)
        inside = (m < M)[:, None] & (k < K)[None, :]
        value = tl.load(x + m[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
        sum_x += tl.sum(value, 1)
        sum_xx += tl.sum(value * value, 1)
    mean = sum_x / K
    if NORM == "rmsnorm":
        mean = tl.zeros((BLOCK_M,), tl.float32)
    return mean, tl.rsqrt(tl.maximum(sum_xx / K - mean * mean, 0.0) + eps)


@triton.jit
def _weights(w, n, live, k, K: tl.constexpr):
    """A weight tile [GROUPS, BLOCK_K, BLOCK_N] of w [N, K]."""
    inside = live[None, None, :] & (k < K)[:, :, None]
    return tl.load(w + n.to(tl.int64)[None, None, :] * K + k[:, :, None], mask=inside, other=0.0)


@triton.jit
def tile_linear(
    x, w, bias, gamma, beta, x_out, out, best, where, next_weight, next_bytes, M, eps,
    N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BETA: tl.constexpr, RESIDUAL: tl.constexpr, STORE: tl.constexpr,
    BEST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    EARLY: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """out[m, n] = act(norm(x[m]) . w[n] + bias[n]) for M <= BLOCK_M * programs rows.

    As `stream_linear`; grid (column tiles, row tiles). The weights are asked into the L2 cache
    before the wait, and pass through shared memory in STAGES steps after it.
    """
    if EARLY:
        announce(PDL)
    if PREFETCH:
        prefetch_share(next_weight, next_bytes)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = n < N
    slices = tl.arange(0, GROUPS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    await_predecessor(PDL)
    if not EARLY:
        announce(PDL)
    if NORM != "none":
        mean, scale = _statistics(x, m, M, eps, K, BLOCK_M, NORM, 256)
    acc = tl.zeros((GROUPS, BLOCK_M, BLOCK_N), tl.float32)
    twin = tl.zeros((GROUPS, BLOCK_M, BLOCK_N), tl.float32)
    for first in tl.range(0, K, GROUPS * BLOCK_K, num_stages=STAGES):
        k = first + slices  # [GROUPS, BLOCK_K]
        inside = (m < M)[None, :, None] & (k < K)[:, None, :]
        value = tl.load(x + m[None, :, None] * K + k[:, None, :], mask=inside, other=0.0)
        if NORM != "none":
            value = (value.to(tl.float32) - mean[None, :, None]) * scale[None, :, None]
            value *= tl.load(gamma + k, mask=k < K, other=0.0)[:, None, :]
            if HAS_BETA:
                value += tl.load(beta + k, mask=k < K, other=0.0)[:, None, :]
        value = value.to(w.dtype.element_ty)
        acc = tl.dot(value, _weights(w, n, live, k, K), acc, input_precision=PRECISION)
        if GATED:
            tile = _weights(w + N * K, n, live, k, K)
            twin = tl.dot(value, tile, twin, input_precision=PRECISION)
    y = tl.sum(acc, 0)
    inside = (m < M)[:, None] & live[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    if HAS_BIAS:
        y += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)[None, :]
    y = activate(y, ACT)
    if GATED:
        z = tl.sum(twin, 0)
        if HAS_BIAS:
            z += tl.load(bias + N + n, mask=live, other=0.0).to(tl.float32)[None, :]
        y *= z
    if RESIDUAL:
        y += tl.load(x_out + at, mask=inside, other=0.0)
        tl.store(x_out + at, y, mask=inside)
    if STORE:
        tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)
    if BEST:
        y = tl.where(live[None, :], y, float("-inf"))
        high = tl.max(y, 1)
        name = tl.min(tl.where(y == high[:, None], n[None, :], 2147483647), 1)
        part = m * tl.num_programs(0) + tl.program_id(0)
        tl.store(best + part, high, mask=m < M)
        tl.store(where + part, name, mask=m < M)
