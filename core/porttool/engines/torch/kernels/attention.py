"""Attention of single query positions over the KV cache, split along the context."""

from __future__ import annotations

import triton
import triton.language as tl

from porttool.engines.torch.kernels.chain import announce, await_predecessor


@triton.jit
def rotated(base, head, at, d, position, cosine, sine, DIM: tl.constexpr, ROTARY: tl.constexpr,
            live):  # fmt: skip
    """Read element d of a head at `base`, rotated by its position (Su et al. 2021).

    Element i is paired with i + ROTARY / 2; elements from ROTARY on pass through.
    """
    value = tl.load(base + head * DIM + d, mask=live, other=0.0).to(tl.float32)
    if ROTARY > 0:
        HALF: tl.constexpr = ROTARY // 2
        turns = live & (d < ROTARY)
        low = d < HALF
        partner = tl.where(low, d + HALF, d - HALF)
        other = tl.load(base + head * DIM + partner, mask=turns, other=0.0).to(tl.float32)
        angle = position * HALF + d % HALF
        c = tl.load(cosine + angle, mask=turns, other=1.0)
        s = tl.load(sine + angle, mask=turns, other=0.0)
        value = value * c + tl.where(low, -other, other) * s
    return value


@triton.jit
def _add2(a, b, x, y):
    return a + x, b + y


