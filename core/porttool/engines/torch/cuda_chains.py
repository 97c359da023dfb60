"""What one decode step enqueues: a row alone on the CUDA cores, several on the tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor

from porttool.engines.torch.cuda_balanced import BalancedAttention
from porttool.engines.torch.cuda_cluster import ClusterProduct, layer_products
from porttool.engines.torch.cuda_launch import (
    Model,
    Projected,
    append,
    attend,
    merge,
    pick,
    ranged,
    residual_norm,
    stream,
    wide,
)
from porttool.engines.torch.cuda_state import Rows, Scratch
from porttool.engines.torch.cuda_tuning import AttentionTile, power_of_two, tile_rows
from porttool.engines.torch.cuda_weights import Linear

TOKENS_A_GRAPH = (2, 16)
"""Greedy tokens in the graphs. A short one goes first: a long one's launch hides behind it."""


def graph_sizes(count: int) -> list[int]:
    """Cut a number of greedy tokens into graphs: a short one, long ones, the rest in short ones."""
    short, long = TOKENS_A_GRAPH
    if count < short:
        return [1] * count
    longs, rest = divmod(count - short, long)
    return [short] + [long] * longs + [short] * (rest // short) + [1] * (rest % short)


class StreamChain:
    """One row (or few, one after the other): five kernels a layer on the CUDA cores."""

    def __init__(self, model: Model, rows: Rows, scratch: Scratch) -> None:
        self.model, self.rows, self.scratch = model, rows, scratch

    def layers(self, n: int) -> None:
        """Run n rows of the residual stream through every layer."""
        c, s, m = self.model.config, self.scratch, self.model
        tiles, attention = m.tuning.stream, m.tuning.attention
        for index, layer in ranged(m.weights.layers, on_gpu=s.x.is_cuda):
            stream(m, s, layer.qkv, tiles["qkv"], n, s.x, s.qkv, early=index > 0)
            attend(m, self.rows, index, s, attention, n, Projected(s.qkv))
            if attention.splits > 1 and not self.joins_in_out:
                merge(m, s, attention.splits, n)
            splits = attention.splits if self.joins_in_out else 0
            stream(m, s, layer.out, tiles["out"], n, s.attended, None, splits=splits)
            stream(m, s, layer.up, tiles["up"], n, s.x, s.hidden, act=c.activation)
            stream(m, s, layer.down, tiles["down"], n, s.hidden, None)

    @property
    def joins_in_out(self) -> bool:
        """True when the output projection can and shall join the parts of attention."""
        t, dim = self.model.tuning, self.model.config.head_dim
        whole = power_of_two(dim) == dim and t.stream["out"].block_k % dim == 0
        return t.join_in_out and whole and t.attention.splits > 1

    def head(self, n: int, logits: Tensor | None) -> None:
        """Project n rows on the vocabulary: maxima of parts of it, and all logits if wanted."""
        m, s = self.model, self.scratch
        stream(m, s, m.weights.head, m.tuning.stream["head"], n, s.x, logits, best=True)

    def pick(self, n: int) -> None:
        """Choose each row's greedy token and embed it for the next step."""
        block = self.model.tuning.stream["head"].block_n
        pick(self.model, self.rows, self.scratch, n, -(-self.model.config.vocab_size // block))


class WideChain:
    """Two rows or more on the tensor cores: norms apart, residual sums in the norm after."""

    def __init__(self, model: Model, rows: Rows, scratch: Scratch, *, append: bool = True) -> None:
        self.model, self.rows, self.scratch = model, rows, scratch
        self.append = append
        self._drawn: Tensor | None = None
        self._balanced: dict[tuple[int, int], BalancedAttention] = {}

    def layers(self, n: int) -> None:
        """Run n rows of the residual stream through every layer and the final norm."""
        m, s, c = self.model, self.scratch, self.model.config
        tiles = m.tuning.wide[str(tile_rows(n))]
        before: Linear | None = None
        for index, layer in ranged(m.weights.layers, on_gpu=s.x.is_cuda):
            self._norm(n, before, layer.qkv, early=index > 0)
            wide(m, s, layer.qkv, tiles["qkv"], n, s.normed, s.qkv)
            qkv = Projected(s.qkv)
            if tiles["qkv"].split > 1:
                qkv = Projected(s.delta, layer.qkv.bias, tiles["qkv"].split)
            self._attend(n, index, qkv)
            wide(m, s, layer.out, tiles["out"], n, s.attended, None)
            self._norm(n, layer.out, layer.up, name="out")
            wide(m, s, layer.up, tiles["up"], n, s.normed, s.hidden, act=c.activation)
            wide(m, s, layer.down, tiles["down"], n, s.hidden, None)
            before = layer.down
        self._norm(n, before, m.weights.head)

    def head(self, n: int, logits: Tensor | None) -> None:
        """Project n normalised rows on the vocabulary."""
        m, s = self.model, self.scratch
        tile = m.tuning.wide[str(tile_rows(n))]["head"]
        wide(m, s, m.weights.head, tile, n, s.normed, logits, best=True)

    def pick(self, n: int) -> None:
        """Choose each row's greedy token and embed it for the next step."""
        block = self.model.tuning.wide[str(tile_rows(n))]["head"].block_n
        pick(self.model, self.rows, self.scratch, n, -(-self.model.config.vocab_size // block))

    def _attend(self, n: int, index: int, qkv: Projected) -> None:
        """Run n rows' attention of a layer, and join its parts."""
        m, s = self.model, self.scratch
        attention = m.tuning.wide_attention[str(tile_rows(n))]
        if not self.append:
            append(m, self.rows, index, qkv, s.attended, n)
        if attention.balanced:
            self._attend_balanced(n, index, qkv, attention)
            return
        attend(m, self.rows, index, s, attention, n, qkv, append=self.append)
        if attention.splits > 1:
            merge(m, s, attention.splits, n)

    def _attend_balanced(self, n: int, index: int, qkv: Projected, tile: AttentionTile) -> None:
        if self._drawn is None:
            layers = self.model.config.n_layer
            self._drawn = torch.zeros(layers, dtype=torch.int32, device=self.scratch.x.device)
        if (n, index) not in self._balanced:
            self._balanced[n, index] = BalancedAttention(
                self.model, self.rows, self.scratch, index, n, tile, qkv, self._drawn[index]
            )
        self._balanced[n, index].enqueue()

    def _norm(
        self, n: int, before: Linear | None, after: Linear, *, name: str = "down",
        early: bool = True,
    ) -> None:  # fmt: skip
        """Add what the matrix `before` (of kind `name`) left, and normalise for `after`."""
        m, s = self.model, self.scratch
        if after.norm is None:
            raise AssertionError("a projection of the residual stream has a norm")
        tile = m.tuning.wide[str(tile_rows(n))][name]
        delta = s.delta if tile.block_n else s.sum
        residual_norm(
            m, s.x[:n], None if before is None else delta,
            None if before is None else before.bias, after.norm, s.normed, parts=tile.split,
            early=early,
        )  # fmt: skip


class ClusterChain(WideChain):
    """As WideChain, with products that share their work in clusters and apply the norms."""

    def __init__(self, model: Model, rows: Rows, scratch: Scratch, *, append: bool = True) -> None:
        super().__init__(model, rows, scratch, append=append)
        self._products: dict[int, list[list[ClusterProduct]]] = {}

    def layers(self, n: int) -> None:
        """Run n rows of the residual stream through every layer and the final norm."""
        m, s = self.model, self.scratch
        if n not in self._products:
            self._products[n] = layer_products(m, s, n)
        self._norm(n, None, m.weights.layers[0].qkv, early=False)
        for index, _ in ranged(m.weights.layers, on_gpu=s.x.is_cuda):
            qkv, out, up, down = self._products[n][index]
            qkv.enqueue()
            self._attend(n, index, Projected(s.qkv))
            out.enqueue()
            up.enqueue()
            down.enqueue()
        self._norm(n, None, m.weights.head)
