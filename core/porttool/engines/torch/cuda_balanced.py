"""Attention of several rows in which who is done with a head draws the next: `hopper/attend.cu`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from porttool.config import ModelConfig
from porttool.engines.torch import cuda_hopper
from porttool.engines.torch.cuda_launch import Model, Projected
from porttool.engines.torch.cuda_persistent import programs_of
from porttool.engines.torch.cuda_state import Rows, Scratch
from porttool.engines.torch.cuda_tuning import AttentionTile

KERNEL = "balanced_attention"
_DIMS = (64, 128, 256)


def unsuited(config: ModelConfig, dtype: torch.dtype, device: str) -> str | None:
    """Say why this attention cannot run a model on a device, or None."""
    return cuda_hopper.unsuited(dtype, device) or unfit(config)


def unfit(config: ModelConfig) -> str | None:
    """Say why a model's heads do not suit this attention, or None."""
    if config.head_dim not in _DIMS:
        return f"its heads have {config.head_dim} elements, not 64, 128 or 256"
    return "its heads share keys" if config.n_head != config.n_kv_head else None


def macros(
    config: ModelConfig, dtype: torch.dtype, tile: AttentionTile, *, parts: int = 1,
    has_bias: bool = False,
) -> dict[str, object]:  # fmt: skip
    """Return what the kernel's source finds defined.

    qkv comes in `parts` sums, to which a bias may still have to be added.
    """
    c = config
    return {
        "HEADS": c.n_head, "DIM": c.head_dim, "SLOT": tile.block_t, "SLOTS": tile.stages,
        "ROTARY": c.rotary_dim if c.position == "rotary" else 0, "WARPS": tile.warps,
        "PARTS": parts, "HAS_BIAS": int(has_bias), "BF16": int(dtype == torch.bfloat16),
        "SHARED": shared(c, tile),
    }  # fmt: skip


def shared(config: ModelConfig, tile: AttentionTile) -> int:
    """Bytes of shared memory of a program."""
    ring = tile.stages * (4 * tile.block_t * config.head_dim + 16)
    return ring + 8 * (2 * config.head_dim + tile.warps * (config.head_dim + 2)) + 256


def threads(tile: AttentionTile) -> int:
    """Threads of a program: those that compute, three warps that fetch, ask and join."""
    return 32 * tile.warps + 96


class _Arguments(ctypes.Structure):
    """The kernel's `Arguments`."""

    _fields_ = (
        *((name, ctypes.c_void_p)
          for name in ("qkv", "bias", "keys", "values", "slots", "positions", "cosine", "sine",
                       "drawn", "out")),
        ("capacity", ctypes.c_longlong), ("rows", ctypes.c_int), ("scale", ctypes.c_float),
    )  # fmt: skip


class BalancedAttention:
    """One layer's attention for steps of n rows, ready to be enqueued.

    drawn: an int32 of zero that no other kernel uses at the same time; it is zero afterwards.
    """

    def __init__(
        self, model: Model, rows: Rows, scratch: Scratch, layer: int, n: int, tile: AttentionTile,
        qkv: Projected, drawn: Tensor,
    ) -> None:  # fmt: skip
        c, cache = model.config, model.cache
        defined = macros(c, model.dtype, tile, parts=qkv.parts, has_bias=qkv.bias is not None)
        self._kernel = cuda_hopper.load(KERNEL, defined, threads=threads(tile),
                                        device=drawn.device)  # fmt: skip
        self._programs = programs_of(drawn.device) * self._kernel.resident
        self._chained = model.chained
        tensors = (qkv.value, qkv.bias, cache.keys[layer], cache.values[layer], rows.slots,
                   rows.positions, model.cosine, model.sine, drawn, scratch.attended)  # fmt: skip
        self._arguments = _Arguments(
            *(None if t is None else t.data_ptr() for t in tensors),
            cache.capacity, n, c.layer_scale(layer),
        )  # fmt: skip

    def enqueue(self) -> None:
        """Launch it on the current stream."""
        self._kernel.launch_clusters(
            (self._programs, 1), 1, torch.cuda.current_stream().cuda_stream, self._arguments,
            chained=self._chained,
        )  # fmt: skip
