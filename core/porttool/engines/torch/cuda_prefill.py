"""Prompts: packed tokens, library matrix products between fused Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from porttool.config import ModelConfig
from porttool.engines.torch.cuda_launch import (
    Model,
    Projected,
    append,
    embed,
    ranged,
    residual_norm,
)
from porttool.engines.torch.cuda_library import activated_product, product
from porttool.engines.torch.cuda_packed import Packed
from porttool.engines.torch.cuda_state import Rows
from porttool.engines.torch.cuda_tuning import head_block
from porttool.engines.torch.cuda_weights import Linear
from porttool.engines.torch.kernels.prefill import prefill_attention

PREFILL_TOKENS = (4096, 16384)
"""Prompt tokens that go through the layers together: at least, and at most."""

PREFILL_SHARE = 0.03
"""Of the memory for weights and cache, what a prefill's activations may take in between."""


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


def prefill(model: Model, group: Packed, table: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run packed prompts: normalised states [tokens, d_model], first tokens [rows + 1] int32."""
    device = model.cache.keys.device
    rows, n = group.rows(str(device)), group.n_tokens
    x = torch.empty(n, model.config.d_model, dtype=model.dtype, device=device)
    embed(model, rows, x, n, table)
    slots, starts, first = group.bounds(str(device))
    prompt = Prompt(rows, slots, starts, first, group.width)
    return prefill_layers(model, x, prompt, make_buffers(model, n)), first


def make_buffers(model: Model, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what n tokens leave between the kernels; fewer use the front of each buffer."""
    narrow, broad = _widths(model.config)
    like = model.cache.keys
    first, second, wide = (like.new_empty(n * width) for width in (narrow, narrow, broad))
    return first, second, wide


def prefill_layers(
    model: Model, x: Tensor, prompt: Prompt, buffers: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Run the residual stream x [tokens, d_model] through every layer and the final norm.

    The result [tokens, d_model] is the front of the first buffer.
    """
    c, n = model.config, len(x)
    heads = c.n_head * c.head_dim
    # three buffers: attention's result takes the place of its normalised input, rotated queries
    # that of the sum which the norm has added, the MLP that of the projection
    first, second, wide = buffers
    normed, attended = _rows(first, n, c.d_model), _rows(first, n, heads)
    delta, turned = _rows(second, n, c.d_model), _rows(second, n, heads)
    qkv, gates = _rows(wide, n, c.qkv_dim), _rows(wide, n, c.up_dim)
    hidden = _rows(wide[gates.numel() :], n, c.d_ff) if c.gated else gates
    query = turned if model.rotary else qkv
    before: Linear | None = None
    for index, w in ranged(model.weights.layers, on_gpu=x.is_cuda):
        _norm(model, x, delta, before, w.qkv, normed)
        product(w.qkv, normed, qkv)
        append(model, prompt.rows, index, Projected(qkv), query, n)
        _attend(model, index, query, prompt, attended)
        product(w.out, attended, delta, biased=False)
        _norm(model, x, delta, w.out, w.up, normed)
        activated_product(w.up, normed, gates, hidden, c.activation)
        product(w.down, hidden, delta, biased=False)
        before = w.down
    _norm(model, x, delta, before, model.weights.head, normed)
    return normed


def _rows(flat: Tensor, n: int, columns: int) -> Tensor:
    return flat[: n * columns].view(n, columns)


def activations(config: ModelConfig) -> int:
    """Elements that `prefill_layers` keeps of a token, the residual stream among them."""
    narrow, broad = _widths(config)
    return config.d_model + 2 * narrow + broad


def prefill_tokens(config: ModelConfig, kept: int, itemsize: int) -> int:
    """Return how many tokens go through the layers together beside so many bytes that stay."""
    low, high = PREFILL_TOKENS
    return min(max(int(PREFILL_SHARE * kept / (itemsize * activations(config))), low), high)


def _widths(c: ModelConfig) -> tuple[int, int]:
    """Elements of a token in the two narrow buffers, and in the wide one."""
    return (
        max(c.d_model, c.n_head * c.head_dim),
        max(c.qkv_dim, c.up_dim + (c.d_ff if c.gated else 0)),
    )


def _norm(
    model: Model, x: Tensor, delta: Tensor, before: Linear | None, after: Linear, out: Tensor
) -> None:
    """Add what the matrix `before` left in delta, and its bias; normalise for `after`."""
    if after.norm is None:
        raise AssertionError("a projection of the residual stream has a norm")
    residual_norm(
        model, x, None if before is None else delta, None if before is None else before.bias,
        after.norm, out, chained=False,
    )  # fmt: skip


def project(normed: Tensor, weight: Tensor) -> Tensor:
    """float32 logits [tokens, vocab_size] of normalised states; products stay unrounded."""
    if normed.is_cuda and normed.dtype != torch.float32:
        return torch.mm(normed, weight.t(), out_dtype=torch.float32)
    return F.linear(normed.float(), weight.float())


def _attend(model: Model, layer: int, query: Tensor, prompt: Prompt, out: Tensor) -> None:
    """Causal attention of packed queries over the cache, which holds their keys already."""
    c = model.config
    block_d = head_block(c.head_dim)
    block_q, block_t, warps, stages = _blocks(block_d, model.dtype, model.shared)
    prefill_attention[(-(-prompt.longest // block_q), c.n_head, prompt.slots.shape[0])](
        query, model.cache.keys[layer], model.cache.values[layer], prompt.slots, prompt.starts,
        prompt.first, out, c.layer_scale(layer), model.cache.capacity, query.shape[1],
        HEADS=c.n_head,
        KV=c.n_kv_head, DIM=c.head_dim, BLOCK_D=block_d, BLOCK_Q=block_q, BLOCK_T=block_t,
        PRECISION=model.precision, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _blocks(block_d: int, dtype: torch.dtype, shared: int) -> tuple[int, int, int, int]:
    """Queries and keys a program holds, warps and stages, within its shared memory."""
    if dtype == torch.float32:
        return (32, 32, 4, 1) if block_d > 64 else (64, 32, 4, 2)
    if block_d <= 64:
        return 64, 64, 4, 3
    choices = [(64, 64, 4, 2), (32, 32, 4, 2)]
    if block_d == 128:
        choices.insert(0, (128, 64, 8, 3))
    fitting = (b for b in choices if 2 * block_d * (b[0] + 2 * b[3] * b[1]) <= shared)
    return next(fitting, choices[-1])
