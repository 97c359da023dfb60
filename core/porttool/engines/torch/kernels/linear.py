# ruff: noqa: RUF005, SIM108 (Triton compiles neither unpacking nor a ternary over tensors)
"""The matrix kernel of single rows: weights streamed once, multiplied on the CUDA cores.

The norm before a linear needs no pass of its own: with g the norm's weight and
b its bias, norm(x) W^T = r (x (gW)^T - mean sum_k gW) + bW^T, r the reciprocal deviation. The last
two sums are constants of the model (`column_sum`, part of `bias`), and mean and r are
accumulated beside the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from porttool.engines.torch.kernels.activation import activate
from porttool.engines.torch.kernels.attention import merged
from porttool.engines.torch.kernels.chain import announce, await_predecessor


@triton.jit
def _add3(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def _weights(rows, inner, first, live, k, K: tl.constexpr, EVICT: tl.constexpr):
    """Tile [BLOCK_N, BLOCK_K] of weight rows, which are read once a step."""
    inside = live[:, None] & (first + k < K)[None, :]
    return tl.load(rows + first + inner, mask=inside, other=0.0, eviction_policy=EVICT)


@triton.jit
def _vector(base, n, live, PRESENT: tl.constexpr):
    """Elements n of a vector in float32, or zeros where there is none."""
    value = tl.zeros(n.shape, tl.float32)
    if PRESENT:
        value = tl.load(base + n, mask=live, other=0.0).to(tl.float32)
    return value


@triton.jit
def stream_linear(
    x, w, bias, column_sum, gamma, x_out, out, best, where, part, share, M, eps,
    N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, STORE: tl.constexpr, BEST: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, HELD: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """out[m, n] = act(norm(x[m]) . w[n] + bias[n]); RESIDUAL adds it to x_out instead.

    x [M, K]; w [N, K], or [2N, K] with rows gate | linear when GATED; NORM is "none",
    "layernorm" or "rmsnorm"; SPLITS > 0 joins x from split attention's parts. One program
    computes BLOCK_N columns for every row. Before the wait it loads what does not depend on its
    predecessor: the first HELD weight tiles, the norm's scale, bias and constants. Weights leave
    the L2 cache first, so that the small tensors and the code stay there between steps.
    """
    if EARLY:
        announce(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < N
    k = tl.arange(0, BLOCK_K)
    rows = w + tl.program_id(0).to(tl.int64) * (BLOCK_N * K)
    inner = tl.arange(0, BLOCK_N)[:, None] * K + k[None, :]
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    HALF: tl.constexpr = N * K
    NORMED: tl.constexpr = NORM != "none"
    held = ()
    held_twin = ()
    for i in tl.static_range(HELD):
        held = held + (_weights(rows, inner, i * BLOCK_K, live, k, K, EVICT),)
        if GATED:
            held_twin = held_twin + (_weights(rows + HALF, inner, i * BLOCK_K, live, k, K, EVICT),)
    scales = ()
    if NORMED:
        for i in tl.static_range(TILES):
            at = i * BLOCK_K + k
            scales = scales + (tl.load(gamma + at, mask=at < K, other=0.0),)
    shift = _vector(bias, n, live, HAS_BIAS)
    shift_twin = _vector(bias + N, n, live, HAS_BIAS and GATED)
    sums = _vector(column_sum, n, live, NORMED)
    sums_twin = _vector(column_sum + N, n, live, NORMED and GATED)
    await_predecessor(PDL)
    if not EARLY:
        announce(PDL)
    for m in range(M):
        old = _vector(x_out + m * N, n, live, RESIDUAL)
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        acc_twin = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        sum_x = tl.zeros((BLOCK_K,), tl.float32)
        sum_xx = tl.zeros((BLOCK_K,), tl.float32)
        for i in tl.static_range(TILES):
            at = i * BLOCK_K + k
            if i < HELD:
                weight = held[i]
            else:
                weight = _weights(rows, inner, i * BLOCK_K, live, k, K, EVICT)
            if SPLITS > 0:
                head = i * (BLOCK_K // DIM) + tl.arange(0, BLOCK_K // DIM)
                value = merged(part, share, m, head, tl.arange(0, DIM), HEADS, DIM, SPLITS)
                value = tl.where((head < HEADS)[:, None], value, 0.0).to(w.dtype.element_ty)
                value = tl.reshape(value, (BLOCK_K,)).to(tl.float32)
            else:
                value = tl.load(x + m * K + at, mask=at < K, other=0.0).to(tl.float32)
            if NORMED:
                sum_x += value
                sum_xx += value * value
                value *= scales[i]
            acc += weight.to(tl.float32) * value[None, :]
            if GATED:
                if i < HELD:
                    twin = held_twin[i]
                else:
                    twin = _weights(rows + HALF, inner, i * BLOCK_K, live, k, K, EVICT)
                acc_twin += twin.to(tl.float32) * value[None, :]
        if NORMED:
            spread = tl.broadcast_to(sum_x[None, :], (BLOCK_N, BLOCK_K))
            square = tl.broadcast_to(sum_xx[None, :], (BLOCK_N, BLOCK_K))
            y, mean, square = tl.reduce((acc, spread, square), 1, _add3)
            mean = mean / K
            if NORM == "rmsnorm":
                mean = mean * 0.0
            scale = tl.rsqrt(tl.maximum(square / K - mean * mean, 0.0) + eps)
            y = scale * (y - mean * sums)
        else:
            y = tl.sum(acc, 1)
        y = activate(y + shift, ACT)
        if GATED:
            z = tl.sum(acc_twin, 1)
            if NORMED:
                z = scale * (z - mean * sums_twin)
            y *= z + shift_twin
        if RESIDUAL:
            tl.store(x_out + m * N + n, old + y, mask=live)
        if STORE:
            tl.store(out + m * N + n, y.to(out.dtype.element_ty), mask=live)
        if BEST:
            y = tl.where(live, y, float("-inf"))
            high = tl.max(y, 0)
            name = tl.min(tl.where(y == high, n, 2147483647), 0)
            tl.store(best + m * tl.num_programs(0) + tl.program_id(0), high)
            tl.store(where + m * tl.num_programs(0) + tl.program_id(0), name)
