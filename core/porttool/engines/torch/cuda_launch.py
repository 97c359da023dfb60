"""Launching the kernels of a decode step, each so that it overlaps its neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from porttool.config import ModelConfig
from porttool.engines.torch.cuda_library import activated_product, product
from porttool.engines.torch.cuda_prompt_attention import PromptAttention
from porttool.engines.torch.cuda_state import Between, DeviceCache, Rows, Scratch
from porttool.engines.torch.cuda_tuning import (
    AttentionTile,
    StreamTile,
    Tuning,
    WideTile,
    head_block,
    power_of_two,
    tile_rows,
)
from porttool.engines.torch.cuda_weights import (
    DecoderWeights,
    LayerWeights,
    Linear,
    NormWeights,
)
from porttool.engines.torch.kernels.attention import (
    decode_attention,
    group_attention,
    merge_kernel,
)
from porttool.engines.torch.kernels.linear import stream_linear
from porttool.engines.torch.kernels.norm import blocking, residual_norm_kernel
from porttool.engines.torch.kernels.prefill import append_kernel
from porttool.engines.torch.kernels.staged import staged_linear
from porttool.engines.torch.kernels.staged_attention import (
    staged_attention,
    staged_group_attention,
)
from porttool.engines.torch.kernels.token import embed_kernel, pick_kernel
from porttool.engines.torch.kernels.wide import wide_linear

EVICT = "evict_first"
"""Weights pass through the L2 cache first out, so that code, norms and activations stay in it."""

AHEAD = 4
"""Cache lines of each weight row that a product asks for before its predecessor ends."""


@dataclass(frozen=True)
class Model:
    """What every kernel launch needs to know, fixed once a decoder is loaded."""

    config: ModelConfig
    weights: DecoderWeights
    cache: DeviceCache
    cosine: Tensor
    sine: Tensor
    tuning: Tuning
    dtype: torch.dtype
    chained: bool  # programmatic dependent launch; off under the interpreter
    shared: int  # bytes of shared memory that a program may take
    prompts: PromptAttention | None = None  # for Hopper, where it runs
    between: dict[int, Between] = field(default_factory=dict)  # by rows of a tile

    @property
    def rotary(self) -> int:
        """Rotated elements of a head, 0 with learned positions."""
        return self.config.rotary_dim if self.config.position == "rotary" else 0

    @property
    def precision(self) -> str:
        """How tl.dot multiplies: float32 stays float32."""
        return "ieee" if self.dtype == torch.float32 else "tf32"

    @property
    def launch(self) -> dict[str, Any]:
        """Options of every launch in the chain."""
        return {"launch_pdl": True} if self.chained else {}


def ranged(layers: Sequence[LayerWeights], *, on_gpu: bool) -> Iterator[tuple[int, LayerWeights]]:
    """Yield layers with their numbers, on a GPU each inside an NVTX range of its name."""
    for index, layer in enumerate(layers):
        if on_gpu:
            torch.cuda.nvtx.range_push(f"layers.{index}")
        try:
            yield index, layer
        finally:
            if on_gpu:
                torch.cuda.nvtx.range_pop()


def embed(model: Model, rows: Rows, x: Tensor, n: int, table: Tensor | None) -> None:
    """Write the residual stream of n tokens."""
    c, w = model.config, model.weights
    embed_kernel[(n,)](
        rows.tokens, rows.positions, w.embedding if table is None else table, w.embedding,
        w.embedding if w.position is None else w.position, x, c.vocab_size, c.n_positions,
        D=c.d_model, BLOCK=power_of_two(c.d_model), LEARNED=w.position is not None,
        PROMPT=table is not None, PDL=False, num_warps=4,
    )  # fmt: skip


@dataclass(frozen=True)
class Projected:
    """Queries, keys and values of a step: [rows, qkv_dim], or `parts` float32 sums of them.

    `bias` [qkv_dim] is what is still to be added to the sum of the parts.
    """

    value: Tensor
    bias: Tensor | None = None
    parts: int = 1

    def arguments(self, model: Model, n: int) -> dict[str, Any]:
        """What a kernel is told of it, for a step of n rows."""
        return {
            "bias": self.value if self.bias is None else self.bias, "PARTS": self.parts,
            "HAS_BIAS": self.bias is not None, "stride": n * model.config.qkv_dim,
        }  # fmt: skip


def attend(
    model: Model, rows: Rows, layer: int, scratch: Scratch, tile: AttentionTile, n: int,
    qkv: Projected, *, append: bool = True,
) -> None:  # fmt: skip
    """Attention of n single positions; leaves parts, or the average where nothing is split.

    Without `append` it begins when its predecessor has ended: that one writes keys of this step,
    which would otherwise be read before the wait that makes them visible.
    """
    c, s = model.config, scratch
    options: dict[str, Any] = dict(
        HEADS=c.n_head, KV=c.n_kv_head, DIM=c.head_dim, ROTARY=model.rotary,
        BLOCK_D=head_block(c.head_dim), BLOCK_T=tile.block_t, SPLITS=tile.splits,
        STAGES=tile.stages, APPEND=append, PDL=model.chained, num_warps=tile.warps,
        keys=model.cache.keys[layer], values=model.cache.values[layer], slots=rows.slots,
        positions=rows.positions, cosine=model.cosine, sine=model.sine, part=s.part,
        weight=s.weight, out=s.attended, scale=c.layer_scale(layer),
        capacity=model.cache.capacity, **qkv.arguments(model, n),
        **(model.launch if append else {}),
    )  # fmt: skip
    grid = (tile.splits, c.n_kv_head, n)
    group = max(16, power_of_two(c.n_head // c.n_kv_head))
    alone = c.n_head == c.n_kv_head
    if tile.staged and alone:
        staged_attention[grid](qkv.value, **options)
    elif tile.staged:
        staged_group_attention[grid](qkv.value, BLOCK_G=group, **options)
    elif alone:
        decode_attention[grid](qkv.value, EVICT=EVICT, **options)
    else:
        options |= {"BLOCK_G": group, "PRECISION": model.precision, "EVICT": EVICT}
        group_attention[grid](qkv.value, **options)


def merge(model: Model, scratch: Scratch, splits: int, n: int) -> None:
    """Join split attention's parts of n rows."""
    c = model.config
    block_d = head_block(c.head_dim)
    block_h = max(1, 512 // block_d)
    merge_kernel[(-(-c.n_head // block_h), n)](
        scratch.part, scratch.weight, scratch.attended, HEADS=c.n_head, DIM=c.head_dim,
        SPLITS=splits, BLOCK_H=block_h, BLOCK_D=block_d, PDL=model.chained, num_warps=4,
        **model.launch,
    )  # fmt: skip


def append(model: Model, rows: Rows, layer: int, qkv: Projected, query: Tensor, n: int) -> None:
    """Put n packed tokens' keys and values in the cache, and rotated queries in `query`.

    Whole queries without rotation are right as they are: then `query` is left alone.
    """
    c = model.config
    block_d = head_block(c.head_dim)
    first = 0 if model.rotary or qkv.parts > 1 else c.n_head
    heads = c.n_head + 2 * c.n_kv_head - first
    block_h = min(max(1, 2048 // block_d), power_of_two(heads))
    append_kernel[(-(-heads // block_h), n)](
        qkv.value, query=query, keys=model.cache.keys[layer], values=model.cache.values[layer],
        slots=rows.slots, positions=rows.positions, cosine=model.cosine, sine=model.sine,
        capacity=model.cache.capacity, HEADS=c.n_head, KV=c.n_kv_head, DIM=c.head_dim,
        ROTARY=model.rotary, FIRST=first, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=4,
        **qkv.arguments(model, n),
    )  # fmt: skip


def pick(model: Model, rows: Rows, scratch: Scratch, n: int, n_best: int) -> None:
    """Choose greedy tokens from the head's maxima and embed them for the next step."""
    c, w, s = model.config, model.weights, scratch
    pick_kernel[(n,)](
        s.best, s.where, n_best, rows.tokens, rows.positions, rows.cursor, rows.history,
        rows.history.shape[1], w.embedding, w.embedding if w.position is None else w.position,
        s.x, c.vocab_size, c.n_positions, D=c.d_model, BLOCK=power_of_two(c.d_model),
        LEARNED=w.position is not None, SCAN=min(4096, power_of_two(n_best)),
        PDL=model.chained, num_warps=8, **model.launch,
    )  # fmt: skip


def residual_norm(
    model: Model, x: Tensor, delta: Tensor | None, bias: Tensor | None, norm: NormWeights,
    out: Tensor, *, parts: int = 1, early: bool = True, chained: bool | None = None,
) -> None:  # fmt: skip
    """x += the sum of delta's parts + bias; out = norm(x). Rows of d_model, in place on x."""
    rows, width = x.shape
    chained = model.chained if chained is None else chained
    residual_norm_kernel[(rows,)](
        x, x if delta is None else delta, norm.gamma if bias is None else bias, norm.gamma,
        norm.gamma if norm.beta is None else norm.beta, out, model.config.norm_eps, rows,
        D=width, PARTS=0 if delta is None else parts,
        HAS_BIAS=bias is not None, RMS=model.config.norm == "rmsnorm",
        HAS_BETA=norm.beta is not None, PDL=chained, EARLY=early,
        **blocking(width, x.element_size()), **(model.launch if chained else {}),
    )  # fmt: skip


def stream(
    model: Model, scratch: Scratch, linear: Linear, tile: StreamTile, n: int, x: Tensor,
    out: Tensor | None, *, act: str = "none", best: bool = False, splits: int = 0,
    early: bool = True,
) -> None:  # fmt: skip
    """Stream one matrix past n rows, one by one; without `out` and `best` adds to scratch.x."""
    s, c = scratch, model.config
    columns, inner = linear.weight.shape
    columns //= 2 if linear.gated else 1
    bias = linear.bias if linear.norm is None else linear.folded_bias
    norm = "none"
    if linear.norm is not None:
        norm = "rmsnorm" if c.norm == "rmsnorm" else "layernorm"
    stream_linear[(-(-columns // tile.block_n),)](
        x, linear.weight, s.x if bias is None else bias,
        s.x if linear.column_sum is None else linear.column_sum,
        s.x if linear.norm is None else linear.norm.gamma,
        s.x, s.x if out is None else out, s.best, s.where, s.part, s.weight, n,
        c.norm_eps, N=columns, K=inner, NORM=norm, GATED=linear.gated, ACT=act,
        HAS_BIAS=bias is not None,
        RESIDUAL=out is None and not best, STORE=out is not None, BEST=best,
        HEADS=c.n_head, DIM=c.head_dim,
        SPLITS=splits, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        HELD=min(tile.held, -(-inner // tile.block_k)), PDL=model.chained, EARLY=early,
        EVICT=EVICT,
        num_warps=tile.warps, **model.launch,
    )  # fmt: skip


def wide(
    model: Model, scratch: Scratch, linear: Linear, tile: WideTile, n: int, x: Tensor,
    out: Tensor | None, *, act: str = "none", best: bool = False,
) -> None:  # fmt: skip
    """Multiply n rows. With a split, or without `out` and `best`, sums stay in scratch.delta.

    Those are tile.split sums [n, columns] in float32, without the bias.
    """
    s = scratch
    if tile.block_n == 0:
        library(s, linear, n, x, out, act)
        return
    columns, inner = linear.weight.shape
    columns //= 2 if linear.gated else 1
    block_m = tile_rows(n)
    delta = tile.split > 1 or (out is None and not best)
    biased = linear.bias is not None and not delta
    grid = (-(-columns // tile.block_n), tile.split, -(-n // block_m))
    options: dict[str, Any] = dict(
        N=columns, K=inner, GATED=linear.gated, ACT=act, HAS_BIAS=biased, SPLIT=tile.split,
        BLOCK_M=block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, PDL=model.chained,
        STAGES=tile.stages_within(model.shared, block_m, model.dtype.itemsize, gated=linear.gated),
        num_warps=tile.warps, **model.launch,
    )  # fmt: skip
    bias = linear.bias if biased else s.x
    result = s.delta if out is None else out
    if tile.staged:
        staged_linear[grid](x, linear.weight, bias, result, s.delta, n, **options)
        return
    wide_linear[grid](
        x, linear.weight, bias, result, s.delta, s.best, s.where, n,
        STORE=delta or out is not None, BEST=best, AHEAD=AHEAD, PRECISION=model.precision,
        EVICT=EVICT, **options,
    )  # fmt: skip


def library(
    scratch: Scratch, linear: Linear, n: int, x: Tensor, out: Tensor | None, act: str
) -> None:
    """As `wide`, by the library's matrix product; without `out` leaves one sum in scratch.sum."""
    if out is None:
        product(linear, x[:n], scratch.sum[:n], biased=False)
    elif act == "none":
        product(linear, x[:n], out[:n])
    else:
        gates = scratch.gates if linear.gated else out
        activated_product(linear, x[:n], gates[:n], out[:n], act)
