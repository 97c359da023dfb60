"""The canonical weights as the GPU's kernels want them: cast, with each norm beside its linear."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from porttool.config import ModelConfig

_ROWS = 4096  # of a weight matrix made float32 at a time

ALIGNMENT = 256
"""Bytes at multiples of which tensors begin: more than any copy or kernel asks for."""


def allocate(
    kinds: Mapping[str, tuple[Sequence[int], torch.dtype]], device: str
) -> dict[str, Tensor]:
    """Return tensors of these shapes and types, unset, all of them in one allocation.

    One by one they would take more: torch's allocator cuts what has 1 to 10 MB from pieces of 20,
    whose ends nothing fits in (3 % of SantaCoder's weights).
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in kinds.values()]
    padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    room = torch.empty(sum(padded), dtype=torch.uint8, device=device).split(padded)
    return {
        name: piece[:size].view(dtype).view(tuple(shape))
        for (name, (shape, dtype)), size, piece in zip(kinds.items(), sizes, room, strict=True)
    }


@dataclass(frozen=True)
class NormWeights:
    """Scale [d_model] and shift [d_model] in float32; layernorm1p's one is added already."""

    gamma: Tensor
    beta: Tensor | None

    @cached_property
    def scale(self) -> float:
        """The power of two that brings the largest scale into (0.5, 1]; 1.0 if all are zero."""
        most = float(self.gamma.abs().max())
        return 2.0 ** -math.ceil(math.log2(most)) if 0 < most < math.inf else 1.0


@dataclass(frozen=True)
class Linear:
    """One matrix [out, in], and the norm in front of it where there is one.

    With a norm, `column_sum` [out] is sum_k gamma_k w_nk and `folded_bias` [out] is
    bias_n + sum_k beta_k w_nk, both float32: what `stream_linear` needs to apply the norm after
    the product.
    """

    weight: Tensor
    bias: Tensor | None
    norm: NormWeights | None = None
    column_sum: Tensor | None = None
    folded_bias: Tensor | None = None
    gated: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.weight.nbytes


@dataclass(frozen=True)
class LayerWeights:
    """The four matrices of a layer, in the order in which they are used."""

    qkv: Linear
    out: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True)
class DecoderWeights:
    """Every tensor of a decoder on its device. A tied head shares the embedding's memory."""

    embedding: Tensor
    position: Tensor | None
    layers: tuple[LayerWeights, ...]
    head: Linear

    def linears(self) -> list[Linear]:
        """All matrices in the order in which a step streams them."""
        layers = [(w.qkv, w.out, w.up, w.down) for w in self.layers]
        return [linear for layer in layers for linear in layer] + [self.head]


def with_norm(linear: Linear, norm: NormWeights) -> Linear:
    """Attach the norm in front of a matrix and sum up its constants."""
    sums, shifts = [], []
    for part in linear.weight.split(_ROWS):
        wide = part.double() if part.device.type == "cpu" else part.float()
        sums.append((wide * norm.gamma).sum(1).float())
        if norm.beta is not None:
            shifts.append((wide * norm.beta).sum(1).float())
    folded = None if linear.bias is None else linear.bias.float()
    if shifts:
        shift = torch.cat(shifts)
        folded = shift if folded is None else folded + shift
    return Linear(linear.weight, linear.bias, norm, torch.cat(sums), folded, linear.gated)


class _Packer:
    """Takes canonical tensors by name and puts them on the device."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, device: str
    ) -> None:
        self.config = config
        self.weights = weights
        self.place: Callable[[Tensor], Tensor] = lambda t: t.to(device, non_blocking=True).to(dtype)
        self.device = device

    def tensor(self, name: str) -> Tensor:
        value = self.place(self.weights[name]).contiguous()
        # kernels read 16 bytes at a time; a view of something else may begin anywhere
        return value.clone() if value.data_ptr() % 16 else value

    def linear(self, name: str, *, bias: bool, gated: bool = False) -> Linear:
        row = self.tensor(f"{name}.bias") if bias else None
        return Linear(self.tensor(f"{name}.weight"), row, gated=gated)

    def norm(self, name: str) -> NormWeights:
        gamma = self.weights[f"{name}.weight"].to(self.device, torch.float32)
        if self.config.norm == "layernorm1p":
            gamma = gamma + 1
        beta = None
        if self.config.norm_bias:
            beta = self.weights[f"{name}.bias"].to(self.device, torch.float32)
        return NormWeights(gamma, beta)

    def layer(self, index: int) -> LayerWeights:
        c, name = self.config, f"layers.{index}"
        qkv = self.linear(f"{name}.attention.qkv", bias=c.qkv_bias)
        up = self.linear(f"{name}.mlp.up", bias=c.mlp_bias, gated=c.gated)
        return LayerWeights(
            with_norm(qkv, self.norm(f"{name}.norm1")),
            self.linear(f"{name}.attention.out", bias=c.out_bias),
            with_norm(up, self.norm(f"{name}.norm2")),
            self.linear(f"{name}.mlp.down", bias=c.mlp_bias),
        )


def pack_weights(
    config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, device: str
) -> DecoderWeights:
    """Put canonical weights on the device in `dtype`; norms and their sums are float32."""
    packer = _Packer(config, weights, dtype, device)
    embedding = packer.tensor("embedding.weight")
    position = packer.tensor("position.weight") if config.position == "learned" else None
    layers = tuple(packer.layer(i) for i in range(config.n_layer))
    table = embedding if config.tied_head else packer.tensor("head.weight")
    head = with_norm(Linear(table, None), packer.norm("norm"))
    return DecoderWeights(embedding, position, layers, head)
