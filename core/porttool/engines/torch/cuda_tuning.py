"""Tile shapes of the decode kernels: defaults by rule, better ones by measurement at build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from porttool.config import ModelConfig

SKINNY_ROWS = 16
"""Up to this many rows a step's result does not depend on how many there are."""


@dataclass(frozen=True)
class Tile:
    """How one skinny linear is cut: `stream` on CUDA cores or `tile` on tensor cores."""

    kind: Literal["stream", "tile"]
    block_n: int
    block_k: int
    warps: int = 4
    groups: int = 1
    stages: int = 4
    held: int = 1
    own: bool = False


@dataclass(frozen=True)
class Tuning:
    """Everything measured for one model on one GPU; `as_dict` goes into the engine's folder.

    `tiles` by linear ("qkv", "out", "up", "down", "head"); `splits` of the context for up to
    SKINNY_ROWS rows; `block_t` positions a program takes at a time; `ahead` bytes of the next
    matrix that each kernel asks into the L2 cache.
    """

    gpu: str
    tiles: Mapping[str, Tile]
    splits: int
    block_t: int
    ahead: int
    early: bool = True
    attention_warps: int = 4
    notes: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for a manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tuning:
        """Read what `as_dict` wrote."""
        tiles = {name: Tile(**tile) for name, tile in data["tiles"].items()}
        return cls(**{**data, "tiles": tiles})


def gpu_name(device: str) -> str:
    """Name the GPU (or "interpreter" on a CPU) that a tuning belongs to."""
    if device == "cpu":
        return "interpreter"
    return torch.cuda.get_device_name(device)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def default_tile(n: int, k: int, *, gated: bool) -> Tile:
    """Cut [n, k] so that about four programs a multiprocessor stream it."""
    block_k = 1024 if k >= 4096 else 512 if k > 512 else max(power_of_two(k), 16)
    block_n = 8 if n >= 8192 and block_k <= 512 else 4
    return Tile("stream", block_n // (2 if gated else 1), block_k)


def default_tuning(config: ModelConfig, device: str) -> Tuning:
    """Return the rule's choice for a model that was not measured."""
    c = config
    shapes = {
        "qkv": (c.qkv_dim, c.d_model),
        "out": (c.d_model, c.n_head * c.head_dim),
        "up": (c.d_ff, c.d_model),
        "down": (c.d_model, c.d_ff),
        "head": (c.vocab_size, c.d_model),
    }
    tiles = {
        name: default_tile(n, k, gated=c.gated and name == "up")
        for name, (n, k) in shapes.items()
    }
    splits = min(max(power_of_two(-(-96 // c.n_kv_head)), 1), 16)
    block_t = 64 if c.head_dim <= 64 else 32
    return Tuning(gpu_name(device), tiles, splits, block_t, ahead=16 << 20)
