"""Products of several rows by clusters of programs that share the work: `hopper/linear.cu`."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch

from porttool.config import ModelConfig
from porttool.engines.torch import cuda_hopper
from porttool.engines.torch.cuda_compile import tensor_map
from porttool.engines.torch.cuda_hopper import programs_of
from porttool.engines.torch.cuda_launch import Model
from porttool.engines.torch.cuda_state import Between, Scratch
from porttool.engines.torch.cuda_tuning import ClusterTile, shapes, tile_rows
from porttool.errors import EngineError

KERNEL = "cluster_linear"
CHUNK = 64
"""Elements of the inner dimension in a slot: 128 bytes."""

TOLD = 64
"""Columns of the residual stream whose sums are told as one."""

NAMES = ("qkv", "out", "up", "down")


def unsuited(config: ModelConfig, dtype: torch.dtype, device: str) -> str | None:
    """Say why these products cannot run a model on a device, or None."""
    return cuda_hopper.unsuited(dtype, device) or unfit(config)


def unfit(config: ModelConfig) -> str | None:
    """Say why a model's shape does not suit these products, or None."""
    c = config
    if any(inner % CHUNK for inner in (c.d_model, c.n_head * c.head_dim, c.d_ff)):
        return f"rows of its matrices are no multiples of {CHUNK} elements"
    return "its heads are no multiples of 4 elements" if c.qkv_dim % 4 else None


def residual(name: str) -> bool:
    """Whether a matrix's product is added to the residual stream."""
    return name in ("out", "down")


def macros(
    config: ModelConfig, dtype: torch.dtype, name: str, tile: ClusterTile, rows: int, *,
    first: bool = False,
) -> dict[str, object]:  # fmt: skip
    """Return what the kernel's source finds defined for one kind of matrix.

    rows: of a tile, 16 to 128. The first layer's qkv finds its input normalised.
    """
    gated = config.gated and name == "up"
    return {
        "BLOCK_M": rows, "BLOCK_N": tile.block_n, "SPLIT": tile.split, "STAGES": tile.stages,
        "AHEAD": min(tile.ahead, tile.stages), "BY_MEMORY": int(tile.by_memory),
        "GATED": int(gated), "NORM": int(not residual(name) and not first),
        "RESIDUAL": int(residual(name)), "ACTIVATED": int(name == "up"),
        f"ACT_{config.activation}": 1, "BF16": int(dtype == torch.bfloat16),
        "RMS": int(config.norm == "rmsnorm"), "EPS": f"{config.norm_eps!r}f",
        "SHARED": tile.shared(rows, gated=gated, residual=residual(name)),
    }  # fmt: skip


def threads(tile: ClusterTile) -> int:
    """Threads of a program: those that multiply, a warp that fetches and one that helps."""
    return 2 * tile.block_n + 64


class _Arguments(ctypes.Structure):
    """The kernel's `Arguments`, padded to its alignment."""

    _fields_ = (
        *((name, ctypes.c_uint64 * 16) for name in ("weights", "inputs", "first_inputs")),
        *((name, ctypes.c_void_p)
          for name in ("bias", "column_sum", "heard", "x", "out", "gamma", "told", "parts", "met")),
        *((name, ctypes.c_int)
          for name in ("rows", "columns", "chunks", "heard_tiles", "width", "row_tile")),
        ("given", ctypes.c_float), ("taken", ctypes.c_float), ("padding", ctypes.c_byte * 24),
    )  # fmt: skip


