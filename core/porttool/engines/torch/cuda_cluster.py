"""Products of several rows by clusters of programs that share the work: `hopper/linear.cu`."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from porttool.config import ModelConfig
from porttool.engines.torch.cuda_compile import (
    CompiledKernel,
    compile_cubin,
    tensor_map,
)
from porttool.engines.torch.cuda_launch import Model
from porttool.engines.torch.cuda_state import Scratch
from porttool.engines.torch.cuda_tuning import ClusterTile, tile_rows
from porttool.engines.torch.cuda_weights import LayerWeights, Linear, NormWeights

ARCH = "sm_90a"
CHUNK = 64  # elements of the inner dimension in a slot: 128 bytes
_SOURCES = Path(__file__).parent / "hopper"


class _Arguments(ctypes.Structure):
    """The kernel's `Arguments`, padded to its alignment."""

    _fields_ = (
        *((name, ctypes.c_uint64 * 16) for name in ("weights", "inputs", "first_inputs")),
        *((name, ctypes.c_void_p)
          for name in ("bias", "column_sum", "heard", "x", "out", "gamma", "told")),
        *((name, ctypes.c_int) for name in ("rows", "columns", "chunks", "heard_tiles", "width")),
        ("padding", ctypes.c_byte * 52),
    )  # fmt: skip


def macros(
    config: ModelConfig, dtype: torch.dtype, tile: ClusterTile, rows: int, *, gated: bool,
    norm: bool, residual: bool, activated: bool,
) -> dict[str, object]:  # fmt: skip
    """Return what the kernel's source finds defined for one kind of product."""
    return {
        "BLOCK_M": rows, "BLOCK_N": tile.block_n, "SPLIT": tile.split, "STAGES": tile.stages,
        "AHEAD": min(tile.ahead, tile.stages), "EAGER": int(tile.eager), "GATED": int(gated), "NORM": int(norm),
        "RESIDUAL": int(residual), "ACTIVATED": int(activated),
        f"ACT_{config.activation}": 1, "BF16": int(dtype == torch.bfloat16),
        "RMS": int(config.norm == "rmsnorm"), "EPS": f"{config.norm_eps!r}f",
        "SHARED": tile.shared(rows, gated=gated, residual=residual),
    }  # fmt: skip


def compile_product(defined: dict[str, object]) -> bytes:
    """Compile the kernel; CompilerUnavailable says why that cannot be."""
    source = "\n".join((_SOURCES / name).read_text() for name in ("machine.cuh", "linear.cu"))
    return compile_cubin(source, name="cluster_linear", arch=ARCH, macros=defined)


@cache
def _kernel(defined: tuple[tuple[str, object], ...], device: int) -> CompiledKernel:
    given: dict[str, Any] = dict(defined)
    with torch.cuda.device(device):
        return CompiledKernel(
            compile_product(given), "cluster_linear", threads=2 * given["BLOCK_N"] + 64,
            shared=given["SHARED"],
        )  # fmt: skip


class ClusterProduct:
    """One matrix of one layer for steps of n rows, ready to be enqueued.

    `heard` is the tile of the product that left `x` and its moments, None for x [n, inner] that
    needs no norm any more. With `after`, the norm that follows, the result is added to the
    residual stream; else it goes to `out`.
    """

    def __init__(
        self, model: Model, scratch: Scratch, linear: Linear, tile: ClusterTile, n: int,
        x: Tensor, out: Tensor, *, heard: ClusterTile | None, after: NormWeights | None = None,
        activated: bool = False,
    ) -> None:  # fmt: skip
        c, s = model.config, scratch
        columns, inner = linear.weight.shape
        columns //= 2 if linear.gated else 1
        rows, ahead = tile_rows(n), min(tile.ahead, tile.stages)
        chunks = x[:n].view(n, -1, CHUNK).transpose(0, 1)
        defined = macros(
            c, model.dtype, tile, rows, gated=linear.gated, norm=heard is not None,
            residual=after is not None, activated=activated,
        )  # fmt: skip
        self._kernel = _kernel(tuple(defined.items()), x.device.index or 0)
        self._grid = (-(-columns // tile.block_n) * tile.split, -(-n // rows))
        self._cluster, self._chained = tile.split, model.chained
        bias = linear.bias if heard is None else linear.folded_bias
        self._arguments = _Arguments(
            tensor_map(linear.weight, (CHUNK, tile.block_n)),
            tensor_map(chunks, (CHUNK, rows, 1)), tensor_map(chunks, (CHUNK, rows, ahead)),
            *(None if t is None else t.data_ptr() for t in (
                bias, linear.column_sum, s.moments, s.x, out,
                None if after is None else after.gamma, s.moments)),
            n, columns, inner // CHUNK, -(-inner // heard.block_n) if heard else 0, inner,
        )  # fmt: skip
        self._kept = linear, x, out, s  # what the arguments point into

    def enqueue(self) -> None:
        """Launch it on the current stream."""
        stream = torch.cuda.current_stream().cuda_stream
        self._kernel.launch_clusters(
            self._grid, self._cluster, stream, self._arguments, chained=self._chained
        )


def layer_products(
    model: Model, scratch: Scratch, layer: LayerWeights, n: int, *, first: bool, last: NormWeights
) -> tuple[ClusterProduct, ...]:
    """Return the products of a layer: qkv, out, up, down.

    The `first` layer finds its input normalised in scratch.normed. `last` is the norm after the
    layer. What each adds to the residual stream it also leaves in scratch.normed, times the next
    norm's scale.
    """
    s, tiles = scratch, model.tuning.cluster[str(tile_rows(n))]
    up_norm = layer.up.norm
    heard = None if first else tiles["down"]

    def product(name: str, x: Tensor, out: Tensor, **options: Any) -> ClusterProduct:
        linear = getattr(layer, name)
        return ClusterProduct(model, s, linear, tiles[name], n, x, out, **options)

    return (
        product("qkv", s.normed, s.qkv, heard=heard),
        product("out", s.attended, s.normed, heard=None, after=up_norm),
        product("up", s.normed, s.hidden, heard=tiles["out"], activated=True),
        product("down", s.hidden, s.normed, heard=None, after=last),
    )
