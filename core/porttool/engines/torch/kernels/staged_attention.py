"""Decode attention whose first keys and values are on their way before the predecessor ends.

In Gluon for the same reason as `staged_linear`, and with the same limits.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from porttool.engines.torch.kernels.attention import (
    add_pairs,
    fold_alone,
    owned,
    placed,
    rotated,
)
from porttool.engines.torch.kernels.chain import announce, await_predecessor
from porttool.engines.torch.kernels.staged import joined


@gluon.jit
def _copy(ks, vs, slot, keys, values, position, end, d, DIM: gl.constexpr):
    """Start copying keys and values at positions [BLOCK_T, 1] to their rings; zeros from `end`."""
    inside = (position < end) & (d < DIM)
    at = position * DIM + d
    async_copy.async_copy_global_to_shared(ks.index(slot), keys + at, inside)
    async_copy.async_copy_global_to_shared(vs.index(slot), values + at, inside)
    async_copy.commit_group()


@gluon.jit
def staged_attention(
    qkv, bias, keys, values, slots, positions, cosine, sine, part, weight, out, scale, capacity,
    stride, HEADS: gl.constexpr, KV: gl.constexpr, DIM: gl.constexpr, ROTARY: gl.constexpr,
    PARTS: gl.constexpr, HAS_BIAS: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_T: gl.constexpr,
    SPLITS: gl.constexpr, STAGES: gl.constexpr, APPEND: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """As `decode_attention`, for a head of its own keys; STAGES - 1 tiles are always on their way.

    Moves each key and value once: GPT-2 XL's 111 MB at 32 rows in 30 us, 3.7 TB/s, where a tile
    held in registers takes 33; at 128 rows 4.4 TB/s, the memory's own speed.
    """
    announce(PDL)
    LANES: gl.constexpr = BLOCK_D // 8
    tile: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
    kv, row = gl.program_id(1), gl.program_id(2)
    slot, position, low, high, stored, start = placed(slots, positions, capacity, KV, DIM, SPLITS,
                                                      APPEND)  # fmt: skip
    keys += start
    values += start
    d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, tile))
    t = gl.arange(0, BLOCK_T, gl.SliceLayout(1, tile))
    kind: gl.constexpr = keys.dtype.element_ty
    ks = gl.allocate_shared_memory(kind, [STAGES, BLOCK_T, BLOCK_D], plain)
    vs = gl.allocate_shared_memory(kind, [STAGES, BLOCK_T, BLOCK_D], plain)
    place = (low + t)[:, None]
    for s in gl.static_range(STAGES - 1):
        _copy(ks, vs, s, keys, values, place + s * BLOCK_T, stored, d[None, :], DIM)
    await_predecessor(PDL)
    qkv += row.to(gl.int64) * ((HEADS + 2 * KV) * DIM)
    query = rotated(qkv, bias, kv, d, d < DIM, position, cosine, sine, stride, DIM, ROTARY, PARTS,
                    HAS_BIAS).to(kind).to(gl.float32)  # fmt: skip
    if APPEND:
        new_key, new_value = owned(qkv, bias, keys, values, d, slot, position, cosine, sine, stride,
                                  HEADS, KV, DIM, ROTARY, PARTS, HAS_BIAS, SPLITS)  # fmt: skip
    top = gl.full([BLOCK_T], float("-inf"), gl.float32, gl.SliceLayout(1, tile))
    total = gl.zeros([BLOCK_T], gl.float32, gl.SliceLayout(1, tile))
    acc = gl.zeros([BLOCK_T, BLOCK_D], gl.float32, tile)
    for i in range((high - low + BLOCK_T - 1) // BLOCK_T):
        async_copy.wait_group(STAGES - 2)
        ahead = i + STAGES - 1
        _copy(ks, vs, ahead % STAGES, keys, values, place + ahead * BLOCK_T, stored, d[None, :],
              DIM)  # fmt: skip
        key, value = ks.index(i % STAGES).load(tile), vs.index(i % STAGES).load(tile)
        at = low + i * BLOCK_T + t
        if APPEND:
            own = (at == position)[:, None]
            key = gl.where(own, new_key[None, :], key)
            value = gl.where(own, new_value[None, :], value)
        top, total, acc = fold_alone(key, value, query, at, high, scale, top, total, acc)
    async_copy.wait_group(0)
    _store_alone(top, total, acc, part, weight, out, row.to(gl.int64) * HEADS + kv, d, DIM, SPLITS)


@gluon.jit
def _store_alone(
    top, total, acc, part, weight, out, head, d, DIM: gl.constexpr, SPLITS: gl.constexpr
):
    """Join what the threads hold of a head, and store the average or its part."""
    highest = gl.max(top, 0)
    share = gl.exp(top - gl.where(highest == float("-inf"), 0.0, highest))
    layout: gl.constexpr = acc.type.layout
    shares = gl.zeros(acc.shape, gl.float32, layout) + (total * share)[:, None]
    sums, weight_sum = gl.reduce((acc * share[:, None], shares), 0, add_pairs)
    average = gl.where(weight_sum > 0, sums / weight_sum, 0.0)
    if SPLITS == 1:
        gl.store(out + head * DIM + d, average.to(out.dtype.element_ty), mask=d < DIM)
    else:
        at = head * SPLITS + gl.program_id(0)
        gl.store(part + at * DIM + d, average, mask=d < DIM)
        gl.store(weight + at + 0 * d, highest + gl.log(weight_sum), mask=d == 0)


@gluon.jit
def _begin_group(query, key, value, mine, scale, mma: gl.constexpr, PIECES: gl.constexpr):
    """The running softmax after the token's own position, in the one warp and part that is `mine`.

    query [BLOCK_G, BLOCK_D], key and value [BLOCK_D] of one layout; returns the query as the
    tensor cores want it, and top, total [PIECES, BLOCK_G], acc [PIECES, BLOCK_G, BLOCK_D].
    """
    BLOCK_G: gl.constexpr = query.shape[0]
    state: gl.constexpr = gl.SliceLayout(2, mma)
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    score = gl.sum(query.to(gl.float32) * key.to(gl.float32)[None, :], 1) * scale
    score = gl.convert_layout(score, gl.SliceLayout(0, state))[None, :]
    mine = mine & (gl.arange(0, PIECES, gl.SliceLayout(1, state)) == 0)[:, None]
    top = gl.where(mine, score, gl.full([PIECES, BLOCK_G], float("-inf"), gl.float32, state))
    total = gl.where(mine, 1.0, gl.zeros([PIECES, BLOCK_G], gl.float32, state))
    value = gl.convert_layout(value.to(gl.float32), gl.SliceLayout(0, gl.SliceLayout(1, mma)))
    acc = gl.zeros([PIECES, BLOCK_G, query.shape[1]], gl.float32, mma)
    acc = gl.where(mine[:, :, None], value[None, None, :], acc)
    query = gl.convert_layout(query, gl.SliceLayout(0, left))[None, :, :]
    return query + gl.zeros(acc.shape, query.dtype, left), top, total, acc


@gluon.jit
def _fold_pieces(query, ks, vs, slot, place, end, scale, top, total, acc):
    """Take a slot's positions `place` [PIECES, BLOCK_T] in, each warp its own piece."""
    mma: gl.constexpr = acc.type.layout
    key = ks.index(slot).permute((0, 2, 1)).load(gl.DotOperandLayout(1, mma, 2))
    value = vs.index(slot).load(gl.DotOperandLayout(1, mma, 2))
    zero = gl.zeros([acc.shape[0], acc.shape[1], place.shape[1]], gl.float32, mma)
    score = mma_v2(query, key, zero) * scale
    score = gl.where((place < end)[:, None, :], score, float("-inf"))
    above = gl.maximum(top, gl.max(score, 2))
    safe = gl.where(above == float("-inf"), 0.0, above)
    chance = gl.exp(score - safe[:, :, None])
    shrink = gl.exp(top - safe)
    chances = gl.convert_layout(chance.to(value.dtype), gl.DotOperandLayout(0, mma, 2))
    acc = mma_v2(chances, value, acc * shrink[:, :, None])
    return above, total * shrink + gl.sum(chance, 2), acc


