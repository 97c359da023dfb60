"""Tile shapes worth measuring: within shared memory, with work for every multiprocessor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from porttool.config import ModelConfig
from porttool.engines.torch.cuda_balanced import BLOCK, COPIED
from porttool.engines.torch.cuda_balanced import shared as balanced_shared
from porttool.engines.torch.cuda_rule import default_stream, default_wide
from porttool.engines.torch.cuda_tuning import (
    SHARED_BYTES,
    SMALL_ROWS,
    AttentionTile,
    ClusterTile,
    StreamTile,
    WideTile,
    power_of_two,
)

STAGED_ROWS = 32
"""Rows up to which `staged_linear` is worth trying: it reads all of them for every column tile."""

_STREAM = (
    (2, 512, 2, 4), (2, 1024, 2, 2), (2, 1024, 4, 2), (2, 1024, 4, 3), (2, 2048, 8, 1),
    (2, 2048, 8, 2), (4, 512, 2, 2), (4, 512, 4, 4), (4, 1024, 4, 1), (4, 1024, 4, 2),
    (4, 1024, 4, 3), (4, 1024, 8, 4), (4, 2048, 8, 2), (8, 512, 4, 2), (8, 512, 8, 4),
    (8, 2048, 16, 1), (8, 1024, 8, 2), (4, 256, 2, 2), (4, 256, 2, 4), (8, 256, 2, 1),
    (8, 256, 2, 2), (8, 256, 2, 3), (8, 256, 4, 2), (8, 256, 4, 4), (16, 256, 4, 2),
    (16, 256, 4, 3), (16, 256, 8, 2), (16, 256, 8, 4), (32, 256, 8, 2), (32, 256, 16, 3),
)  # fmt: skip

_WIDE = (
    (32, 128, 4, 4), (32, 128, 4, 6), (32, 256, 4, 3), (64, 64, 4, 6), (64, 128, 4, 4),
    (64, 128, 4, 6), (64, 128, 8, 4), (64, 256, 8, 4), (128, 64, 4, 4), (128, 64, 4, 6),
    (128, 64, 8, 6), (128, 128, 4, 3), (128, 128, 8, 3), (128, 128, 8, 4), (256, 64, 8, 3),
    (256, 64, 8, 4),
)  # fmt: skip

_STAGED = (
    (16, 256, 4, 3), (16, 512, 8, 3), (32, 256, 4, 3), (32, 512, 8, 2), (64, 128, 4, 3),
    (64, 128, 4, 4), (64, 256, 4, 2), (64, 256, 4, 3), (64, 128, 2, 3), (64, 128, 2, 4),
)  # fmt: skip


_HALF = 113 << 10
"""Shared memory of a program that leaves room for another on a Hopper multiprocessor."""

_TOGETHER = 208
"""Positions that a program of a cluster takes at once, at most."""

_GROWTH = 128
"""Tokens by which a context may outgrow the one it is measured at before a part takes two slots."""

_WIDEST = 4096
"""Elements of a row for which eight warps are enough; a wider model was 1 % faster with twelve."""

_BESIDE = ((32, 128, 4, 6), (64, 128, 4, 4), (64, 256, 8, 4), (128, 64, 4, 4))
"""What has been faster than staged tiles in some model: every tile more is compiled for nothing."""


def stream_candidates(n: int, k: int, *, gated: bool) -> Iterator[StreamTile]:
    """Tiles worth trying for a single row of a matrix [n, k], the rule's choices among them."""
    for residual in (False, True):
        yield default_stream(k, gated=gated, residual=residual)
    for block_n, block_k, warps, held in _STREAM:
        block_n //= 2 if gated else 1
        tiles = -(-k // block_k)
        if block_n and n // block_n >= 48 and block_k < 2 * k and held <= tiles <= 64:
            yield StreamTile(block_n, block_k, warps, held)


def persistent_candidates(config: ModelConfig, programs: int) -> Iterator[list[dict[str, int]]]:
    """Lists of a persistent tile's numbers to measure in turn; others are the fastest's so far.

    programs: the GPU's multiprocessors, each of which runs one.
    """
    row = config.d_model // 32
    steps = -(-row // -(-row // 32) // 2) * 2
    most = min(programs // config.n_head, 8)
    first = {"steps": steps, "flying": 3}
    yield [first | {"splits": splits} for splits in (1, 2, 3, 4, 5, 6, 8) if splits <= most]
    yield [{"sharing": sharing} for sharing in (4, 2)]
    yield [{"steps": steps, "flying": flying} for flying in (2, 4, 6)]
    yield [{"steps": 2 * steps, "flying": flying} for flying in (2, 3)]
    yield [{"fillers": fillers} for fillers in (2, 3)]
    if config.d_model > _WIDEST:
        yield [{"warps": 12, "sharing": 4}]


def cluster_candidates(
    n: int, k: int, rows: int, programs: int, *, gated: bool, residual: bool
) -> Iterator[ClusterTile]:
    """Clusters worth trying for several rows of a matrix [n, k] on so many multiprocessors.

    One program or two fill a multiprocessor, or half of it, which lets the next kernel in; those
    that leave the fewest multiprocessors idle. Half of the slots asked for ahead were best mostly.
    Sums of many rows go through memory, too: exchanged in shared memory, they take the ring's room.
    """
    tiles: dict[ClusterTile, float] = {}
    for block_n in (64, 128) if gated else (64, 128, 192):
        for split, by_memory in ((1, False), *product((2, 3, 4, 5, 6, 8), (False, True))):
            count = -(-n // block_n) * split
            if by_memory and (rows < 64 or block_n < 128):
                continue
            for each, room in ((1, 2 * _HALF), (1, _HALF), (2, _HALF)):
                if by_memory and count > programs * each:
                    continue  # they wait for each other
                idle = 1 - count / (-(-count // (programs * each)) * programs * each)
                stages = 1
                while stages < min(16, -(-k // (64 * split))):
                    more = ClusterTile(block_n, split, stages + 1, 1, by_memory)
                    if more.shared(rows, gated=gated, residual=residual) > room:
                        break
                    stages += 1
                if stages > 1 and count <= 3 * programs and idle < 0.4:
                    tile = ClusterTile(block_n, split, stages, max(stages // 2, 1), by_memory)
                    tiles[tile] = min(idle, tiles.get(tile, 1.0))
    yield from sorted(tiles, key=tiles.__getitem__)[:28]


def wide_candidates(
    n: int, k: int, rows: int, name: str, *, gated: bool, staged: bool
) -> Iterator[WideTile]:
    """Tiles worth trying for several rows, with programs for every multiprocessor.

    `staged` says whether the GPU runs `staged_linear`.
    """
    yield default_wide(n, k, rows, name, gated=gated)
    if rows > SMALL_ROWS and name != "head":
        yield WideTile(0, 0)
    if staged and name != "head" and rows <= STAGED_ROWS and k % 8 == 0:
        tiles = [(*tile, False) for tile in _BESIDE] + [(*tile, True) for tile in _STAGED]
    else:
        tiles = [(*tile, False) for tile in _WIDE]
    for block_n, block_k, warps, stages, early in tiles:
        block_n //= 2 if gated else 1
        shared = 2 * stages * block_k * (rows + block_n * (2 if gated else 1))
        if shared > SHARED_BYTES or block_k >= 2 * k:
            continue
        for split in (1, 2, 4, 8) if name in ("qkv", "out", "down") else (1,):
            programs = -(-n // block_n) * split
            fills = min(60, n // 48) <= programs <= (4000 if split == 1 else 560)
            if fills and k // (block_k * split) >= (1 if early else 2):
                yield WideTile(block_n, block_k, warps, stages, split, early)


def balanced_candidates(config: ModelConfig, n: int, context: int) -> Iterator[AttentionTile]:
    """Balanced attention worth trying for n rows of about `context` tokens."""
    if config.n_head > config.n_kv_head:
        yield from _group_candidates(config, n, context)
        return
    tiles: dict[AttentionTile, None] = {}
    for slot, most, room in product((16 << 10, 32 << 10), (8, 4), (_HALF, 2 * _HALF)):
        positions = slot // (4 * config.head_dim)
        tile = AttentionTile(1, positions, min(positions // BLOCK, most), balanced=True)
        more = (room - 1024 - balanced_shared(config, tile)) // (slot + 16)
        tiles[replace(tile, stages=tile.stages + more)] = None
    yield from tiles


def _group_candidates(config: ModelConfig, n: int, context: int) -> Iterator[AttentionTile]:
    """Clusters for each row and head of keys.

    A program takes its part of the context at once where that is no more than _TOGETHER positions
    and there is room: a slot more takes a microsecond. Else slots come while others are taken.
    """
    wide = config.n_head <= 16 * config.n_kv_head and config.head_dim >= 128
    copies = -(-(context + _GROWTH) // COPIED)
    for splits, warps in product((1, 2, 3, 4, 5, 6, 8), (4, 8) if wide else (4,)):
        programs = n * config.n_kv_head * splits
        if programs < 90 or (splits > 1 and programs > 600):
            continue
        each = max(-(-copies // splits), 2)
        tile = AttentionTile(splits, each * COPIED, warps, each, balanced=True)
        if each * COPIED <= _TOGETHER and balanced_shared(config, tile) <= SHARED_BYTES:
            yield from [tile, *_roomier(config, tile, _HALF)]
            continue
        few, some, many = (replace(tile, block_t=k * COPIED, stages=k) for k in (2, 4, 6))
        tries = ((some, _HALF), (many, _HALF), (many, SHARED_BYTES))
        rings = [ring for slot, room in tries for ring in _roomier(config, slot, room)]
        yield from dict.fromkeys(rings or _roomier(config, few, SHARED_BYTES))


def _roomier(config: ModelConfig, tile: AttentionTile, room: int) -> list[AttentionTile]:
    """Return a tile with a longer ring, up to twice as long, if it fits in so many bytes."""
    copy = 4 * COPIED * config.head_dim + 16
    more = min((room - balanced_shared(config, tile)) // copy, tile.stages)
    return [replace(tile, stages=tile.stages + more)] if more > 0 else []


def attention_candidates(config: ModelConfig, n: int, *, staged: bool) -> Iterator[AttentionTile]:
    """Cuts of the context worth trying for n rows.

    `staged` says whether the GPU runs `staged_attention`; a row alone gains nothing by it.
    """
    if n == 1:
        yield from _alone_candidates(config)
        return
    for splits in (1, 2, 4, 8, 16):
        programs = n * config.n_kv_head * splits
        if programs >= 100 and (splits == 1 or programs <= 1100):
            yield from _several_candidates(config, splits)
            if staged and config.head_dim % 8 == 0:
                yield from _staged_attention(config, splits)


def _alone_candidates(config: ModelConfig) -> Iterator[AttentionTile]:
    shared = config.n_kv_head < config.n_head
    for splits in (2, 4, 5, 8, 9, 10, 12, 16):
        for block_t in (16, 32, 64, 128, 256, 512):
            if not 512 <= block_t * splits <= 1024:
                continue
            if shared and block_t * config.head_dim > 8192:
                continue
            for warps in (1, 2, 4, 8, 16):
                if 16 <= block_t * config.head_dim // (32 * warps) <= 64:
                    yield AttentionTile(splits, block_t, warps)


def _several_candidates(config: ModelConfig, splits: int) -> Iterator[AttentionTile]:
    """16 or 32 elements of a tile a thread."""
    width = power_of_two(config.head_dim)
    for block_t in (16, 32, 64, 128):
        for each in (16, 32):
            warps = block_t * width // (32 * each)
            if warps not in (1, 2, 4, 8):
                continue
            yield AttentionTile(splits, block_t, warps)
            if 12 * block_t * width <= SHARED_BYTES // 2:
                yield AttentionTile(splits, block_t, warps, stages=4)


def _staged_attention(config: ModelConfig, splits: int) -> Iterator[AttentionTile]:
    """Rings of up to a quarter of the shared memory, a half where heads share their keys."""
    width, group = power_of_two(config.head_dim), config.n_head // config.n_kv_head
    tall = max(16, power_of_two(group)) // 16
    for block_t in (16, 32):
        for stages in (2, 3, 4, 6) if group == 1 else (2, 3):
            for warps in (1, 2, 4, 8):
                pieces = 1 if group == 1 else max(warps // tall, 1)
                each = block_t * width // (32 * warps)
                suits = each in (16, 32) if group == 1 else warps in (tall, 2 * tall, 4 * tall)
                room = SHARED_BYTES // (4 if group == 1 else 2)
                if suits and 4 * stages * pieces * block_t * width <= room:
                    yield AttentionTile(splits, block_t, warps, stages, staged=True)
