"""Products of up to 32 rows whose weights are on their way before the predecessor ends.

Written in Gluon, Triton's lower level: there a kernel says itself when a copy to shared memory
starts, and so may start it before it waits for its predecessor. Triton's own pipelined loop cannot.
Gluon has no interpreter: these kernels run on GPUs alone, in 16-bit types, and where tiles were
measured (`cuda_tune`); `wide_linear` does the same everywhere.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from porttool.engines.torch.kernels.activation import activate
from porttool.engines.torch.kernels.chain import announce, await_predecessor


@gluon.jit
def _copy(ring, slot, base, row, rows, k, live, K: gl.constexpr):
    """Start copying rows [B] by k [PIECES, 1, LENGTH] of a matrix [rows, K] to a ring's slot."""
    at = base + row.to(gl.int64)[None, :, None] * K + k
    inside = ((row < rows) & live)[None, :, None] & (k < K)
    async_copy.async_copy_global_to_shared(ring.index(slot), at, inside)


@gluon.jit
def _copy_weights(ws, gs, slot, w, n, k, live, N: gl.constexpr, K: gl.constexpr,
                  GATED: gl.constexpr):  # fmt: skip
    """As `_copy`, for a tile of weights and the tile that gates it."""
    _copy(ws, slot, w, n, N, k, live, K)
    if GATED:
        _copy(gs, slot, w + N * K, n, N, k, live, K)


@gluon.jit
def _multiply(xs, ws, slot, acc):
    """acc[p] += x[p] @ w[p].T, a warp each p: x [PIECES, BLOCK_M, LENGTH], w [PIECES, BLOCK_N, …].

    The warps share the inner dimension, so that each element leaves shared memory once.
    """
    layout: gl.constexpr = acc.type.layout
    value = xs.index(slot).load(gl.DotOperandLayout(0, layout, 2))
    weight = ws.index(slot).permute((0, 2, 1)).load(gl.DotOperandLayout(1, layout, 2))
    return mma_v2(value, weight, acc)


