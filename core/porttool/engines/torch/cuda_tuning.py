"""Tile shapes of the decode kernels: `cuda_rule` chooses some, `cuda_tune` measures better ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter

from porttool.config import ModelConfig
from porttool.engines.torch.cuda_hopper import programs_of

SMALL_ROWS = 16
"""2 to this many rows run in the same tiles, so that a row's result does not depend on them."""

MAX_TILE_ROWS = 128
"""More rows than this take several row tiles."""

SHARED_BYTES = 220 << 10
"""Shared memory of one program, at most: what a Hopper multiprocessor has for it."""


PROGRAM_WARPS = 32
"""Warps of one program, at most."""


@dataclass(frozen=True)
class StreamTile:
    """How a single row's matrix is cut; `held` tiles are loaded before the predecessor ends."""

    block_n: int
    block_k: int
    warps: int = 4
    held: int = 1

    def __str__(self) -> str:
        """Return rows x columns of a tile."""
        return f"{self.block_n} x {self.block_k}"


@dataclass(frozen=True)
class WideTile:
    """How a product of several rows is cut; `split` cuts the inner dimension over programs.

    With block_n 0 the library's product is used. With `staged` the first weights go to shared
    memory before the kernel's predecessor ends (`staged_linear` in place of `wide_linear`).
    """

    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 4
    split: int = 1
    staged: bool = False

    def stages_within(self, shared: int, rows: int, itemsize: int, *, gated: bool) -> int:
        """Stages that so many bytes hold with so many rows: float32 takes twice the room."""
        stage = self.block_k * (rows + self.block_n * (2 if gated else 1)) * itemsize
        return max(min(self.stages, shared // stage), 1)

    def __str__(self) -> str:
        """Return rows x columns of a tile and the cuts of the inner dimension."""
        cut = f" in {self.split} cuts" if self.split > 1 else ""
        return f"{self.block_n} x {self.block_k}{cut}" if self.block_n else "the library's"


@dataclass(frozen=True)
class AttentionTile:
    """Parts of the context, positions a program takes at a time, its warps and tiles in flight.

    With `staged` the first tiles go to shared memory before the kernel's predecessor ends. With
    `balanced` a kernel for Hopper runs: a program that is done with a head draws the next one, or,
    where heads share keys, `splits` programs, a cluster, take a part each and join them.
    """

    splits: int
    block_t: int
    warps: int = 4
    stages: int = 1
    staged: bool = False
    balanced: bool = False

    def __post_init__(self) -> None:
        """Refuse a tile of nothing, with a ValueError: tiles are read from files."""
        if min(self.splits, self.block_t, self.warps, self.stages) < 1:
            raise ValueError(f"no attention runs in {self!r}")

    def __str__(self) -> str:
        """Return parts x positions of a tile."""
        return f"{'balanced ' * self.balanced}{self.splits} x {self.block_t}"


@dataclass(frozen=True)
class ClusterTile:
    """How a product is cut: `split` programs share the inner dimension of some columns.

    Each has `stages` slots of 64 inner elements, `ahead` of which are asked for before the
    kernel's predecessor ends. They are a cluster and exchange sums through shared memory, or
    exchange them `by_memory` and are none.
    """

    block_n: int
    split: int
    stages: int
    ahead: int
    by_memory: bool = False

    def __post_init__(self) -> None:
        """Refuse what the kernel does not run, with a ValueError: tiles are read from files."""
        runs = self.block_n in (64, 128, 192, 256) and 1 <= self.split <= 8
        if not (runs and self.stages >= 2 and self.ahead >= 1 and self.split > self.by_memory):
            raise ValueError(f"no product runs in {self!r}")

    def shared(self, rows: int, *, gated: bool, residual: bool) -> int:
        """Bytes of shared memory of a program for a tile of so many rows."""
        parts, share = 2 if gated else 1, -(-rows // self.split)
        sent = 16 * parts if self.by_memory else 4 * parts * share * (self.block_n + 4)
        ring = self.stages * 128 * (parts * self.block_n + rows)
        old = share if residual and not self.by_memory else 1
        beside = (self.split - 1) * sent + 32 + 4 * self.block_n * old
        beside += 16 * self.stages + 8 * share + 4 * self.block_n * (2 * parts + 1) + 128
        return (-(-max(ring, self.split * sent) // 1024) - (-beside // 1024) + 1) * 1024

    def __str__(self) -> str:
        """Return the columns and the programs that share them."""
        return f"{self.block_n} by {'' if self.by_memory else 'a cluster of '}{self.split}"


@dataclass(frozen=True)
class PersistentTile:
    """How the persistent kernel cuts a row's decoding.

    Pieces of up to `steps` x 64 bytes of a matrix row in whole lines of 128, `flying` slots of
    eight such pieces on their way to a multiprocessor at a time, the context of a head in `splits`
    parts, `fillers` warps that ask for all of it, `sharing` of the `warps` that compute multiply a
    slot together.
    """

    steps: int
    flying: int
    splits: int
    fillers: int = 4
    sharing: int = 8
    warps: int = 8

    def __post_init__(self) -> None:
        """Refuse what no kernel is made for, with a ValueError: tiles are read from files."""
        many = self.warps + self.fillers > PROGRAM_WARPS or self.splits > 32 * self.warps
        if min(asdict(self).values()) < 1 or self.warps % self.sharing or many:
            raise ValueError(f"no row is decoded in {self!r}")


@dataclass(frozen=True)
class Tuning:
    """Everything measured for one model on one GPU; `as_dict` goes into the engine's folder.

    `stream` by linear ("qkv", "out", "up", "down", "head"); `wide` and `wide_attention` by rows
    of a tile, `wide` then by linear; with `join_in_out` the output projection of a single row
    joins the parts of split attention, else a kernel of its own does; with `persistent` one kernel
    decodes a single row in place of the chain; `cluster`, by rows and linear, has products of
    several rows that run in clusters in place of `wide`'s; `notes` say what was measured with it.
    `multiprocessors` are those of the GPU, 0 where they were not recorded.
    """

    gpu: str
    stream: Mapping[str, StreamTile]
    wide: Mapping[str, Mapping[str, WideTile]]
    attention: AttentionTile
    wide_attention: Mapping[str, AttentionTile]
    join_in_out: bool = False
    persistent: PersistentTile | None = None
    cluster: Mapping[str, Mapping[str, ClusterTile]] = field(default_factory=dict)
    multiprocessors: int = 0
    notes: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no step runs in, with a ValueError: tunings are read from files."""
        few = [self.attention, self.wide_attention.get(str(SMALL_ROWS), self.attention)]
        if any(tile.balanced for tile in few):
            raise ValueError(
                f"balanced attention of up to {SMALL_ROWS} rows, which may be tokens of one "
                "sequence that attend to each other"
            )
        for rows, tiles in self.cluster.items():
            if rows not in self.wide or set(tiles) != {"qkv", "out", "up", "down"}:
                raise ValueError(
                    f"products in clusters of {rows} rows are not whole: {list(tiles)}"
                )

    def described(self, n: int) -> str:
        """Say in a line which tiles steps of n rows run in."""
        if n == 1 and self.persistent:
            tile = self.persistent
            return (
                f"one persistent kernel, pieces of {64 * tile.steps} bytes, {tile.flying} slots on "
                f"their way, each shared by {tile.sharing} of {tile.warps} warps, attention in "
                f"{tile.splits} parts"
            )
        rows = str(tile_rows(n))
        tiles: dict[str, Any] = {**(self.stream if n == 1 else self.wide[rows])}
        if n > 1 and rows in self.cluster:
            tiles |= self.cluster[rows]
        attention = self.attention if n == 1 else self.wide_attention[rows]
        parts = [f"{name} {tile}" for name, tile in tiles.items()]
        return f"attention {attention}, " + ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for a manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tuning:
        """Read what `as_dict` wrote; a pydantic ValidationError if it is something else."""
        return TypeAdapter(cls).validate_python(data)


def gpu_name(device: str) -> str:
    """Name the GPU (or "interpreter" on a CPU) that a tuning belongs to."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "interpreter"


def multiprocessors(device: str) -> int:
    """Count a GPU's multiprocessors; cards of one name, or slices of a card, differ in them."""
    return programs_of(device) if device.startswith("cuda") else 0


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def head_block(head_dim: int) -> int:
    """Return the elements of a head that a kernel holds: a matrix product takes at least 16."""
    return max(power_of_two(head_dim), 16)


def tile_rows(n: int) -> int:
    """Rows of a tile for a step of n rows."""
    return min(max(power_of_two(n), SMALL_ROWS), MAX_TILE_ROWS)


def shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Columns (of one half when gated) and inner dimension of every kind of matrix."""
    c = config
    return {
        "qkv": (c.qkv_dim, c.d_model),
        "out": (c.d_model, c.n_head * c.head_dim),
        "up": (c.d_ff, c.d_model),
        "down": (c.d_model, c.d_ff),
        "head": (c.vocab_size, c.d_model),
    }
