"""What a running batch keeps on the device: cache, rows, and scratch that graphs point into."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from porttool.config import ModelConfig

HISTORY = 256
"""Greedy tokens a row may leave on the device before the host collects them."""


@dataclass(frozen=True)
class Rows:
    """The rows of one step: int32 [rows] each; a negative slot is padding."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    cursor: Tensor
    history: Tensor  # [rows, HISTORY]
    fed: Tensor  # [3, rows]: tokens, positions and slots lie in it


@dataclass(frozen=True)
class Scratch:
    """Activations between the kernels of a step."""

    x: Tensor  # [rows, d_model] float32: the residual stream
    normed: Tensor  # [rows, d_model]
    qkv: Tensor  # [rows, qkv_dim]
    attended: Tensor  # [rows, n_head * head_dim]
    hidden: Tensor  # [rows, d_ff]
    delta: Tensor  # float32 sums [split, rows, columns] that the next kernel adds
    sum: Tensor  # [rows, d_model]: the same from the library's products
    moments: Tensor  # up to [d_model / 64, rows, 2] float32: sums of x and x squared, by tiles
    gates: Tensor  # [rows, up_dim] of a gated MLP, before its activation
    part: Tensor  # [rows, n_head, splits, head_dim] float32
    weight: Tensor  # [rows, n_head, splits] float32
    best: Tensor  # [rows * programs of the head] float32
    where: Tensor  # the same, int32


@dataclass(frozen=True)
class Between:
    """What all products in clusters for so many rows of a tile keep between them.

    parts: float32 sums that go through memory; met: int32, zeros, where the programs of a tile meet
    that left them. They wait for each other, so that no other step of such products may run on the
    GPU at the same time.
    """

    parts: Tensor
    met: Tensor


def make_rows(n: int, device: str) -> Rows:
    """Allocate the state of n rows, all of them padding."""

    n = -(-n // 4) * 4  # in whole 16 bytes: kernels compile for addresses
    fed, cursor, history = (
        torch.zeros(shape, dtype=torch.int32, device=device)
        for shape in ((3, n), (n,), (n, HISTORY))
    )
    fed[2] = -1
    return replace(rows_of(fed), cursor=cursor, history=history)


def rows_of(fed: Tensor) -> Rows:
    """Return a prompt's tokens as rows: [3, tokens] of tokens, positions and slots.

    They leave no history.
    """
    return Rows(fed[0], fed[1], fed[2], cursor=fed[0], history=fed[0], fed=fed)


def make_scratch(
    config: ModelConfig, n: int, *, splits: int, sums: int, n_best: int, dtype: torch.dtype,
    device: str,
) -> Scratch:  # fmt: skip
    """Allocate scratch for n rows, `splits` parts of attention and `sums` elements a row."""
    c = config

    def new(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(n, *shape, dtype=kind, device=device)

    return Scratch(
        x=new(c.d_model),
        normed=new(c.d_model, kind=dtype),
        qkv=new(c.qkv_dim, kind=dtype),
        attended=new(c.n_head * c.head_dim, kind=dtype),
        hidden=new(c.d_ff, kind=dtype),
        delta=new(sums),
        sum=new(c.d_model, kind=dtype),
        moments=new(-(-c.d_model // 64), 2),
        gates=new(c.up_dim if c.gated else 1, kind=dtype),
        part=new(c.n_head, splits, c.head_dim),
        weight=new(c.n_head, splits),
        best=new(n_best),
        where=new(n_best, kind=torch.int32),
    )


@dataclass(frozen=True)
class DeviceCache:
    """Keys and values, [n_layer, n_slots, n_kv_head, capacity, head_dim] each."""

    keys: Tensor
    values: Tensor

    @property
    def capacity(self) -> int:
        """Positions a slot holds."""
        return self.keys.shape[3]

    def copy_slots(self, source: Tensor, target: Tensor) -> None:
        """Copy whole slots as if at once, one layer at a time to bound the temporary memory."""
        for layer in range(self.keys.shape[0]):
            self.keys[layer, target] = self.keys[layer, source]
            self.values[layer, target] = self.values[layer, source]


def rotary_tables(config: ModelConfig, length: int, device: str) -> tuple[Tensor, Tensor]:
    """Cosine and sine [length, rotary_dim / 2] in float32 (Su et al. 2021, section 3.2.2)."""
    if config.position != "rotary":
        empty = torch.zeros(1, device=device)
        return empty, empty
    steps = torch.arange(0, config.rotary_dim, 2, dtype=torch.float64)
    frequency = 1.0 / config.rotary_base ** (steps / config.rotary_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angles.cos().float().to(device), angles.sin().float().to(device)
