"""Causal self-attention: one to n_head key and value heads, learned or rotary positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from porttool.config import ModelConfig
from porttool.nn.cache import KVCache

if TYPE_CHECKING:
    from porttool.nn.decoder import Step


def rotary_angles(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Angles [..., rotary_dim / 2] of positions [...] (Su et al. 2021, section 3.2.2)."""
    steps = torch.arange(0, config.rotary_dim, 2, dtype=dtype, device=positions.device)
    frequency = 1.0 / config.rotary_base ** (steps / config.rotary_dim)
    return positions[..., None].to(dtype) * frequency


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the first elements of x [n, heads, width, head_dim] by angles [n, width, half].

    Element i is paired with element i + half, as GPT-NeoX does; the tail passes through.
    """
    half = angles.shape[-1]
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


class Attention(nn.Module):
    """softmax(scale * q k^T + causal mask) v (Vaswani et al. 2017), heads shared as configured."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.scale = config.layer_scale(layer)
        self.qkv = nn.Linear(config.d_model, config.qkv_dim, bias=config.qkv_bias)
        self.out = nn.Linear(config.n_head * config.head_dim, config.d_model, bias=config.out_bias)

    def forward(self, x: Tensor, positions: Tensor, cache: KVCache | None, step: Step) -> Tensor:
        """Map x [n, width, d_model] at positions [n, width]; the cache holds what came before."""
        query, key, value = self.project(x, positions)
        if cache is not None:
            key, value = cache.update(self.layer, step, key, value)
        out: Tensor = self.out(self.attend(query, key, value, positions))
        return out

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [n, n_head, width, head_dim], key and value [n, n_kv_head, width, head_dim]."""
        c = self.config
        heads = self.qkv(x).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
        query, key, value = heads.split((c.n_head, c.n_kv_head, c.n_kv_head), dim=1)
        if c.position == "rotary":
            wide = torch.promote_types(x.dtype, torch.float32)
            angles = rotary_angles(c, positions, wide)
            query, key = rotate(query, angles), rotate(key, angles)
        return query, key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        """Weighted values [n, width, n_head * head_dim]; a query sees keys up to its position."""
        wide = torch.promote_types(query.dtype, torch.float32)
        groups = self.config.n_head // self.config.n_kv_head
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
        if self.config.upcast_attention:
            query, key = query.to(wide), key.to(wide)
        scores = (query @ key.transpose(-1, -2)).to(wide) * self.scale  # [n, n_head, width, reach]
        reach = torch.arange(key.shape[2], device=key.device)
        hidden = reach > positions[:, None, :, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).to(value.dtype)
        return (weights @ value).transpose(1, 2).flatten(2)
