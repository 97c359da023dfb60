"""Attention of single query positions over the KV cache, split along the context."""

from __future__ import annotations

import triton
import triton.language as tl

from porttool.engines.torch.kernels.chain import announce, await_predecessor


@triton.jit
def projected(qkv, bias, at, live, stride, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Elements `at` of a token's queries, keys and values, in float32.

    qkv [(HEADS + 2 KV) DIM] is the token's row. With PARTS > 1 it is the first of so many sums in
    float32, `stride` apart, that a cut inner dimension left, and the bias is still to be added.
    """
    value = tl.load(qkv + at, mask=live, other=0.0).to(tl.float32)
    for p in tl.static_range(1, PARTS):
        value += tl.load(qkv + p * stride + at, mask=live, other=0.0)
    if PARTS > 1 and HAS_BIAS:
        value += tl.load(bias + at, mask=live, other=0.0).to(tl.float32)
    return value


@triton.jit
def rotated(
    qkv, bias, head, d, live, position, cosine, sine, stride, DIM: tl.constexpr,
    ROTARY: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Element d of a head, rotated by its position (Su et al. 2021), in float32.

    Element i is paired with i + ROTARY / 2; elements from ROTARY on pass through.
    """
    value = projected(qkv, bias, head * DIM + d, live, stride, PARTS, HAS_BIAS)
    if ROTARY > 0:
        HALF: tl.constexpr = ROTARY // 2
        turns = live & (d < ROTARY)
        low = d < HALF
        partner = head * DIM + tl.where(low, d + HALF, d - HALF)
        other = projected(qkv, bias, partner, turns, stride, PARTS, HAS_BIAS)
        angle = position * HALF + d % HALF
        c = tl.load(cosine + angle, mask=turns, other=1.0)
        s = tl.load(sine + angle, mask=turns, other=0.0)
        value = value * c + tl.where(low, -other, other) * s
    return value


@triton.jit
def _cut(position, SPLITS: tl.constexpr):
    """First and one past the last position of this program's part of the context."""
    chunk = tl.cdiv(tl.cdiv(position + 1, SPLITS), 16) * 16
    low = tl.program_id(0) * chunk
    return low, tl.minimum(low + chunk, position + 1)


@triton.jit
def placed(
    slots, positions, capacity, KV: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr,
    APPEND: tl.constexpr,
):  # fmt: skip
    """Where this program works: slot, position, its part, the end of what the cache holds of it.

    The last of the six is the offset of the row's head in one layer's keys.
    """
    position = tl.load(positions + tl.program_id(2))
    slot = tl.load(slots + tl.program_id(2))
    low, high = _cut(position, SPLITS)
    stored = high
    if APPEND:
        stored = tl.minimum(high, position)
    start = (tl.maximum(slot, 0).to(tl.int64) * KV + tl.program_id(1)) * capacity * DIM
    return slot, position, low, high, stored, start


@triton.jit
def _read(keys, values, first, end, t, d, DIM: tl.constexpr, EVICT: tl.constexpr):
    """Keys and values [len(t), len(d)] from `first` on; zeros from `end` on."""
    inside = ((first + t) < end)[:, None] & (d < DIM)[None, :]
    at = first * DIM + t[:, None] * DIM + d[None, :]
    key = tl.load(keys + at, mask=inside, other=0.0, eviction_policy=EVICT)
    value = tl.load(values + at, mask=inside, other=0.0, eviction_policy=EVICT)
    return key, value


@triton.jit
def owned(
    qkv, bias, keys, values, d, slot, position, cosine, sine, stride, HEADS: tl.constexpr,
    KV: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The token's own key and value [len(d)]; the part that holds its position stores them."""
    kv = tl.program_id(1)
    kind = keys.dtype.element_ty
    whole = d < DIM
    key = rotated(qkv, bias, HEADS + kv, d, whole, position, cosine, sine, stride, DIM, ROTARY,
                  PARTS, HAS_BIAS).to(kind)  # fmt: skip
    value = projected(qkv, bias, (HEADS + KV + kv) * DIM + d, whole, stride, PARTS, HAS_BIAS)
    value = value.to(kind)
    low, high = _cut(position, SPLITS)
    if (high == position + 1) & (low <= position) & (slot >= 0):
        tl.store(keys + position * DIM + d, key, mask=whole)
        tl.store(values + position * DIM + d, value, mask=whole)
    return key, value


@triton.jit
def fold_alone(key, value, query, at, high, scale, top, total, acc):
    """Take positions `at` in; every thread keeps a running softmax of its own positions."""
    score = tl.sum(key.to(tl.float32) * query[None, :], 1) * scale
    score = tl.where(at < high, score, float("-inf"))
    above = tl.maximum(top, score)
    safe = tl.where(above == float("-inf"), 0.0, above)
    chance = tl.exp(score - safe)
    shrink = tl.exp(top - safe)
    acc = acc * shrink[:, None] + chance[:, None] * value.to(tl.float32)
    return above, total * shrink + chance, acc


@triton.jit
def _fold_group(key, value, query, at, high, scale, top, total, acc, PRECISION: tl.constexpr):
    """Take positions `at` in, for all heads of the group (Milakov and Gimelshein 2018)."""
    score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    score = tl.where((at < high)[None, :], score, float("-inf"))
    above = tl.maximum(top, tl.max(score, 1))
    chance = tl.exp(score - above[:, None])
    shrink = tl.exp(top - above)
    acc = tl.dot(chance.to(key.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
    return above, total * shrink + tl.sum(chance, 1), acc


@triton.jit
def add_pairs(a, b, x, y):
    """Add two sums that are reduced side by side."""
    return a + x, b + y


@triton.jit
def decode_attention(
    qkv, bias, keys, values, slots, positions, cosine, sine, part, weight, out, scale, capacity,
    stride, HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, APPEND: tl.constexpr, EVICT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One head of its own keys: softmax(scale q k^T) v over positions 0 .. positions[row].

    qkv [rows, (HEADS + 2 KV) DIM] or PARTS sums of it; keys, values [slots, KV, capacity, DIM] of
    one layer; grid (SPLITS, KV, rows). With APPEND the row's own key and value are taken from qkv
    and stored; without, the cache holds them already (several tokens of a row in one step), and
    the sums are the same in the same order. A negative slot is a padding row: nothing is stored.
    With STAGES 1 a tile of keys and values is held in registers ahead of its use, the first before
    the wait; else STAGES - 1 are on their way to shared memory (many rows: 4.1 of 4.3 TB/s).
    """
    kv, row = tl.program_id(1), tl.program_id(2)
    announce(PDL)
    slot, position, low, high, stored, start = placed(slots, positions, capacity, KV, DIM, SPLITS,
                                                      APPEND)  # fmt: skip
    keys += start
    values += start
    d = tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    if STAGES < 2:
        next_key, next_value = _read(keys, values, low, stored, t, d, DIM, EVICT)
    await_predecessor(PDL)
    qkv += row.to(tl.int64) * ((HEADS + 2 * KV) * DIM)
    query = rotated(qkv, bias, kv, d, d < DIM, position, cosine, sine, stride, DIM, ROTARY, PARTS,
                    HAS_BIAS).to(keys.dtype.element_ty).to(tl.float32)  # fmt: skip
    if APPEND:
        new_key, new_value = owned(qkv, bias, keys, values, d, slot, position, cosine, sine, stride,
                                  HEADS, KV, DIM, ROTARY, PARTS, HAS_BIAS, SPLITS)  # fmt: skip
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in tl.range(low, high, BLOCK_T, num_stages=STAGES):
        if STAGES < 2:
            key, value = next_key, next_value
            next_key, next_value = _read(keys, values, first + BLOCK_T, stored, t, d, DIM, EVICT)
        else:
            key, value = _read(keys, values, first, stored, t, d, DIM, EVICT)
        at = first + t
        if APPEND:
            own = (at == position)[:, None]
            key = tl.where(own, new_key[None, :], key)
            value = tl.where(own, new_value[None, :], value)
        top, total, acc = fold_alone(key, value, query, at, high, scale, top, total, acc)
    highest = tl.max(top, 0)
    share = tl.exp(top - tl.where(highest == float("-inf"), 0.0, highest))
    shares = tl.broadcast_to((total * share)[:, None], (BLOCK_T, BLOCK_D))
    joined, weight_sum = tl.reduce((acc * share[:, None], shares), 0, add_pairs)
    average = tl.where(weight_sum > 0, joined / weight_sum, 0.0)
    head = row.to(tl.int64) * HEADS + kv
    if SPLITS == 1:
        tl.store(out + head * DIM + d, average.to(out.dtype.element_ty), mask=d < DIM)
    else:
        at = head * SPLITS + tl.program_id(0)
        tl.store(part + at * DIM + d, average, mask=d < DIM)
        tl.store(weight + at + 0 * d, highest + tl.log(weight_sum), mask=d == 0)


@triton.jit
def group_attention(
    qkv, bias, keys, values, slots, positions, cosine, sine, part, weight, out, scale, capacity,
    stride, HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, APPEND: tl.constexpr, EVICT: tl.constexpr,
    PDL: tl.constexpr, BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `decode_attention`, with the query heads that share a key as rows of a matrix product.

    BLOCK_G is HEADS / KV rounded up to a power of two of at least 16; grid (SPLITS, KV, rows).
    """
    kv, row = tl.program_id(1), tl.program_id(2)
    announce(PDL)
    GROUP: tl.constexpr = HEADS // KV
    slot, position, low, high, stored, start = placed(slots, positions, capacity, KV, DIM, SPLITS,
                                                      APPEND)  # fmt: skip
    keys += start
    values += start
    d = tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    g = tl.arange(0, BLOCK_G)
    if STAGES < 2:
        next_key, next_value = _read(keys, values, low, stored, t, d, DIM, EVICT)
    await_predecessor(PDL)
    qkv += row.to(tl.int64) * ((HEADS + 2 * KV) * DIM)
    both = (g < GROUP)[:, None] & (d < DIM)[None, :]
    line = tl.broadcast_to(d[None, :], (BLOCK_G, BLOCK_D))
    query = rotated(qkv, bias, kv * GROUP + g[:, None], line, both, position, cosine, sine, stride,
                    DIM, ROTARY, PARTS, HAS_BIAS).to(keys.dtype.element_ty)  # fmt: skip
    if APPEND:
        new_key, new_value = owned(qkv, bias, keys, values, d, slot, position, cosine, sine, stride,
                                  HEADS, KV, DIM, ROTARY, PARTS, HAS_BIAS, SPLITS)  # fmt: skip
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for first in tl.range(low, high, BLOCK_T, num_stages=STAGES):
        if STAGES < 2:
            key, value = next_key, next_value
            next_key, next_value = _read(keys, values, first + BLOCK_T, stored, t, d, DIM, EVICT)
        else:
            key, value = _read(keys, values, first, stored, t, d, DIM, EVICT)
        at = first + t
        if APPEND:
            own = (at == position)[:, None]
            key = tl.where(own, new_key[None, :], key)
            value = tl.where(own, new_value[None, :], value)
        top, total, acc = _fold_group(key, value, query, at, high, scale, top, total, acc,
                                      PRECISION)  # fmt: skip
    head = row.to(tl.int64) * HEADS + kv * GROUP + g
    average = tl.where((total > 0)[:, None], acc / total[:, None], 0.0)
    if SPLITS == 1:
        average = average.to(out.dtype.element_ty)
        tl.store(out + head[:, None] * DIM + d[None, :], average, mask=both)
    else:
        at = head * SPLITS + tl.program_id(0)
        tl.store(part + at[:, None] * DIM + d[None, :], average, mask=both)
        tl.store(weight + at, top + tl.log(total), mask=g < GROUP)


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
