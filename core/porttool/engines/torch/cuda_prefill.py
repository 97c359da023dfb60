"""Prompts: packed tokens, library matrix products between fused Triton kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from porttool.config import ModelConfig
from porttool.engines.torch.cuda_launch import Model, Projected, append, ranged, residual_norm
from porttool.engines.torch.cuda_library import activated_product, product
from porttool.engines.torch.cuda_state import Rows
from porttool.engines.torch.cuda_tuning import head_block
from porttool.engines.torch.cuda_weights import Linear
from porttool.engines.torch.kernels.prefill import prefill_attention

PREFILL_TOKENS = (4096, 16384)
"""Prompt tokens that go through the layers together: at least, and at most."""

PREFILL_SHARE, WHOLE_SHARE = 0.02, 0.025
"""Of the memory for weights and cache, what a prefill's activations may take in between, and what
they may take if all of the tokens then go through an MLP together."""

PRODUCTS = 7e14
"""What a GPU multiplies and adds in a second, twice for each: an H200, 16 bits."""

MLP_TOKENS, MLP_SECONDS = 2048, 70e-6
"""Tokens that an MLP's buffer holds, at least, and how long the GPU shall take for them: fewer
would leave multiprocessors without a tile, or the GPU waiting for the host's next launch."""


class Prompt(NamedTuple):
    """Packed rows on the device: token i is at rows.positions[i] of slot rows.slots[i].

    slots, starts [n] int32 and first [n + 1] int32 say which packed tokens belong to which row;
    `longest` is at least the widest row.
    """

    rows: Rows
    slots: Tensor
    starts: Tensor
    first: Tensor
    longest: int


class Together(NamedTuple):
    """How many tokens go through the layers together, and how many of them through an MLP."""

    tokens: int
    mlp: int