@gluon.jit
def _store_group(
    top, total, acc, part, weight, out, first, GROUP: gl.constexpr, DIM: gl.constexpr,
    SPLITS: gl.constexpr,
):  # fmt: skip
    """Join what the warps hold of a group whose first head is `first`, and store it."""
    highest = gl.max(top, 0)
    share = gl.exp(top - gl.where(highest == float("-inf"), 0.0, highest)[None, :])
    sums = joined(acc * share[:, :, None])
    layout: gl.constexpr = sums.type.layout
    shares = gl.convert_layout(gl.sum(total * share, 0), gl.SliceLayout(1, layout))
    g = gl.arange(0, sums.shape[0], gl.SliceLayout(1, layout))
    d = gl.arange(0, sums.shape[1], gl.SliceLayout(0, layout))
    both = (g < GROUP)[:, None] & (d < DIM)[None, :]
    average = gl.where((shares > 0)[:, None], sums / shares[:, None], 0.0)
    if SPLITS == 1:
        at = (first + g)[:, None] * DIM + d[None, :]
        gl.store(out + at, average.to(out.dtype.element_ty), mask=both)
    else:
        at = (first + g) * SPLITS + gl.program_id(0)
        gl.store(part + at[:, None] * DIM + d[None, :], average, mask=both)
        highest = gl.convert_layout(highest, gl.SliceLayout(1, layout))
        gl.store(weight + at, highest + gl.log(shares), mask=g < GROUP)