@triton.jit
def decode_attention(
    qkv, keys, values, slots, positions, cosine, sine, part, weight, out, scale, capacity,
    HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr, APPEND: tl.constexpr,
    EVICT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of its own keys: softmax(scale q k^T) v over positions 0 .. positions[row].

    qkv [rows, (HEADS + 2 KV) DIM]; keys, values [slots, KV, capacity, DIM] of one layer; grid
    (SPLITS, KV, rows). With APPEND the row's own key and value are taken from qkv and stored;
    without, the cache holds them already (several tokens of a row in one step), and the sums
    are the same ones in the same order. A negative slot is a padding row: nothing is stored.
    Every thread keeps a running softmax of its own positions; they are joined at the end.
    """
    split, kv, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    announce(PDL)
    position = tl.load(positions + row)
    slot = tl.load(slots + row)
    chunk = tl.cdiv(tl.cdiv(position + 1, SPLITS), 16) * 16
    low = split * chunk
    high = tl.minimum(low + chunk, position + 1)
    stored = high
    if APPEND:
        stored = tl.minimum(high, position)
    d = tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    whole = d < DIM
    start = (tl.maximum(slot, 0).to(tl.int64) * KV + kv) * capacity * DIM
    inner = t[:, None] * DIM + d[None, :]
    inside = ((low + t) < stored)[:, None] & whole[None, :]
    key_tile = tl.load(keys + start + low * DIM + inner, mask=inside, other=0.0,
                       eviction_policy=EVICT)  # fmt: skip
    value_tile = tl.load(values + start + low * DIM + inner, mask=inside, other=0.0,
                         eviction_policy=EVICT)  # fmt: skip
    await_predecessor(PDL)
    base = qkv + row.to(tl.int64) * ((HEADS + 2 * KV) * DIM)
    kind = keys.dtype.element_ty
    query = rotated(base, kv, d, d, position, cosine, sine, DIM, ROTARY, whole)
    query = query.to(kind).to(tl.float32)
    if APPEND:
        new_key = rotated(base, HEADS + kv, d, d, position, cosine, sine, DIM, ROTARY, whole)
        new_key = new_key.to(kind)
        new_value = tl.load(base + (HEADS + KV + kv) * DIM + d, mask=whole, other=0.0).to(kind)
        if (high == position + 1) & (low <= position) & (slot >= 0):
            tl.store(keys + start + position * DIM + d, new_key, mask=whole)
            tl.store(values + start + position * DIM + d, new_value, mask=whole)
    high_t = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total_t = tl.zeros((BLOCK_T,), tl.float32)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(low, high, BLOCK_T):
        key, value = key_tile, value_tile
        ahead = first + BLOCK_T
        inside = ((ahead + t) < stored)[:, None] & whole[None, :]
        key_tile = tl.load(keys + start + ahead * DIM + inner, mask=inside, other=0.0,
                           eviction_policy=EVICT)  # fmt: skip
        value_tile = tl.load(values + start + ahead * DIM + inner, mask=inside, other=0.0,
                             eviction_policy=EVICT)  # fmt: skip
        at = first + t
        if APPEND:
            own = (at == position)[:, None]
            key = tl.where(own, new_key[None, :], key)
            value = tl.where(own, new_value[None, :], value)
        score = tl.sum(key.to(tl.float32) * query[None, :], 1) * scale
        score = tl.where(at < high, score, float("-inf"))
        above = tl.maximum(high_t, score)
        safe = tl.where(above == float("-inf"), 0.0, above)
        chance = tl.exp(score - safe)
        shrink = tl.exp(high_t - safe)
        total_t = total_t * shrink + chance
        acc = acc * shrink[:, None] + chance[:, None] * value.to(tl.float32)
        high_t = above
    highest = tl.max(high_t, 0)
    share = tl.exp(high_t - tl.where(highest == float("-inf"), 0.0, highest))
    shares = tl.broadcast_to((total_t * share)[:, None], (BLOCK_T, BLOCK_D))
    joined, weight_sum = tl.reduce((acc * share[:, None], shares), 0, _add2)
    average = tl.where(weight_sum > 0, joined / weight_sum, 0.0)
    if SPLITS == 1:
        at = (row.to(tl.int64) * HEADS + kv) * DIM + d
        tl.store(out + at, average.to(out.dtype.element_ty), mask=whole)
    else:
        at = (row.to(tl.int64) * HEADS + kv) * SPLITS + split
        tl.store(part + at * DIM + d, average, mask=whole)
        tl.store(weight + at + 0 * d, highest + tl.log(weight_sum), mask=d == 0)


@triton.jit
def group_attention(
    qkv, keys, values, slots, positions, cosine, sine, part, weight, out, scale, capacity,
    HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, SPLITS: tl.constexpr,
    APPEND: tl.constexpr, PRECISION: tl.constexpr, EVICT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `decode_attention`, with the query heads that share a key as rows of a matrix product.

    BLOCK_G is HEADS / KV rounded up to a power of two of at least 16; grid (SPLITS, KV, rows).
    """
    split, kv, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    announce(PDL)
    GROUP: tl.constexpr = HEADS // KV
    position = tl.load(positions + row)
    slot = tl.load(slots + row)
    chunk = tl.cdiv(tl.cdiv(position + 1, SPLITS), 16) * 16
    low = split * chunk
    high = tl.minimum(low + chunk, position + 1)
    stored = high
    if APPEND:
        stored = tl.minimum(high, position)
    d = tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    g = tl.arange(0, BLOCK_G)
    whole = d < DIM
    start = (tl.maximum(slot, 0).to(tl.int64) * KV + kv) * capacity * DIM
    inner = t[:, None] * DIM + d[None, :]
    inside = ((low + t) < stored)[:, None] & whole[None, :]
    key_tile = tl.load(keys + start + low * DIM + inner, mask=inside, other=0.0,
                       eviction_policy=EVICT)  # fmt: skip
    value_tile = tl.load(values + start + low * DIM + inner, mask=inside, other=0.0,
                         eviction_policy=EVICT)  # fmt: skip
    await_predecessor(PDL)
    base = qkv + row.to(tl.int64) * ((HEADS + 2 * KV) * DIM)
    kind = keys.dtype.element_ty
    both = (g < GROUP)[:, None] & whole[None, :]
    line = tl.broadcast_to(d[None, :], (BLOCK_G, BLOCK_D))
    query = rotated(base, kv * GROUP + g[:, None], line, line, position, cosine, sine, DIM,
                    ROTARY, both).to(kind)  # fmt: skip
    if APPEND:
        new_key = rotated(base, HEADS + kv, d, d, position, cosine, sine, DIM, ROTARY, whole)
        new_key = new_key.to(kind)
        new_value = tl.load(base + (HEADS + KV + kv) * DIM + d, mask=whole, other=0.0).to(kind)
        if (high == position + 1) & (low <= position) & (slot >= 0):
            tl.store(keys + start + position * DIM + d, new_key, mask=whole)
            tl.store(values + start + position * DIM + d, new_value, mask=whole)
    highest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for first in range(low, high, BLOCK_T):
        key, value = key_tile, value_tile
        ahead = first + BLOCK_T
        inside = ((ahead + t) < stored)[:, None] & whole[None, :]
        key_tile = tl.load(keys + start + ahead * DIM + inner, mask=inside, other=0.0,
                           eviction_policy=EVICT)  # fmt: skip
        value_tile = tl.load(values + start + ahead * DIM + inner, mask=inside, other=0.0,
                             eviction_policy=EVICT)  # fmt: skip
        at = first + t
        if APPEND:
            own = (at == position)[:, None]
            key = tl.where(own, new_key[None, :], key)
            value = tl.where(own, new_value[None, :], value)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        score = tl.where((at < high)[None, :], score, float("-inf"))
        above = tl.maximum(highest, tl.max(score, 1))
        chance = tl.exp(score - above[:, None])
        shrink = tl.exp(highest - above)
        weight_sum = weight_sum * shrink + tl.sum(chance, 1)
        acc = tl.dot(chance.to(kind), value, acc * shrink[:, None], input_precision=PRECISION)
        highest = above
    head = row.to(tl.int64) * HEADS + kv * GROUP + g
    average = tl.where((weight_sum > 0)[:, None], acc / weight_sum[:, None], 0.0)
    if SPLITS == 1:
        average = average.to(out.dtype.element_ty)
        tl.store(out + head[:, None] * DIM + d[None, :], average, mask=both)
    else:
        at = head * SPLITS + split
        tl.store(part + at[:, None] * DIM + d[None, :], average, mask=both)
        tl.store(weight + at, highest + tl.log(weight_sum), mask=g < GROUP)


@triton.jit
def merged(part, weight, row, head, d, HEADS: tl.constexpr, DIM: tl.constexpr,
           SPLITS: tl.constexpr):  # fmt: skip
    """Join the parts that split attention left: softmax averages [len(head), len(d)] of one row.

    part [rows, HEADS, SPLITS, DIM] are the parts' own averages, weight [rows, HEADS, SPLITS] the
    logarithms of their shares. Elementwise in a fixed order: any kernel gets the same bits.
    """
    known = head < HEADS
    first = (row * HEADS + head) * SPLITS
    highest = tl.full(head.shape, float("-inf"), tl.float32)
    for s in tl.static_range(SPLITS):
        highest = tl.maximum(highest, tl.load(weight + first + s, mask=known, other=0.0))
    total = tl.zeros(head.shape, tl.float32)
    value = tl.zeros((head.shape[0], d.shape[0]), tl.float32)
    inside = known[:, None] & (d < DIM)[None, :]
    for s in tl.static_range(SPLITS):
        share = tl.exp(tl.load(weight + first + s, mask=known, other=0.0) - highest)
        total += share
        at = part + ((first + s) * DIM)[:, None] + d[None, :]
        value += share[:, None] * tl.load(at, mask=inside, other=0.0)
    return value / total[:, None]


@triton.jit
def merge_kernel(
    part, weight, out, HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Join the parts of split attention: out [rows, HEADS * DIM]; grid (head blocks, rows)."""
    announce(PDL)
    await_predecessor(PDL)
    row = tl.program_id(1)
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    value = merged(part, weight, row, head, d, HEADS, DIM, SPLITS)
    inside = (head < HEADS)[:, None] & (d < DIM)[None, :]
    at = (row.to(tl.int64) * HEADS + head)[:, None] * DIM + d[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