def between(
    config: ModelConfig, tiles: Mapping[str, Sequence[ClusterTile]], rows: int,
    device: str | torch.device,
) -> Between:  # fmt: skip
    """Allocate what products need between them for any of some tiles of each matrix."""
    sums = 1
    for name, several in tiles.items():
        halves = 2 if config.gated and name == "up" else 1
        for tile in several:
            if tile.by_memory:
                programs = grid_of(config, name, tile, rows)[0]
                sums = max(sums, programs * halves * rows * tile.block_n)
    columns = max(shapes(config)[name][0] for name in NAMES)
    met = torch.zeros(-(-columns // 64), dtype=torch.int32, device=device)
    return Between(torch.empty(sums, device=device), met)


def grid_of(config: ModelConfig, name: str, tile: ClusterTile, n: int) -> tuple[int, int]:
    """Return the programs of a product of n rows: along the columns, and along the rows."""
    columns = shapes(config)[name][0]
    return -(-columns // tile.block_n) * tile.split, -(-n // tile_rows(n))


class ClusterProduct:
    """One matrix of a layer for steps of n rows, ready to be enqueued.

    qkv and up take scratch.normed [n, d_model], the residual stream times the norm's scale, with
    the sums in scratch.moments; the first layer's qkv takes it normalised. out and down add to
    scratch.x and leave both for the norm that follows.
    """

    def __init__(
        self, model: Model, scratch: Scratch, index: int, name: str, n: int,
        tile: ClusterTile, kept: Between,
    ) -> None:  # fmt: skip
        c, s, layers = model.config, scratch, model.weights.layers
        layer, rows, ahead = layers[index], tile_rows(n), min(tile.ahead, tile.stages)
        linear = getattr(layer, name)
        following = layers[index + 1].qkv if index + 1 < len(layers) else model.weights.head
        after = {"out": layer.up.norm, "down": following.norm}.get(name)
        first = name == "qkv" and not index
        normed = name == "up" or (name == "qkv" and not first)
        gamma, given = (None, 1.0) if after is None else (after.gamma, after.scale)
        taken = 1 / linear.norm.scale if normed and linear.norm else 1.0
        x = {"out": s.attended, "down": s.hidden}.get(name, s.normed)[:n]
        out = {"qkv": s.qkv, "up": s.hidden}.get(name, s.normed)
        columns, inner = shapes(c)[name]
        defined = macros(c, model.dtype, name, tile, rows, first=first)
        self._kernel = cuda_hopper.load(KERNEL, defined, threads=threads(tile), device=s.x.device)
        wide, high = grid_of(c, name, tile, n)
        if tile.by_memory and wide > programs_of(s.x.device) * self._kernel.resident:
            raise EngineError(
                f"{name}'s {wide} programs wait for each other and are more than this GPU holds; "
                "build again with --set tune true, or with --set tune false to do without"
            )
        self._grid, self._cluster = (wide, high), tile.split
        rows_apart = 1
        if tile.by_memory:  # the programs of a tile of rows wait for each other
            self._grid, self._cluster, rows_apart = (wide, 1), 1, high
        self._chained, self._kept = model.chained, kept
        bias = linear.folded_bias if normed else linear.bias
        chunks = x.view(n, -1, CHUNK).transpose(0, 1)
        pointers = (bias, linear.column_sum, s.moments, s.x, out, gamma, s.moments, kept.parts,
                    kept.met)  # fmt: skip
        fixed = (
            tensor_map(linear.weight, (CHUNK, tile.block_n)),
            tensor_map(chunks, (CHUNK, rows, 1)), tensor_map(chunks, (CHUNK, rows, ahead)),
            *(None if t is None else t.data_ptr() for t in pointers),
            n, columns, inner // CHUNK, -(-inner // TOLD), inner,
        )  # fmt: skip
        self._arguments = [
            _Arguments(*fixed, row_tile, given, taken) for row_tile in range(rows_apart)
        ]

    def enqueue(self) -> None:
        """Launch it on the current stream."""
        stream = torch.cuda.current_stream().cuda_stream
        for arguments in self._arguments:
            self._kernel.launch_clusters(
                self._grid, self._cluster, stream, arguments, chained=self._chained
            )


def layer_products(model: Model, scratch: Scratch, n: int) -> list[list[ClusterProduct]]:
    """Return the products of every layer, in the order of NAMES."""
    rows = tile_rows(n)
    tiles = model.tuning.cluster[str(rows)]
    if rows not in model.between:
        every = {name: [tile] for name, tile in tiles.items()}
        model.between[rows] = between(model.config, every, rows, scratch.x.device)
    kept = model.between[rows]
    return [
        [ClusterProduct(model, scratch, index, name, n, tiles[name], kept) for name in NAMES]
        for index in range(model.config.n_layer)
    ]
