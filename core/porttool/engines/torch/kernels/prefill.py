"""Many tokens of a row at once: rotary positions with cache append, and flash attention.

Tokens of all rows are packed without padding: token i belongs to cache slot slots[i] at
positions[i].
"""

from __future__ import annotations

import triton
import triton.language as tl

from porttool.engines.torch.kernels.attention import projected, rotated


@triton.jit
def append_kernel(
    qkv, bias, query, keys, values, slots, positions, cosine, sine, capacity, stride,
    HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, FIRST: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the rotated keys and the values of packed tokens in the cache, queries in `query`.

    qkv [tokens, (HEADS + 2 KV) DIM] or PARTS sums of it; query [tokens, HEADS * DIM]; grid
    (head blocks from FIRST on, tokens).
    """
    token = tl.program_id(1)
    head = FIRST + tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    d = tl.broadcast_to(tl.arange(0, BLOCK_D)[None, :], (BLOCK_H, BLOCK_D))
    live = (head < HEADS + 2 * KV) & (d < DIM)
    position = tl.load(positions + token)
    slot = tl.load(slots + token)
    base = qkv + token.to(tl.int64) * ((HEADS + 2 * KV) * DIM)
    plain = projected(base, bias, head * DIM + d, live, stride, PARTS, HAS_BIAS)
    kind = keys.dtype.element_ty
    turned = rotated(base, bias, head, d, live, position, cosine, sine, stride, DIM, ROTARY, PARTS,
                     HAS_BIAS).to(kind)  # fmt: skip
    own = query + token.to(tl.int64) * (HEADS * DIM)
    tl.store(own + head * DIM + d, turned, mask=live & (head < HEADS))
    kv = head - HEADS
    at = (tl.maximum(slot, 0).to(tl.int64) * KV + kv % KV) * capacity * DIM + position * DIM + d
    stored = live & (slot >= 0)
    tl.store(keys + at, turned, mask=stored & (kv >= 0) & (kv < KV))
    tl.store(values + at, plain.to(kind), mask=stored & (kv >= KV))


@triton.jit
def _fold(
    q, keys, values, at, limit, begin, factor, top, total, acc, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the keys and values at positions `at` in; MASKED where some query must not see some.

    Query i stands at position begin[i]; `limit` is one past the last position that any sees.
    """
    d = tl.arange(0, BLOCK_D)
    whole = d < DIM
    across, down = whole[:, None], whole[None, :]
    if MASKED:
        across = across & (at < limit)[None, :]
        down = down & (at < limit)[:, None]
    if MASKED or DIM < BLOCK_D:
        k = tl.load(keys + at[None, :] * DIM + d[:, None], mask=across, other=0.0)
        v = tl.load(values + at[:, None] * DIM + d[None, :], mask=down, other=0.0)
    else:
        k = tl.load(keys + at[None, :] * DIM + d[:, None])
        v = tl.load(values + at[:, None] * DIM + d[None, :])
    score = tl.dot(q, k, input_precision=PRECISION)
    if MASKED:
        score = tl.where(at[None, :] <= begin[:, None], score, float("-inf"))
    above = tl.maximum(top, tl.max(score, 1) * factor)
    weight = tl.exp2(score * factor - above[:, None])
    shrink = tl.exp2(top - above)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return above, total * shrink + tl.sum(weight, 1), acc


@triton.jit
def prefill_attention(
    query, keys, values, row_slots, row_starts, row_first, out, scale, capacity,
    query_stride,
    HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Causal attention of packed queries over the cache (Dao 2023), keys shared as configured.

    query [tokens, query_stride], its first HEADS * DIM columns; out [tokens, HEADS * DIM]; row r
    owns tokens row_first[r] .. row_first[r + 1] - 1, its first at position row_starts[r] of slot
    row_slots[r]. A program's BLOCK_Q queries are those of BLOCK_Q / GROUP tokens in GROUP heads
    that share their keys, so that few of them mask a key that others see; grid (token blocks,
    HEADS / GROUP, rows).
    """
    row = tl.program_id(2)
    first = tl.load(row_first + row)
    width = tl.load(row_first + row + 1) - first
    TOKENS: tl.constexpr = BLOCK_Q // GROUP
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS  # the longest first
    if block < width:
        begin = tl.load(row_starts + row)
        slot = tl.load(row_slots + row)
        lane = tl.arange(0, BLOCK_Q)
        i = block + lane // GROUP
        head = tl.program_id(1) * GROUP + lane % GROUP
        d = tl.arange(0, BLOCK_D)
        t = tl.arange(0, BLOCK_T)
        inside = (i < width)[:, None] & (d < DIM)[None, :]
        column = head[:, None] * DIM + d[None, :]
        token = (first + i).to(tl.int64)[:, None]
        q = tl.load(query + token * query_stride + column, mask=inside, other=0.0)
        own = tl.program_id(1) * GROUP // (HEADS // KV)
        start = (slot.to(tl.int64) * KV + own) * capacity * DIM
        keys += start
        values += start
        reach = begin + tl.minimum(block + TOKENS, width)
        top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        plain = (begin + block + 1) // BLOCK_T * BLOCK_T  # below it no query masks any key
        factor = scale * 1.4426950408889634
        for low in range(0, plain, BLOCK_T):
            top, total, acc = _fold(q, keys, values, low + t, reach, begin + i, factor, top, total,
                                    acc, DIM, BLOCK_D, False, PRECISION)  # fmt: skip
        for low in range(plain, reach, BLOCK_T):
            top, total, acc = _fold(q, keys, values, low + t, reach, begin + i, factor, top, total,
                                    acc, DIM, BLOCK_D, True, PRECISION)  # fmt: skip
        average = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + token * (HEADS * DIM) + column, average, mask=inside)
