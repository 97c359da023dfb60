"""Matrix products of 2 to a few hundred rows on the tensor cores, weights streamed once."""

from __future__ import annotations

import triton
import triton.language as tl

from porttool.engines.torch.kernels.activation import activate
from porttool.engines.torch.kernels.chain import announce, await_predecessor


@triton.jit
def _tile(base, row, k, rows, K: tl.constexpr, WHOLE: tl.constexpr, EVICT: tl.constexpr):
    """Rows [B] by k [BLOCK_K] of a row-major matrix [rows, K]."""
    at = base + row.to(tl.int64)[:, None] * K + k[None, :]
    if WHOLE:
        return tl.load(at, mask=(row < rows)[:, None], other=0.0, eviction_policy=EVICT)
    inside = (row < rows)[:, None] & (k < K)[None, :]
    return tl.load(at, mask=inside, other=0.0, eviction_policy=EVICT)


@triton.jit
def _fetch(w, row, k, rows, K: tl.constexpr, LINES: tl.constexpr):
    """Ask for LINES cache lines (128 bytes) of each row from k on; they wait in the L2 cache."""
    line: tl.constexpr = 128 // (w.dtype.element_ty.primitive_bitwidth // 8)
    at = tl.minimum(k + tl.arange(0, LINES) * line, K - 1)
    where = tl.minimum(row, rows - 1).to(tl.int64)[:, None] * K + at[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [(w + where).to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def wide_linear(
    x, w, bias, out, part, best, where, M,
    N: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr, STORE: tl.constexpr, BEST: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """out[m, n] = act(x[m] . w[n] + bias[n]) for x [M, K]; w [N, K], or [2N, K] gate | linear.

    With SPLIT > 1 the inner dimension is cut, and part [SPLIT, M, N] gets float32 sums that the
    next kernel adds in order. BEST leaves each tile's maximum and its column for greedy decoding.
    The order of a row's sums depends on the tile alone. Grid (column tiles, SPLIT, row tiles).
    """
    announce(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SHARE: tl.constexpr = (TILES + SPLIT - 1) // SPLIT
    WHOLE: tl.constexpr = K % BLOCK_K == 0
    low = tl.program_id(1) * SHARE
    high = tl.minimum(low + SHARE, TILES)
    if AHEAD > 0 and PDL:
        _fetch(w, n, low * BLOCK_K, N, K, AHEAD)
        if GATED:
            _fetch(w + N * K, n, low * BLOCK_K, N, K, AHEAD)
    await_predecessor(PDL)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    twin = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.range(low, high, num_stages=STAGES):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        value = _tile(x, m, k, M, K, WHOLE, "")
        weight = _tile(w, n, k, N, K, WHOLE, EVICT)
        acc = tl.dot(value, tl.trans(weight), acc, input_precision=PRECISION)
        if GATED:
            linear = _tile(w + N * K, n, k, N, K, WHOLE, EVICT)
            twin = tl.dot(value, tl.trans(linear), twin, input_precision=PRECISION)
    inside = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    if SPLIT > 1:
        tl.store(part + tl.program_id(1).to(tl.int64) * M * N + at, acc, mask=inside)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        acc = activate(acc, ACT)
        if GATED:
            if HAS_BIAS:
                twin += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            acc *= twin
        if STORE:
            tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
        if BEST:
            acc = tl.where((n < N)[None, :], acc, float("-inf"))
            high_m = tl.max(acc, 1)
            name = tl.min(tl.where(acc == high_m[:, None], n[None, :], 2147483647), 1)
            slot = m * tl.num_programs(0) + tl.program_id(0)
            tl.store(best + slot, high_m, mask=m < M)
            tl.store(where + slot, name, mask=m < M)
