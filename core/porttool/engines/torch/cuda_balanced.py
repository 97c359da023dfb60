"""Attention of several rows by the kernels for Hopper GPUs: `hopper/attend.cu`, `attend_group.cu`.

Where heads have keys of their own, a program that is done with a head draws the next one. Where
they share keys, the programs of a cluster take a part of a row's context each and join them.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porttool.config import ModelConfig
from porttool.engines.torch import cuda_hopper
from porttool.engines.torch.cuda_compile import tensor_map
from porttool.engines.torch.cuda_hopper import programs_of
from porttool.engines.torch.cuda_state import Rows, Scratch
from porttool.engines.torch.cuda_tuning import AttentionTile

if TYPE_CHECKING:  # it needs Triton, which a CPU's torch comes without
    from porttool.engines.torch.cuda_launch import Model, Projected

COPIED = 16
"""Positions of a copy where heads share keys; `AttentionTile.stages` counts those of a ring."""

BLOCK = 16
"""Positions that a warp takes at once where heads have keys of their own."""

_DIMS = (64, 128, 256)
_MOST_HEADS = 64  # that share keys


def unsuited(config: ModelConfig, dtype: torch.dtype, device: str) -> str | None:
    """Say why this attention cannot run a model on a device, or None."""
    return cuda_hopper.unsuited(dtype, device) or unfit(config)


def unfit(config: ModelConfig) -> str | None:
    """Say why a model's heads do not suit this attention, or None."""
    if config.head_dim not in _DIMS:
        return f"its heads have {config.head_dim} elements, not 64, 128 or 256"
    if group(config) > _MOST_HEADS:
        return f"more than {_MOST_HEADS} of its heads share keys"
    return None


def group(config: ModelConfig) -> int:
    """Heads that share their keys."""
    return config.n_head // config.n_kv_head


def kernel(config: ModelConfig) -> str:
    """Name the kernel for a model's heads."""
    return "balanced_attention" if group(config) == 1 else "cluster_attention"


def macros(
    config: ModelConfig, dtype: torch.dtype, tile: AttentionTile, *, parts: int = 1,
    has_bias: bool = False,
) -> dict[str, object]:  # fmt: skip
    """Return what the kernel's source finds defined.

    qkv comes in `parts` sums, to which a bias may still have to be added.
    """
    c = config
    own = {"SLOTS": tile.stages, "WARPS": tile.warps}
    shared_keys = {"SPLIT": tile.splits, "RING": tile.stages, "WIDE": tile.warps}
    return {
        "HEADS": c.n_head, "KV": c.n_kv_head, "DIM": c.head_dim,
        "ROTARY": c.rotary_dim if c.position == "rotary" else 0, "PARTS": parts,
        "HAS_BIAS": int(has_bias), "BF16": int(dtype == torch.bfloat16), "SLOT": tile.block_t,
        "SHARED": shared(c, tile), **(own if group(c) == 1 else shared_keys),
    }  # fmt: skip


def shared(config: ModelConfig, tile: AttentionTile) -> int:
    """Bytes of shared memory of a program."""
    dim = config.head_dim
    if group(config) == 1:
        ring = tile.stages * 4 * tile.block_t * dim
        return ring + 16 * tile.stages + 8 * (2 * dim + tile.warps * (dim + 2)) + 256
    tall, share = -(-group(config) // 16), -(-group(config) // tile.splits)
    ring, found = tile.stages * 4 * COPIED * dim, 4 * share * (dim + 4)
    scored = -(-tile.block_t // (8 * tile.warps)) * 8 * tile.warps  # positions, of all warps
    heads = 16 * tall * (2 * dim + 16 + 2 * scored + 16 + 8 * tile.warps)
    beside = found * max(tile.splits - 1, 1) + heads + 4 * dim + 16 * tile.stages + 64
    return (-(-max(ring, tile.splits * found) // 1024) - (-beside // 1024) + 1) * 1024


def threads(config: ModelConfig, tile: AttentionTile) -> int:
    """Threads of a program: those that compute, and warps that fetch, ask or join."""
    if group(config) == 1:
        return 32 * tile.warps + 96
    return 32 * tile.warps * -(-group(config) // 16) + 32


class _Step(ctypes.Structure):
    """The kernels' `Step`."""

    _fields_ = (
        *((name, ctypes.c_void_p)
          for name in ("qkv", "bias", "keys", "values", "slots", "positions", "cosine", "sine",
                       "out")),
        ("capacity", ctypes.c_longlong), ("rows", ctypes.c_int), ("scale", ctypes.c_float),
    )  # fmt: skip


class _Own(ctypes.Structure):
    """The `Arguments` of the kernel for heads with keys of their own."""

    _fields_ = (("step", _Step), ("drawn", ctypes.c_void_p))


class _Group(ctypes.Structure):
    """The `Arguments` of the kernel for heads that share keys, padded to its alignment."""

    _fields_ = (
        ("keys", ctypes.c_uint64 * 16), ("values", ctypes.c_uint64 * 16), ("step", _Step),
        ("padding", ctypes.c_byte * 40),
    )  # fmt: skip


class BalancedAttention:
    """One layer's attention for steps of n rows, ready to be enqueued.

    drawn: an int32 of zero, and zero afterwards, that no other layer uses: it is counted up before
    the predecessor ends. The step's first norm, which lets nobody start before its own predecessor
    has ended, keeps two launches with the same one apart.
    """

    def __init__(
        self, model: Model, rows: Rows, scratch: Scratch, layer: int, n: int, tile: AttentionTile,
        qkv: Projected, drawn: Tensor,
    ) -> None:  # fmt: skip
        c, keys, values = model.config, model.cache.keys[layer], model.cache.values[layer]
        defined = macros(c, model.dtype, tile, parts=qkv.parts, has_bias=qkv.bias is not None)
        self._kernel = cuda_hopper.load(kernel(c), defined, threads=threads(c, tile),
                                        device=drawn.device)  # fmt: skip
        self._chained = model.chained
        tensors = (qkv.value, qkv.bias, keys, values, rows.slots, rows.positions, model.cosine,
                   model.sine, scratch.attended)  # fmt: skip
        step = _Step(*(None if t is None else t.data_ptr() for t in tensors),
                     model.cache.capacity, n, c.layer_scale(layer))  # fmt: skip
        self._arguments: _Own | _Group
        if group(c) == 1:
            self._cluster, self._programs = 1, programs_of(drawn.device) * self._kernel.resident
            self._arguments = _Own(step, drawn.data_ptr())
            return
        self._cluster, self._programs = tile.splits, n * c.n_kv_head * tile.splits
        halves = c.head_dim // 64
        maps = (tensor_map(cached.view(-1, halves, 64).transpose(0, 1), (64, COPIED, halves))
                for cached in (keys, values))  # fmt: skip
        self._arguments = _Group(*maps, step)

    def enqueue(self) -> None:
        """Launch it on the current stream."""
        self._kernel.launch_clusters(
            (self._programs, 1), self._cluster, torch.cuda.current_stream().cuda_stream,
            self._arguments, chained=self._chained,
        )  # fmt: skip
