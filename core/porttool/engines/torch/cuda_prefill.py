"""Prompts: packed tokens, library matrix products between fused Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from porttool.engines.torch.cuda_launch import (
    Model,
    Projected,
    activation,
    append,
    in_epilogue,
    residual_norm,
)
from porttool.engines.torch.cuda_state import Rows
from porttool.engines.torch.cuda_tuning import head_block
from porttool.engines.torch.cuda_weights import LayerWeights, Linear
from porttool.engines.torch.kernels.prefill import prefill_attention

_EPILOGUE_TOKENS = 2048
"""Up to here a launch saved is worth more than the faster product without an epilogue."""


class Prompt:
    """Packed rows on the device: token i is at rows.positions[i] of slot rows.slots[i].

    slots, starts [n] int32 and first [n + 1] int32 say which packed tokens belong to which row;
    `longest` is the widest row.
    """

    def __init__(
        self, rows: Rows, slots: Tensor, starts: Tensor, first: Tensor, longest: int
    ) -> None:
        self.rows, self.slots, self.starts, self.first = rows, slots, starts, first
        self.longest = longest


def ranged(layers: Sequence[LayerWeights], *, on_gpu: bool) -> Iterator[tuple[int, LayerWeights]]:
    """Yield layers with their numbers, on a GPU each inside an NVTX range of its name."""
    for index, layer in enumerate(layers):
        if on_gpu:
            torch.cuda.nvtx.range_push(f"layers.{index}")
        yield index, layer
        if on_gpu:
            torch.cuda.nvtx.range_pop()


def prefill_layers(model: Model, x: Tensor, prompt: Prompt) -> Tensor:
    """Run the residual stream x [tokens, d_model] through every layer and the final norm."""
    c = model.config
    delta: Tensor | None = None
    normed = torch.empty(x.shape, dtype=model.dtype, device=x.device)

    def norm(after: Linear) -> None:
        if after.norm is None:
            raise AssertionError("a projection of the residual stream has a norm")
        residual_norm(model, x, delta, None, after.norm, normed, chained=False)

    for index, w in ranged(model.weights.layers, on_gpu=x.is_cuda):
        norm(w.qkv)
        qkv = F.linear(normed, w.qkv.weight, w.qkv.bias)
        query = qkv.new_empty(qkv.shape[0], c.n_head * c.head_dim) if model.rotary else qkv
        append(model, prompt.rows, index, Projected(qkv), query, qkv.shape[0])
        del qkv
        delta = F.linear(_attend(model, index, query, prompt), w.out.weight, w.out.bias)
        norm(w.up)
        hidden = _up(normed, w.up, c.activation)
        delta = F.linear(hidden, w.down.weight, w.down.bias)
        del hidden
    norm(model.weights.head)
    return normed


def _up(normed: Tensor, up: Linear, kind: str) -> Tensor:
    """The MLP's first projection and its activation, in the product's epilogue where it has one."""
    few = normed.shape[0] <= _EPILOGUE_TOKENS
    if few and up.bias is not None and in_epilogue(up, kind, normed):
        return torch._addmm_activation(up.bias, normed, up.weight.t(), use_gelu=True)
    hidden = F.linear(normed, up.weight, up.bias)
    out = hidden.new_empty(hidden.shape[0], hidden.shape[1] // 2) if up.gated else hidden
    activation(hidden, out, kind, gated=up.gated)
    return out


def project(normed: Tensor, weight: Tensor) -> Tensor:
    """float32 logits [tokens, vocab_size] of normalised states; products stay unrounded."""
    if normed.is_cuda and normed.dtype != torch.float32:
        return torch.mm(normed, weight.t(), out_dtype=torch.float32)
    return F.linear(normed.float(), weight.float())


def _attend(model: Model, layer: int, query: Tensor, prompt: Prompt) -> Tensor:
    """Causal attention of packed queries over the cache, which holds their keys already."""
    c = model.config
    out = query.new_empty(query.shape[0], c.n_head * c.head_dim)
    block_d = head_block(c.head_dim)
    block_q, block_t, warps, stages = _blocks(block_d, model.dtype)
    prefill_attention[(-(-prompt.longest // block_q), c.n_head, prompt.slots.shape[0])](
        query, model.cache.keys[layer], model.cache.values[layer], prompt.slots, prompt.starts,
        prompt.first, out, c.layer_scale(layer), model.cache.capacity, query.shape[1],
        HEADS=c.n_head,
        KV=c.n_kv_head, DIM=c.head_dim, BLOCK_D=block_d, BLOCK_Q=block_q, BLOCK_T=block_t,
        PRECISION=model.precision, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _blocks(block_d: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Queries and keys a program holds, warps and stages, within shared memory."""
    if dtype == torch.float32:
        return (32, 32, 4, 1) if block_d > 64 else (64, 32, 4, 2)
    if block_d > 128:
        return 64, 64, 4, 2
    return (128, 128, 8, 2) if block_d == 128 else (128, 64, 4, 3)
