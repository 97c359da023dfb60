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
def _first_tiles(
    rows, inner, live, k, COUNT: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """The first COUNT tiles of weight rows, to be held in registers."""
    held = ()
    for i in tl.static_range(COUNT):
        held = held + (_weights(rows, inner, i * BLOCK_K, live, k, K, EVICT),)
    return held


@triton.jit
def _tile(
    held, rows, inner, live, k, i: tl.constexpr, HELD: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Tile i of weight rows: held, or read now."""
    if i < HELD:
        weight = held[i]
    else:
        weight = _weights(rows, inner, i * BLOCK_K, live, k, K, EVICT)
    return weight


@triton.jit
def _scales(gamma, k, COUNT: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """COUNT tiles of the norm's scale [K]."""
    scales = ()
    for i in tl.static_range(COUNT):
        at = i * BLOCK_K + k
        scales = scales + (tl.load(gamma + at, mask=at < K, other=0.0),)
    return scales


@triton.jit
def _vector(base, n, live, PRESENT: tl.constexpr):
    """Elements n of a vector in float32, or zeros where there is none."""
    value = tl.zeros(n.shape, tl.float32)
    if PRESENT:
        value = tl.load(base + n, mask=live, other=0.0).to(tl.float32)
    return value


@triton.jit
def _input(
    x, part, share, m, i, k, w, K: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile i of row m in float32; with SPLITS > 0 joined from split attention's parts."""
    if SPLITS > 0:
        head = i * (BLOCK_K // DIM) + tl.arange(0, BLOCK_K // DIM)
        value = merged(part, share, m, head, tl.arange(0, DIM), HEADS, DIM, SPLITS)
        value = tl.where((head < HEADS)[:, None], value, 0.0).to(w.dtype.element_ty)
        value = tl.reshape(value, (BLOCK_K,)).to(tl.float32)
    else:
        at = i * BLOCK_K + k
        value = tl.load(x + m * K + at, mask=at < K, other=0.0).to(tl.float32)
    return value


@triton.jit
def _normalised(acc, sum_x, sum_xx, sums, eps, K: tl.constexpr, NORM: tl.constexpr):
    """The product of the normalised row: r (x (gW)^T - mean sum_k gW), and mean and r."""
    spread = tl.broadcast_to(sum_x[None, :], acc.shape)
    square = tl.broadcast_to(sum_xx[None, :], acc.shape)
    y, mean, square = tl.reduce((acc, spread, square), 1, _add3)
    mean = mean / K
    if NORM == "rmsnorm":
        mean = mean * 0.0
    scale = tl.rsqrt(tl.maximum(square / K - mean * mean, 0.0) + eps)
    return scale * (y - mean * sums), mean, scale


@triton.jit
def _leave(
    x_out, out, best, where, m, n, live, old, y, N: tl.constexpr, RESIDUAL: tl.constexpr,
    STORE: tl.constexpr, BEST: tl.constexpr,
):  # fmt: skip
    """Leave columns n of row m: added to the residual, as they are, or the first largest alone."""
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
    "layernorm" or "rmsnorm"; SPLITS > 0 joins x from split attention's parts. Before the wait it
    loads the first HELD weight tiles of its BLOCK_N columns, the norm's scale, bias and constants.
    """
    announce(PDL and EARLY)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < N
    k = tl.arange(0, BLOCK_K)
    rows = w + tl.program_id(0).to(tl.int64) * (BLOCK_N * K)
    inner = tl.arange(0, BLOCK_N)[:, None] * K + k[None, :]
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    HALF: tl.constexpr = N * K
    NORMED: tl.constexpr = NORM != "none"
    held = _first_tiles(rows, inner, live, k, HELD, K, BLOCK_K, EVICT)
    held_twin = _first_tiles(rows + HALF, inner, live, k, HELD if GATED else 0, K, BLOCK_K, EVICT)
    scales = _scales(gamma, k, TILES if NORMED else 0, K, BLOCK_K)
    shift = _vector(bias, n, live, HAS_BIAS)
    shift_twin = _vector(bias + N, n, live, HAS_BIAS and GATED)
    sums = _vector(column_sum, n, live, NORMED)
    sums_twin = _vector(column_sum + N, n, live, NORMED and GATED)
    await_predecessor(PDL)
    announce(PDL and not EARLY)
    for m in range(M):
        old = _vector(x_out + m * N, n, live, RESIDUAL)
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        acc_twin = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        sum_x = tl.zeros((BLOCK_K,), tl.float32)
        sum_xx = tl.zeros((BLOCK_K,), tl.float32)
        for i in tl.static_range(TILES):
            weight = _tile(held, rows, inner, live, k, i, HELD, K, BLOCK_K, EVICT)
            value = _input(x, part, share, m, i, k, w, K, HEADS, DIM, SPLITS, BLOCK_K)
            if NORMED:
                sum_x += value
                sum_xx += value * value
                value *= scales[i]
            acc += weight.to(tl.float32) * value[None, :]
            if GATED:
                twin = _tile(held_twin, rows + HALF, inner, live, k, i, HELD, K, BLOCK_K, EVICT)
                acc_twin += twin.to(tl.float32) * value[None, :]
        if NORMED:
            y, mean, scale = _normalised(acc, sum_x, sum_xx, sums, eps, K, NORM)
        else:
            y = tl.sum(acc, 1)
        y = activate(y + shift, ACT)
        if GATED:
            z = tl.sum(acc_twin, 1)
            if NORMED:
                z = scale * (z - mean * sums_twin)
            y *= z + shift_twin
        _leave(x_out, out, best, where, m, n, live, old, y, N, RESIDUAL, STORE, BEST)