@gluon.jit
def staged_group_attention(
    qkv, bias, keys, values, slots, positions, cosine, sine, part, weight, out, scale, capacity,
    stride, HEADS: gl.constexpr, KV: gl.constexpr, DIM: gl.constexpr, ROTARY: gl.constexpr,
    PARTS: gl.constexpr, HAS_BIAS: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_T: gl.constexpr,
    SPLITS: gl.constexpr, STAGES: gl.constexpr, APPEND: gl.constexpr, PDL: gl.constexpr,
    BLOCK_G: gl.constexpr,
):  # fmt: skip
    """As `group_attention`: the heads that share a key are rows of a product, 16 rows a warp.

    Warps beyond those for BLOCK_G rows each take positions of their own, with a softmax of their
    own, joined at the end. SantaCoder at 128 rows: 36 MB in 12.5 us, 2.9 TB/s, where
    `group_attention` takes 17.5.
    """
    announce(PDL)
    GROUP: gl.constexpr = HEADS // KV
    LANES: gl.constexpr = BLOCK_D // 8
    TALL: gl.constexpr = BLOCK_G // 16 if gl.num_warps() > BLOCK_G // 16 else gl.num_warps()
    PIECES: gl.constexpr = gl.num_warps() // TALL
    STEP: gl.constexpr = PIECES * BLOCK_T
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    copied: gl.constexpr = gl.BlockedLayout(
        [1, 1, 8], [1, 32 // LANES, LANES], [PIECES, TALL, 1], [2, 1, 0]
    )
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [PIECES, TALL, 1], [1, 16, 8])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8 if LANES > 8 else LANES, [2, 1, 0])
    kv, row = gl.program_id(1), gl.program_id(2)
    slot, position, low, high, end, start = placed(slots, positions, capacity, KV, DIM, SPLITS,
                                                   True)  # fmt: skip
    keys += start
    values += start
    kind: gl.constexpr = keys.dtype.element_ty
    ks = gl.allocate_shared_memory(kind, [STAGES, PIECES, BLOCK_T, BLOCK_D], swizzled)
    vs = gl.allocate_shared_memory(kind, [STAGES, PIECES, BLOCK_T, BLOCK_D], swizzled)
    p = gl.arange(0, PIECES, gl.SliceLayout(1, gl.SliceLayout(2, copied)))
    t = gl.arange(0, BLOCK_T, gl.SliceLayout(0, gl.SliceLayout(2, copied)))
    d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, gl.SliceLayout(1, copied)))[None, None, :]
    source = (low + p[:, None] * BLOCK_T + t[None, :])[:, :, None]
    for s in gl.static_range(STAGES - 1):
        _copy(ks, vs, s, keys, values, source + s * STEP, end, d, DIM)
    await_predecessor(PDL)
    qkv += row.to(gl.int64) * ((HEADS + 2 * KV) * DIM)
    query, new_key, new_value = _group_inputs(
        qkv, bias, keys, values, slot, position, cosine, sine, stride, flat, HEADS, KV, DIM,
        ROTARY, PARTS, HAS_BIAS, SPLITS, APPEND, BLOCK_G, BLOCK_D,
    )  # fmt: skip
    mine = (high == position + 1) & (low <= position)
    query, top, total, acc = _begin_group(query, new_key, new_value, mine, scale, mma, PIECES)
    p = gl.arange(0, PIECES, gl.SliceLayout(1, gl.SliceLayout(1, mma)))
    t = gl.arange(0, BLOCK_T, gl.SliceLayout(0, gl.SliceLayout(1, mma)))
    place = low + p[:, None] * BLOCK_T + t[None, :]
    for i in range((end - low + STEP - 1) // STEP):
        async_copy.wait_group(STAGES - 2)
        ahead = i + STAGES - 1
        _copy(ks, vs, ahead % STAGES, keys, values, source + ahead * STEP, end, d, DIM)
        top, total, acc = _fold_pieces(query, ks, vs, i % STAGES, place + i * STEP, end, scale,
                                       top, total, acc)  # fmt: skip
    async_copy.wait_group(0)
    first = row.to(gl.int64) * HEADS + kv * GROUP
    _store_group(top, total, acc, part, weight, out, first, GROUP, DIM, SPLITS)


@gluon.jit
def _group_inputs(
    qkv, bias, keys, values, slot, position, cosine, sine, stride, layout: gl.constexpr,
    HEADS: gl.constexpr, KV: gl.constexpr, DIM: gl.constexpr, ROTARY: gl.constexpr,
    PARTS: gl.constexpr, HAS_BIAS: gl.constexpr, SPLITS: gl.constexpr, APPEND: gl.constexpr,
    BLOCK_G: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """Queries [BLOCK_G, BLOCK_D] of a group, and the token's own key and value [BLOCK_D]."""
    GROUP: gl.constexpr = HEADS // KV
    kv = gl.program_id(1)
    g = gl.arange(0, BLOCK_G, gl.SliceLayout(1, layout))
    d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, layout))
    both = (g < GROUP)[:, None] & (d < DIM)[None, :]
    line = d[None, :] + gl.zeros([BLOCK_G, BLOCK_D], gl.int32, layout)
    query = rotated(qkv, bias, kv * GROUP + g[:, None], line, both, position, cosine, sine, stride,
                    DIM, ROTARY, PARTS, HAS_BIAS).to(keys.dtype.element_ty)  # fmt: skip
    if APPEND:
        key, value = owned(qkv, bias, keys, values, d, slot, position, cosine, sine, stride, HEADS,
                          KV, DIM, ROTARY, PARTS, HAS_BIAS, SPLITS)  # fmt: skip
    else:
        key = gl.load(keys + position * DIM + d, mask=d < DIM, other=0.0)
        value = gl.load(values + position * DIM + d, mask=d < DIM, other=0.0)
    return query, key, value