def tokens_together(config: ModelConfig, kept: int, itemsize: int) -> Together:
    """Return what fits, where weights and cache take `kept` bytes."""
    (low, high), (narrow, broad) = PREFILL_TOKENS, _widths(config)
    apart, mlp = itemsize * (config.d_model + narrow), itemsize * _mlp_width(config)
    broad *= itemsize
    tokens = min(max(int(PREFILL_SHARE * kept) // (apart + broad), low), high)
    if tokens * (apart + max(broad, mlp)) <= WHOLE_SHARE * kept:
        return Together(tokens, tokens)
    launched = MLP_SECONDS * PRODUCTS / (2 * config.d_model * (config.up_dim + config.d_ff))
    least = max(MLP_TOKENS, int(launched))
    return Together(tokens, min(max(tokens * broad // mlp, least), tokens))


class Buffers(NamedTuple):
    """What a prompt's tokens leave between the kernels, and x, their residual stream.

    Fewer tokens use the front of each.
    """

    x: Tensor
    first: Tensor
    wide: Tensor


def make_buffers(model: Model, together: Together) -> Buffers:
    """Allocate for so many tokens, in one piece."""
    sizes = _sizes(model.config, together)
    return Buffers(*model.cache.keys.new_empty(sum(sizes)).split(sizes))


def prefill_bytes(config: ModelConfig, kept: int, itemsize: int, rows: int, most: int) -> int:
    """Return the bytes of buffers for so many prompts of up to `most` tokens at once.

    `kept` as above.
    """
    together = tokens_together(config, kept, itemsize)
    tokens = min(together.tokens, most)
    sizes = _sizes(config, Together(tokens, together.mlp)) + _sizes(config, Together(rows, rows))
    return itemsize * sum(sizes)


def _sizes(c: ModelConfig, together: Together) -> tuple[int, int, int]:
    """Elements of the three buffers for so many tokens."""
    n, (narrow, broad) = together.tokens, _widths(c)
    return n * c.d_model, n * narrow, max(n * broad, min(n, together.mlp) * _mlp_width(c))


class _Views(NamedTuple):
    """What the kernels write, of so many tokens, in two buffers beside x.

    What is written takes the place of what has been read, and norms and the MLP work in place.
    """

    x: Tensor
    normed: Tensor
    qkv: Tensor
    query: Tensor  # its first columns
    attended: Tensor
    delta: Tensor
    mlp: list[tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def of(cls, model: Model, n: int, buffers: Buffers) -> _Views:
        """View the front of the buffers.

        Queries stay where they are projected, unless they are rotated; their average goes to the
        other buffer, and the projection of that back, in their place.
        """
        c = model.config
        heads = c.n_head * c.head_dim
        queries, averages = (
            (buffers.first, buffers.wide) if model.rotary else (buffers.wide, buffers.first)
        )
        normed, qkv = _rows(buffers.first, n, c.d_model), _rows(buffers.wide, n, c.qkv_dim)
        return cls(
            _rows(buffers.x, n, c.d_model), normed, qkv,
            _rows(queries, n, heads) if model.rotary else qkv, _rows(averages, n, heads),
            _rows(queries, n, c.d_model), _mlp_views(c, normed, buffers.wide),
        )  # fmt: skip


def prefill_layers(
    model: Model, n: int, prompt: Prompt, buffers: Buffers, *, every: bool
) -> Tensor:
    """Run the residual stream of n tokens in x through every layer and the final norm.

    The result is the front of the first buffer: [n, d_model] of every token or, for less work,
    [rows, d_model] of each row's last one. That alone has to go through the last layer then, but
    for its keys and values.
    """
    c, v = model.config, _Views.of(model, n, buffers)
    before: Linear | None = None
    attend = _attention(model, v.query, prompt, v.attended)
    for index, w in ranged(model.weights.layers, on_gpu=v.x.is_cuda):
        _norm(model, v.x, v.normed, before, w.qkv, v.normed)
        product(w.qkv, v.normed, v.qkv)
        append(model, prompt.rows, index, Projected(v.qkv), v.query, n)
        if index == c.n_layer - 1 and not every:
            prompt, v = _last_tokens(model, prompt, v)
            _attend(model, index, v.query, prompt, v.attended)
        else:
            attend(index)
        product(w.out, v.attended, v.delta, biased=False)
        _norm(model, v.x, v.delta, w.out, w.up, v.normed)
        for rows, gates, hidden in v.mlp:
            activated_product(w.up, rows, gates, hidden, c.activation)
            product(w.down, hidden, rows, biased=False)
        before = w.down
    out = _rows(buffers.first, len(v.x), c.d_model)
    _norm(model, v.x, v.normed, before, model.weights.head, out)
    return out


def _last_tokens(model: Model, prompt: Prompt, v: _Views) -> tuple[Prompt, _Views]:
    """Copy the residual stream and the query of each row's last token to buffers of their own."""
    n, heads = len(prompt.slots), model.config.n_head * model.config.head_dim
    ends = prompt.first[1 : n + 1]
    alone = _Views.of(model, n, make_buffers(model, Together(n, n)))
    alone.x.copy_(v.x[ends - 1])
    alone.query[:, :heads] = v.query[ends - 1, :heads]
    starts = prompt.starts[:n] + ends - prompt.first[:n] - 1
    one_each = torch.arange(n + 1, dtype=torch.int32, device=ends.device)
    return Prompt(prompt.rows, prompt.slots, starts, one_each, 1), alone


def _mlp_views(c: ModelConfig, x: Tensor, wide: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows of x [tokens, d_model] in parts that fit in `wide`, with what the MLP leaves there."""
    out = []
    for part in _parts(len(x), wide.numel() // _mlp_width(c)):
        rows = x[part]
        gates = _rows(wide, len(rows), c.up_dim)
        hidden = _rows(wide[gates.numel() :], len(rows), c.d_ff) if c.gated else gates
        out.append((rows, gates, hidden))
    return out


def _parts(n: int, most: int) -> Iterator[slice]:
    """Cut n rows into parts of at most `most`, about as long as each other, in whole tiles."""
    even = -(-n // -(-n // most))
    size = min(-(-even // 256) * 256, most)
    return (slice(begin, begin + size) for begin in range(0, n, size))


def _rows(flat: Tensor, n: int, columns: int) -> Tensor:
    return flat[: n * columns].view(n, columns)


def _widths(c: ModelConfig) -> tuple[int, int]:
    """Elements of a token in the two buffers, if its MLP takes no more."""
    heads = c.n_head * c.head_dim
    return max(c.d_model, heads), max(c.qkv_dim, heads, c.d_model)


def _mlp_width(c: ModelConfig) -> int:
    """Elements of a token between the MLP's two products."""
    return c.up_dim + (c.d_ff if c.gated else 0)


def _norm(
    model: Model, x: Tensor, delta: Tensor, before: Linear | None, after: Linear, out: Tensor
) -> None:
    """Add what the matrix `before` left in delta, and its bias; normalise for `after`.

    `out` may be delta.
    """
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


def _attention(model: Model, query: Tensor, prompt: Prompt, out: Tensor) -> Callable[[int], None]:
    """Return what runs a layer's causal attention of packed queries over the cache."""
    if model.prompts and model.prompts.suits(len(query)):
        return model.prompts.bind(query, prompt, out)
    return lambda layer: _attend(model, layer, query, prompt, out)


def _attend(model: Model, layer: int, query: Tensor, prompt: Prompt, out: Tensor) -> None:
    """Causal attention of packed queries over the cache, which holds their keys already."""
    c = model.config
    block_d = head_block(c.head_dim)
    block_q, block_t, warps, stages = _blocks(block_d, model.dtype, model.shared)
    group = min(_power_within(c.n_head // c.n_kv_head), 16)
    blocks = -(-prompt.longest * group // block_q)
    prefill_attention[(blocks, c.n_head // group, prompt.slots.shape[0])](
        query, model.cache.keys[layer], model.cache.values[layer], prompt.slots, prompt.starts,
        prompt.first, out, c.layer_scale(layer), model.cache.capacity, query.shape[1],
        HEADS=c.n_head,
        KV=c.n_kv_head, DIM=c.head_dim, BLOCK_D=block_d, BLOCK_Q=block_q, BLOCK_T=block_t,
        GROUP=group, PRECISION=model.precision, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _power_within(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n


def _blocks(block_d: int, dtype: torch.dtype, shared: int) -> tuple[int, int, int, int]:
    """Queries and keys a program holds, warps and stages, within its shared memory."""
    if dtype == torch.float32:
        return (32, 32, 4, 1) if block_d > 64 else (64, 32, 4, 2)
    if block_d <= 64:
        return 64, 64, 4, 3
    choices = [(64, 64, 4, 3), (64, 64, 4, 2), (32, 32, 4, 2)]
    fitting = (b for b in choices if 2 * block_d * (b[0] + 2 * b[3] * b[1]) <= shared)
    return next(fitting, choices[-1])
