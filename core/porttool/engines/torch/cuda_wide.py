"""Steps of more than 16 tokens: library matrix products between fused Triton kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from porttool.engines.torch.cuda_skinny import Model
from porttool.engines.torch.cuda_tuning import power_of_two
from porttool.engines.torch.cuda_weights import Linear, NormWeights
from porttool.engines.torch.kernels.activation import activate_kernel
from porttool.engines.torch.kernels.norm import residual_norm_kernel
from porttool.engines.torch.kernels.prefill import prefill_attention

Attend = Callable[[int, Tensor], Tensor]
"""Map a layer's index and its qkv [tokens, qkv_dim] to [tokens, n_head * head_dim]."""


def residual_norm(
    x: Tensor, delta: Tensor | None, norm: NormWeights, *, eps: float, rms: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x += delta in place (nothing is added without one); return norm(x) in `dtype`.

    x, delta and the result are [rows, d_model]; statistics are float32.
    """
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    block = power_of_two(width)
    residual_norm_kernel[(x.numel() // width,)](
        x, x if delta is None else delta, norm.gamma,
        norm.gamma if norm.beta is None else norm.beta, out, eps,
        D=width, BLOCK=block, RESIDUAL=delta is not None, RMS=rms,
        HAS_BETA=norm.beta is not None, num_warps=min(max(block // 512, 1), 8),
    )  # fmt: skip
    return out


def activation(hidden: Tensor, kind: str, *, gated: bool) -> Tensor:
    """Activate [tokens, up_dim]; in place, or into [tokens, up_dim / 2] when gated."""
    width = hidden.shape[1] // (2 if gated else 1)
    out = hidden.new_empty(hidden.shape[0], width) if gated else hidden
    activate_kernel[(-(-out.numel() // 2048),)](
        hidden, out, out.numel(), HALF=width, GATED=gated, KIND=kind, BLOCK=2048, num_warps=8
    )
    return out


def wide_layers(model: Model, x: Tensor, attend: Attend) -> Tensor:
    """Run the residual stream x [tokens, d_model] through every layer and the final norm."""
    c, delta = model.config, None

    def normed(linear: Linear) -> Tensor:
        if linear.norm is None:
            raise AssertionError("a projection of the residual stream has a norm")
        rms = c.norm == "rmsnorm"
        return residual_norm(x, delta, linear.norm, eps=c.norm_eps, rms=rms, dtype=model.dtype)

    for index, w in enumerate(model.weights.layers):
        qkv = F.linear(normed(w.qkv), w.qkv.weight, w.qkv.bias)
        attended = attend(index, qkv)
        del qkv
        delta = F.linear(attended, w.out.weight, w.out.bias)
        hidden = F.linear(normed(w.up), w.up.weight, w.up.bias)
        hidden = activation(hidden, c.activation, gated=c.gated)
        delta = F.linear(hidden, w.down.weight, w.down.bias)
        del hidden
    return normed(model.weights.head)


def wide_logits(normed: Tensor, weight: Tensor) -> Tensor:
    """float32 logits [tokens, vocab_size] of normalised states; products stay unrounded."""
    if normed.is_cuda and normed.dtype != torch.float32:
        return torch.mm(normed, weight.t(), out_dtype=torch.float32)
    return F.linear(normed.float(), weight.float())


def attend_packed(
    model: Model, layer: int, query: Tensor, slots: Tensor, starts: Tensor, first: Tensor,
    longest: int,
) -> Tensor:  # fmt: skip
    """Causal attention of packed queries over the cache, which holds their keys already."""
    c = model.config
    out = torch.empty_like(query)
    block_d = power_of_two(c.head_dim)
    block_q, block_t, warps, stages = _attention_blocks(block_d, model.dtype)
    prefill_attention[(-(-longest // block_q), c.n_head, slots.shape[0])](
        query, model.cache.keys[layer], model.cache.values[layer], slots, starts, first, out,
        c.layer_scale(layer), model.cache.capacity, HEADS=c.n_head, KV=c.n_kv_head,
        DIM=c.head_dim, BLOCK_D=block_d, BLOCK_Q=block_q, BLOCK_T=block_t,
        PRECISION=model.precision, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _attention_blocks(block_d: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Queries and keys a program holds, warps and stages, within shared memory."""
    if dtype == torch.float32:
        return (32, 32, 4, 1) if block_d > 64 else (64, 32, 4, 2)
    if block_d > 128:
        return 64, 64, 4, 2
    return (128, 128, 8, 2) if block_d == 128 else (128, 64, 4, 3)
