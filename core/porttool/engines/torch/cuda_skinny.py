"""A step of at most 16 rows: five Triton kernels a layer, each overlapping its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from porttool.config import ModelConfig
from porttool.engines.torch.cuda_state import DeviceCache, Rows, Scratch
from porttool.engines.torch.cuda_tuning import Tile, Tuning, power_of_two
from porttool.engines.torch.cuda_weights import DecoderWeights, Linear
from porttool.engines.torch.kernels.attention import (
    decode_attention,
    group_attention,
    merge_kernel,
)
from porttool.engines.torch.kernels.linear import stream_linear
from porttool.engines.torch.kernels.prefill import append_kernel
from porttool.engines.torch.kernels.tile import tile_linear
from porttool.engines.torch.kernels.token import embed_kernel, pick_kernel

_FUSED_MERGE = 16384
"""Above this many partial sums a row, joining them once is cheaper than in every program."""


@dataclass(frozen=True)
class Parts:
    """Where split attention leaves its sums: scratch, and how many parts there are."""

    splits: int
    part: Tensor
    top: Tensor
    total: Tensor


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
    chained: bool  # programmatic dependent launch and L2 prefetch; off under the interpreter

    @property
    def rotary(self) -> int:
        """Rotated elements of a head, 0 with learned positions."""
        return self.config.rotary_dim if self.config.position == "rotary" else 0

    @property
    def precision(self) -> str:
        """How tl.dot multiplies: float32 stays float32."""
        return "ieee" if self.dtype == torch.float32 else "tf32"


def embed(model: Model, rows: Rows, x: Tensor, n: int, table: Tensor | None) -> None:
    """Write the residual stream of n tokens."""
    c, w = model.config, model.weights
    embed_kernel[(n,)](
        rows.tokens, rows.positions, w.embedding if table is None else table, w.embedding,
        w.embedding if w.position is None else w.position, x, c.vocab_size, c.n_positions,
        D=c.d_model, BLOCK=power_of_two(c.d_model), LEARNED=w.position is not None,
        PROMPT=table is not None, PDL=False, num_warps=4,
    )  # fmt: skip


def attend(
    model: Model, rows: Rows, layer: int, qkv: Tensor, out: Tensor, parts: Parts, n: int,
    *, append: bool = True,
) -> None:  # fmt: skip
    """Attention of n single positions; leaves parts, or the average in `out` without splits."""
    c, t = model.config, model.tuning
    group = c.n_head // c.n_kv_head
    shared = dict(
        HEADS=c.n_head, KV=c.n_kv_head, DIM=c.head_dim, ROTARY=model.rotary,
        BLOCK_D=power_of_two(c.head_dim), BLOCK_T=t.block_t, SPLITS=parts.splits, APPEND=append,
        PDL=model.chained, num_warps=t.attention_warps, **_chained(model),
    )  # fmt: skip
    arguments = (
        qkv, model.cache.keys[layer], model.cache.values[layer], rows.slots, rows.positions,
        model.cosine, model.sine, parts.part, parts.top, parts.total, out,
        c.layer_scale(layer), model.cache.capacity,
    )  # fmt: skip
    grid = (parts.splits, c.n_kv_head, n)
    if group == 1:
        decode_attention[grid](*arguments, **shared)
    else:
        block_g = max(16, power_of_two(group))
        group_attention[grid](*arguments, BLOCK_G=block_g, PRECISION=model.precision, **shared)


def merge(model: Model, parts: Parts, out: Tensor, n: int) -> None:
    """Join split attention's parts of n rows."""
    c = model.config
    merge_kernel[(-(-c.n_head * c.head_dim // 128), n)](
        parts.part, parts.top, parts.total, out, HEADS=c.n_head, DIM=c.head_dim,
        SPLITS=parts.splits, BLOCK=128, PDL=model.chained, num_warps=4, **_chained(model),
    )  # fmt: skip


def _chained(model: Model) -> dict[str, bool]:
    return {"launch_pdl": True} if model.chained else {}


class SkinnyChain:
    """Enqueues the kernels of one step for at most 16 rows."""

    def __init__(self, model: Model, rows: Rows, scratch: Scratch) -> None:
        self.model = model
        self.rows = rows
        self.scratch = scratch
        self.order = model.weights.linears()

    def layers(self, n: int, *, append: bool) -> None:
        """Run n rows of the residual stream through every layer."""
        c, s, t = self.model.config, self.scratch, self.model.tuning
        parts = Parts(t.splits, s.part, s.top, s.total)
        fuse = (
            n <= 2
            and c.n_head * c.head_dim * t.splits <= _FUSED_MERGE
            and t.tiles["out"].kind == "stream"
        )
        for index, layer in enumerate(self.model.weights.layers):
            at = 4 * index
            self.linear("qkv", layer.qkv, n, s.x, s.qkv, at, early=index > 0)
            if not append:
                self._append(index, n)
            attend(self.model, self.rows, index, s.qkv, s.attended, parts, n, append=append)
            if t.splits > 1 and not fuse:
                merge(self.model, parts, s.attended, n)
            split = parts if fuse and t.splits > 1 else None
            self.linear("out", layer.out, n, s.attended, None, at + 1, parts=split)
            self.linear("up", layer.up, n, s.x, s.hidden, at + 2, act=c.activation)
            self.linear("down", layer.down, n, s.hidden, None, at + 3)

    def head(self, n: int, logits: Tensor | None) -> None:
        """Project n rows on the vocabulary: parts of the maximum, and all logits if wanted."""
        head = self.model.weights.head
        self.linear("head", head, n, self.scratch.x, logits, len(self.order) - 1, best=True)

    def pick(self, n: int) -> None:
        """Choose each row's greedy token and embed it for the next step."""
        s = self.scratch
        pick(self.model, self.rows, s.x, n, s.best, s.where)

    def linear(
        self, name: str, linear: Linear, n: int, x: Tensor, out: Tensor | None, at: int, *,
        act: str = "none", parts: Parts | None = None, best: bool = False, early: bool = True,
    ) -> None:  # fmt: skip
        """Enqueue one matrix; without `out` and `best` the result is added to the residual."""
        tile = self.model.tuning.tiles[name]
        follower = self.order[(at + 1) % len(self.order)]
        ahead = min(follower.nbytes, self.model.tuning.ahead) if self.model.chained else 0
        launch = _stream if tile.kind == "stream" else _tile
        residual = out is None and not best
        early = early and self.model.tuning.early
        launch(self, linear, tile, n, x, out, follower.weight, ahead, act=act, parts=parts,
               best=best, residual=residual, early=early)  # fmt: skip

    def _append(self, layer: int, n: int) -> None:
        c, m, s = self.model.config, self.model, self.scratch
        append(m, self.rows, layer, s.qkv, s.attended, n)
        del c


def append(model: Model, rows: Rows, layer: int, qkv: Tensor, query: Tensor, n: int) -> None:
    """Rotate n packed tokens; keys and values go to the cache, queries to `query`."""
    c = model.config
    block_d = power_of_two(c.head_dim)
    block_h = max(1, 2048 // block_d)
    append_kernel[(-(-(c.n_head + 2 * c.n_kv_head) // block_h), n)](
        qkv, query, model.cache.keys[layer], model.cache.values[layer], rows.slots,
        rows.positions, model.cosine, model.sine, model.cache.capacity,
        HEADS=c.n_head, KV=c.n_kv_head, DIM=c.head_dim, ROTARY=model.rotary,
        BLOCK_H=block_h, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip


def pick(
    model: Model, rows: Rows, x: Tensor, n: int, best: Tensor, where: Tensor | None
) -> None:
    """Choose greedy tokens from parts of maxima, or from whole logits without `where`."""
    c, w = model.config, model.weights
    pick_kernel[(n,)](
        best, rows.tokens if where is None else where, best.shape[1], rows.tokens,
        rows.positions, rows.cursor, rows.history, rows.history.shape[1], w.embedding,
        w.embedding if w.position is None else w.position, x, c.vocab_size, c.n_positions,
        D=c.d_model, BLOCK=power_of_two(c.d_model), LEARNED=w.position is not None,
        DENSE=where is None, SCAN=min(4096, power_of_two(best.shape[1])), PDL=model.chained,
        num_warps=8, **_chained(model),
    )  # fmt: skip


def _stream(
    chain: SkinnyChain, linear: Linear, tile: Tile, n: int, x: Tensor, out: Tensor | None,
    follower: Tensor, ahead: int, *, act: str, parts: Parts | None, best: bool, residual: bool,
    early: bool,
) -> None:  # fmt: skip
    model, s, c = chain.model, chain.scratch, chain.model.config
    columns, inner = linear.weight.shape
    columns //= 2 if linear.gated else 1
    bias = linear.bias if linear.norm is None else linear.folded_bias
    spare = s.x
    stream_linear[(-(-columns // tile.block_n),)](
        x, linear.weight, spare if bias is None else bias,
        spare if linear.column_sum is None else linear.column_sum,
        spare if linear.norm is None else linear.norm.gamma,
        s.x, spare if out is None else out, s.best, s.where, s.part, s.top, s.total,
        follower, ahead, n, c.norm_eps,
        N=columns, K=inner, NORM=_norm(linear, c), GATED=linear.gated, ACT=act,
        HAS_BIAS=bias is not None, RESIDUAL=residual, STORE=out is not None, BEST=best,
        HEADS=c.n_head, DIM=c.head_dim, SPLITS=parts.splits if parts else 0,
        BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, HELD=min(tile.held, -(-inner // tile.block_k)),
        PDL=model.chained, EARLY=early, AHEAD=ahead > 0, OWN=tile.own and model.chained,
        num_warps=tile.warps, **_chained(model),
    )  # fmt: skip


def _tile(
    chain: SkinnyChain, linear: Linear, tile: Tile, n: int, x: Tensor, out: Tensor | None,
    follower: Tensor, ahead: int, *, act: str, parts: Parts | None, best: bool, residual: bool,
    early: bool,
) -> None:  # fmt: skip
    model, s, c = chain.model, chain.scratch, chain.model.config
    columns, inner = linear.weight.shape
    columns //= 2 if linear.gated else 1
    spare, norm = s.x, linear.norm
    beta = None if norm is None else norm.beta
    tile_linear[(-(-columns // tile.block_n), -(-n // 16))](
        x, linear.weight, spare if linear.bias is None else linear.bias,
        spare if norm is None else norm.gamma, spare if beta is None else beta,
        s.x, spare if out is None else out, s.best, s.where, follower, ahead, n, c.norm_eps,
        N=columns, K=inner, NORM=_norm(linear, c), GATED=linear.gated, ACT=act,
        HAS_BIAS=linear.bias is not None, HAS_BETA=beta is not None, RESIDUAL=residual,
        STORE=out is not None, BEST=best, BLOCK_M=16, BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, GROUPS=tile.groups, STAGES=tile.stages,
        PRECISION=model.precision, PDL=model.chained, EARLY=early, PREFETCH=ahead > 0,
        num_warps=tile.warps, **_chained(model),
    )  # fmt: skip


def _norm(linear: Linear, config: ModelConfig) -> str:
    if linear.norm is None:
        return "none"
    return "rmsnorm" if config.norm == "rmsnorm" else "layernorm"


Enqueue = Callable[[int], None]
