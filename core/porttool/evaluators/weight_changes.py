"""Ways to damage canonical weights: each takes a model's tensors and returns others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from porttool.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    Weights = Mapping[str, Tensor]
    WeightChange = Callable[[Weights], Weights]


def noise(share: float) -> WeightChange:
    """Add Gaussian noise of a share of each matrix's standard deviation."""

    def change(weights: Weights) -> Weights:
        import torch

        random = torch.Generator().manual_seed(0)
        result = dict(weights)
        for name, tensor in weights.items():
            if tensor.ndim > 1:
                drawn = torch.randn(tensor.shape, generator=random)
                result[name] = (tensor + share * tensor.float().std() * drawn).to(tensor.dtype)
        return result

    return change


def scrambled(prefix: str) -> WeightChange:
    """Shuffle the entries of every matrix whose name begins with a prefix."""

    def change(weights: Weights) -> Weights:
        import torch

        random = torch.Generator().manual_seed(0)
        result = dict(weights)
        for name, tensor in weights.items():
            if name.startswith(prefix) and tensor.ndim > 1:
                order = torch.randperm(tensor.numel(), generator=random)
                result[name] = tensor.flatten()[order].view_as(tensor)
        return result

    return change


def transposed(name: str) -> WeightChange:
    """Lay a matrix out as if it had not been transposed; a square one keeps its shape."""

    def change(weights: Weights) -> Weights:
        tensor = weights[name]
        return {**weights, name: tensor.t().reshape(tensor.shape).contiguous()}

    return change


def swapped_keys_and_values(config: ModelConfig) -> WeightChange:
    """Exchange keys and values in layer 0's fused projection."""

    def change(weights: Weights) -> Weights:
        import torch

        result = dict(weights)
        for name in first_projection(weights):
            q, k, v = weights[name].split(config.qkv_rows)
            result[name] = torch.cat((q, v, k))
        return result

    return change


def borrowed_head(config: ModelConfig) -> WeightChange:
    """Give layer 0's first group of queries the key and value head of the last group."""

    def change(weights: Weights) -> Weights:
        result = dict(weights)
        for name in first_projection(weights):
            heads = weights[name].unflatten(0, (-1, config.head_dim)).clone()  # [heads, dim, ...]
            for first in (config.n_head, config.n_head + config.n_kv_head):
                heads[first] = heads[first + config.n_kv_head - 1]
            result[name] = heads.flatten(0, 1)
        return result

    return change


def first_projection(weights: Weights) -> list[str]:
    """Return the names of layer 0's fused query, key and value projection."""
    return [name for name in weights if name.startswith("layers.0.attention.qkv.")]


def rounded(levels: int) -> WeightChange:
    """Round every matrix to a symmetric integer grid, one scale a tensor."""

    def change(weights: Weights) -> Weights:
        result = dict(weights)
        for name, tensor in weights.items():
            if tensor.ndim > 1:
                scale = tensor.float().abs().max() / levels
                result[name] = ((tensor.float() / scale).round() * scale).to(tensor.dtype)
        return result

    return change