@gluon.jit
def joined(acc):
    """Add the sums [PIECES, rows, columns] of all warps, in order."""
    QUADS: gl.constexpr = acc.shape[2] // 4
    LANES: gl.constexpr = QUADS if QUADS < 32 else 32
    PHASES: gl.constexpr = QUADS if QUADS < 8 else 8
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(4, 8 // PHASES, PHASES, [2, 1, 0])
    across: gl.constexpr = gl.BlockedLayout(
        [acc.shape[0], 1, 4], [1, 32 // LANES, LANES], [1, gl.num_warps(), 1], [2, 1, 0]
    )
    sums = gl.allocate_shared_memory(gl.float32, acc.shape, swizzled, acc)
    return gl.sum(sums.load(across), 0)


@gluon.jit
def _finish(
    total, twin, bias, out, M, N: gl.constexpr, GATED: gl.constexpr, ACT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Bias, activation and gate; store out [M, N]."""
    BLOCK_M: gl.constexpr = total.shape[0]
    BLOCK_N: gl.constexpr = total.shape[1]
    row = gl.program_id(2) * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, total.type.layout))
    n = gl.program_id(0) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, total.type.layout))
    if HAS_BIAS:
        total += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[None, :]
    total = activate(total, ACT)
    if GATED:
        if HAS_BIAS:
            twin += gl.load(bias + N + n, mask=n < N, other=0.0).to(gl.float32)[None, :]
        total *= twin
    at = row.to(gl.int64)[:, None] * N + n[None, :]
    inside = (row < M)[:, None] & (n < N)[None, :]
    gl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def _places(begin, layout: gl.constexpr, PIECES: gl.constexpr, LENGTH: gl.constexpr,
            BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):  # fmt: skip
    """This program's columns [BLOCK_N], rows [BLOCK_M] and inner elements from `begin` on.

    The last are [PIECES, 1, LENGTH]; all are laid out for copies of [PIECES, rows, LENGTH].
    """
    rows: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
    n = gl.program_id(0) * BLOCK_N + gl.arange(0, BLOCK_N, rows)
    m = gl.program_id(2) * BLOCK_M + gl.arange(0, BLOCK_M, rows)
    piece = gl.arange(0, PIECES, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    inner = gl.arange(0, LENGTH, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    return n, m, begin + piece[:, None, None] * LENGTH + inner[None, None, :]


@gluon.jit
def staged_linear(
    x, w, bias, out, part, M,
    N: gl.constexpr, K: gl.constexpr, GATED: gl.constexpr, ACT: gl.constexpr,
    HAS_BIAS: gl.constexpr, SPLIT: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out[m, n] = act(x[m] . w[n] + bias[n]), or sums in part, as `wide_linear` has them.

    Moves each weight once, x [M, K] once a column tile (from the L2 cache: with 32 rows and 32
    columns as many bytes as weights, which is what limits it). STAGES - 1 tiles of weights are on
    their way before the wait. GPT-2 XL, 32 rows, in a chain of its like: 20 MB in 6.7 to 7.6 us,
    2.7 to 3.0 TB/s; `wide_linear` 8.2 to 8.7 us. Grid (column tiles, SPLIT, row tiles).
    """
    announce(PDL)
    PIECES: gl.constexpr = gl.num_warps()
    LENGTH: gl.constexpr = BLOCK_K // PIECES
    LANES: gl.constexpr = LENGTH // 8
    SIDE: gl.constexpr = 32 // LANES if 32 // LANES < PIECES else PIECES
    copied: gl.constexpr = gl.BlockedLayout(
        [1, 1, 8], [SIDE, 32 // LANES // SIDE, LANES], [1, PIECES, 1], [2, 0, 1]
    )
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [PIECES, 1, 1], [1, 16, 8])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 64 // LENGTH, LANES, [2, 1, 0])
    kind: gl.constexpr = w.dtype.element_ty
    xs = gl.allocate_shared_memory(kind, [STAGES, PIECES, BLOCK_M, LENGTH], swizzled)
    ws = gl.allocate_shared_memory(kind, [STAGES, PIECES, BLOCK_N, LENGTH], swizzled)
    gs = ws
    if GATED:
        gs = gl.allocate_shared_memory(kind, [STAGES, PIECES, BLOCK_N, LENGTH], swizzled)
    TILES: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SHARE: gl.constexpr = (TILES + SPLIT - 1) // SPLIT
    low = gl.program_id(1) * SHARE
    tiles = gl.minimum(SHARE, TILES - low)
    n, m, k = _places(low * BLOCK_K, copied, PIECES, LENGTH, BLOCK_M, BLOCK_N)
    for s in gl.static_range(STAGES - 1):
        _copy_weights(ws, gs, s, w, n, k + s * BLOCK_K, s < tiles, N, K, GATED)
        async_copy.commit_group()
    await_predecessor(PDL)
    for s in gl.static_range(STAGES - 1):
        _copy(xs, s, x, m, M, k + s * BLOCK_K, s < tiles, K)
        async_copy.commit_group()
    acc = gl.zeros([PIECES, BLOCK_M, BLOCK_N], gl.float32, mma)
    twin = gl.zeros([PIECES, BLOCK_M, BLOCK_N], gl.float32, mma)
    for i in range(tiles):
        async_copy.wait_group(STAGES - 2)
        ahead = i + STAGES - 1
        later = k + ahead * BLOCK_K
        _copy_weights(ws, gs, ahead % STAGES, w, n, later, ahead < tiles, N, K, GATED)
        _copy(xs, ahead % STAGES, x, m, M, later, ahead < tiles, K)
        async_copy.commit_group()
        acc = _multiply(xs, ws, i % STAGES, acc)
        if GATED:
            twin = _multiply(xs, gs, i % STAGES, twin)
    async_copy.wait_group(0)
    if SPLIT == 1:
        _finish(joined(acc), joined(twin) if GATED else 0, bias, out, M, N, GATED, ACT, HAS_BIAS)
    else:
        first = part + gl.program_id(1).to(gl.int64) * M * N
        _finish(joined(acc), 0, bias, first, M, N, False, "none", False)
