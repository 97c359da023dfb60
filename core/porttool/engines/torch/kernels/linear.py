"""Skinny matrix kernels: a weight matrix streamed once for at most 16 rows of activations.

Two forms of the same operation. `stream_linear` multiplies on the CUDA cores, one row after the
other, and has the shortest latency at one row; `tile_linear` multiplies 16 rows at once on the
tensor cores. In both the order of every sum depends on the shape and the tile alone, never on
how many rows there are, so that a row's result is the same bits in any batch.

The norm before a linear needs no pass of its own in `stream_linear`: with g the norm's weight and
b its bias, norm(x) W^T = r (x (gW)^T - mean sum_k gW) + bW^T, r the reciprocal deviation. The last
two sums are constants of the model (`column_sum`, part of `bias`), and mean and r are
accumulated beside the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from porttool.engines.torch.kernels.activation import activate
from porttool.engines.torch.kernels.chain import announce, await_predecessor, prefetch


@triton.jit
def merged(part, top, total, row, column, live, HEADS: tl.constexpr, DIM: tl.constexpr,
           SPLITS: tl.constexpr):  # fmt: skip
    """Join the parts that split attention left: the softmax average at `column` of one row.

    part [rows, HEADS, SPLITS, DIM] are unnormalised sums, top and total [rows, HEADS, SPLITS]
    their running maxima and weights. Elementwise in a fixed order: any kernel gets the same bits.
    """
    first = (row * HEADS + column // DIM) * SPLITS
    highest = tl.full(column.shape, float("-inf"), tl.float32)
    for s in tl.static_range(SPLITS):
        highest = tl.maximum(highest, tl.load(top + first + s, mask=live, other=0.0))
    weight = tl.zeros(column.shape, tl.float32)
    value = tl.zeros(column.shape, tl.float32)
    for s in tl.static_range(SPLITS):
        share = tl.exp(tl.load(top + first + s, mask=live, other=0.0) - highest)
        weight += share * tl.load(total + first + s, mask=live, other=1.0)
        value += share * tl.load(part + (first + s) * DIM + column % DIM, mask=live, other=0.0)
    return value / weight


@triton.jit
def _finish(y, x_out, out, best, where, bias, row, n, live, N: tl.constexpr,
            ACT: tl.constexpr, HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
            STORE: tl.constexpr, BEST: tl.constexpr):  # fmt: skip
    """Bias, activation, residual, and what the head's reduction needs, for y [BLOCK_N]."""
    if HAS_BIAS:
        y += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)
    y = activate(y, ACT)
    if RESIDUAL:
        y += tl.load(x_out + row * N + n, mask=live, other=0.0)
        tl.store(x_out + row * N + n, y, mask=live)
    if STORE:
        tl.store(out + row * N + n, y.to(out.dtype.element_ty), mask=live)
    if BEST:
        y = tl.where(live, y, float("-inf"))
        high = tl.max(y, 0)
        name = tl.min(tl.where(y == high, n, 2147483647), 0)
        tl.store(best + row * tl.num_programs(0) + tl.program_id(0), high)
        tl.store(where + row * tl.num_programs(0) + tl.program_id(0), name)


@triton.jit
def stream_linear(
    x, w, bias, column_sum, gamma, x_out, out, best, where, part, top, total,
    next_weight, next_bytes, M, eps,
    N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, STORE: tl.constexpr, BEST: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
    PREFETCH: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """out[m, n] = act(norm(x[m]) . w[n] + bias[n]); RESIDUAL adds it to x_out instead.

    x [M, K]; w [N, K], or [2N, K] with rows gate | linear when GATED; NORM is "none",
    "layernorm" or "rmsnorm"; SPLITS > 0 reads x from split attention's parts. One program
    computes BLOCK_N columns for every row; its first weight tile is in flight before the wait.
    """
    if EARLY:
        announce(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < N
    k = tl.arange(0, BLOCK_K)
    rows = w + tl.program_id(0).to(tl.int64) * (BLOCK_N * K)
    inner = tl.arange(0, BLOCK_N)[:, None] * K + k[None, :]
    HALF: tl.constexpr = N * K
    inside = live[:, None] & (k < K)[None, :]
    tile = tl.load(rows + inner, mask=inside, other=0.0)
    if GATED:
        twin = tl.load(rows + HALF + inner, mask=inside, other=0.0)
    if PREFETCH:
        prefetch(next_weight, next_bytes, THREADS)
    await_predecessor(PDL)
    if not EARLY:
        announce(PDL)
    for m in range(M):
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if GATED:
            acc_twin = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if NORM != "none":
            sum_x = tl.zeros((BLOCK_K,), tl.float32)
            sum_xx = tl.zeros((BLOCK_K,), tl.float32)
        for first in range(0, K, BLOCK_K):
            weight = tile
            if GATED:
                weight_twin = twin
            if K > BLOCK_K:  # the next tile, or the first one again for the next row
                ahead = first + BLOCK_K
                wanted = (ahead < K) | (m + 1 < M)
                ahead = tl.where(ahead < K, ahead, 0)
                inside = live[:, None] & ((ahead + k < K) & wanted)[None, :]
                tile = tl.load(rows + ahead + inner, mask=inside, other=0.0)
                if GATED:
                    twin = tl.load(rows + HALF + ahead + inner, mask=inside, other=0.0)
            at = first + k
            if SPLITS > 0:
                value = merged(part, top, total, m, at, at < K, HEADS, DIM, SPLITS)
                value = tl.where(at < K, value, 0.0).to(w.dtype.element_ty).to(tl.float32)
            else:
                value = tl.load(x + m * K + at, mask=at < K, other=0.0).to(tl.float32)
            if NORM != "none":
                sum_x += value
                sum_xx += value * value
                value *= tl.load(gamma + at, mask=at < K, other=0.0)
            acc += weight.to(tl.float32) * value[None, :]
            if GATED:
                acc_twin += weight_twin.to(tl.float32) * value[None, :]
        y = tl.sum(acc, 1)
        if NORM != "none":
            mean = tl.sum(sum_x, 0) / K
            square = tl.sum(sum_xx, 0) / K
            if NORM == "rmsnorm":
                mean = 0.0
            scale = tl.rsqrt(tl.maximum(square - mean * mean, 0.0) + eps)
            y = scale * (y - mean * tl.load(column_sum + n, mask=live, other=0.0))
        if GATED:
            z = tl.sum(acc_twin, 1)
            if NORM != "none":
                shift = tl.load(column_sum + N + n, mask=live, other=0.0)
                z = scale * (z - mean * shift)
            if HAS_BIAS:
                y += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)
                z += tl.load(bias + N + n, mask=live, other=0.0).to(tl.float32)
            y = activate(y, ACT) * z
            tl.store(out + m * N + n, y.to(out.dtype.element_ty), mask=live)
        else:
            _finish(y, x_out, out, best, where, bias, m, n, live, N, ACT, HAS_BIAS, RESIDUAL,
                    STORE, BEST)  # fmt: skip
