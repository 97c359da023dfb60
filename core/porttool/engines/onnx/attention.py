"""Causal self-attention over a cache: fused into one operator, or spelled out."""

from __future__ import annotations

from typing import Any

import numpy as np

from porttool.config import ModelConfig
from porttool.engines.onnx.blocks import Blocks, GraphSpec
from porttool.engines.onnx.graph import Shape

FAR = 1 << 40
"""A key position that no query reaches."""


def rotary_angles(config: ModelConfig, n_positions: int) -> np.ndarray[Any, Any]:
    """Angles [n_positions, rotary_dim / 2] as models have them: rounded to float32 at every step.

    What is rounded is computed in float64: in float32 a power depends on the processor, and an
    engine's graph has to be made again to the bit where it is loaded. Models' powers are torch's in
    float32, of which one in fifty has another last bit.
    """
    steps = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
    powers = (config.rotary_base ** steps.astype(np.float64)).astype(np.float32)
    return np.arange(n_positions, dtype=np.float32)[:, None] * (np.float32(1) / powers)


class AttentionBlock:
    """Adds the attention of every layer; mask and rotary angles are shared by all of them.

    The mask is explicit, since TensorRT's causal attention aligns to the upper left corner and is
    wrong for a query behind a cache: a query sees the keys up to its own position.
    """

    def __init__(self, spec: GraphSpec, blocks: Blocks, positions: str, starts: str) -> None:
        self.spec = spec
        self.config = spec.config
        self.dtype = spec.dtype
        self.blocks = blocks
        self.graph = blocks.graph
        self.starts = starts
        self.mask = self._mask(positions, starts)
        if self.config.position == "rotary":
            self.angles = self._angles(positions)

    def add(self, layer: int, x: str) -> str:
        """Add one layer's attention to x [batch, width, d_model]."""
        c, graph, at = self.config, self.graph, f"layers.{layer}.attention"
        query, key, value = self._project(at, x)
        key, value = (
            self._cached(kind, layer, new) for kind, new in (("key", key), ("value", value))
        )
        scale = c.layer_scale(layer)
        if c.upcast_attention:
            query, key, value = (
                self.blocks.widen(v, f"{at}.{kind}.wide")
                for kind, v in (("query", query), ("key", key), ("value", value))
            )
        attend = self._fused if self.spec.form == "scatter" else self._spelled_out
        mixed = attend(at, query, key, value, scale)  # [batch, n_head, width, head_dim]
        if c.upcast_attention:
            mixed = self.blocks.narrow(mixed, f"{at}.mixed.narrow")
        turned = graph.node("Transpose", [mixed], f"{at}.turned", {"perm": [0, 2, 1, 3]})
        shape = graph.integers(0, 0, c.n_head * c.head_dim)
        flat = graph.node("Reshape", [turned, shape], f"{at}.flat")
        return self.blocks.linear(f"{at}.out", flat, bias=c.out_bias)

    def _mask(self, positions: str, starts: str) -> str:
        """Return which keys each query sees: [batch, 1, width, keys] bool."""
        graph, capacity = self.graph, self.spec.capacity
        columns = np.arange(capacity, dtype=np.int64).reshape(1, 1, 1, -1)
        keys = graph.constant("columns", columns)  # [1, 1, 1, capacity]
        if self.spec.form == "concat":
            held = graph.node("Unsqueeze", [starts, graph.integers(1, 2, 3)], "mask.held")
            filled = graph.node("Less", [keys, held], "mask.filled")
            far = graph.constant("far", np.array(FAR, np.int64))
            old = graph.node("Where", [filled, keys, far], "mask.old")
            new = graph.node("Unsqueeze", [positions, graph.integers(1, 2)], "mask.new")
            keys = graph.node("Concat", [old, new], "mask.keys", {"axis": 3})
        queries = graph.node("Unsqueeze", [positions, graph.integers(1, 3)], "mask.queries")
        return graph.node("LessOrEqual", [keys, queries], "mask")

    def _angles(self, positions: str) -> tuple[str, str]:
        """Return cosine and sine of every position: [batch, 1, width, rotary_dim / 2] each."""
        graph = self.graph
        angles = rotary_angles(self.config, self.spec.capacity).astype(np.float64)
        found = []
        for name, table in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
            whole = graph.constant(f"rotary.{name}.table", table.astype(np.float32))
            rows = graph.node("Gather", [whole, positions], f"rotary.{name}.rows")
            rows = self.blocks.narrow(rows, f"rotary.{name}.narrow")
            found.append(graph.node("Unsqueeze", [rows, graph.integers(1)], f"rotary.{name}"))
        return found[0], found[1]

    def _project(self, at: str, x: str) -> tuple[str, str, str]:
        """Return query, key and value, each [batch, heads, width, head_dim], rotated if need be."""
        c, graph = self.config, self.graph
        fused = self.blocks.linear(f"{at}.qkv", x, bias=c.qkv_bias)
        shape = graph.integers(0, 0, c.n_head + 2 * c.n_kv_head, c.head_dim)
        apart = graph.node("Reshape", [fused, shape], f"{at}.apart")
        heads = graph.node("Transpose", [apart], f"{at}.heads", {"perm": [0, 2, 1, 3]})
        sizes = graph.integers(c.n_head, c.n_kv_head, c.n_kv_head)
        names = [f"{at}.query", f"{at}.key", f"{at}.value"]
        query, key, value = graph.nodes("Split", [heads, sizes], names, {"axis": 1})
        if c.position == "rotary":
            query, key = self._rotate(query), self._rotate(key)
        return query, key, value

    def _rotate(self, x: str) -> str:
        """Rotate the first rotary_dim elements of every head, in halves."""
        c, graph = self.config, self.graph
        cos, sin = self.angles
        half, rest = c.rotary_dim // 2, c.head_dim - c.rotary_dim
        sizes = [half, half, rest] if rest else [half, half]
        names = [f"{x}.first", f"{x}.second", f"{x}.rest"][: len(sizes)]
        parts = graph.nodes("Split", [x, graph.integers(*sizes)], names, {"axis": -1})
        for name, kept, op, mixed in (("low", 0, "Sub", 1), ("high", 1, "Add", 0)):
            straight = graph.node("Mul", [names[kept], cos], f"{x}.{name}.straight")
            crossed = graph.node("Mul", [names[mixed], sin], f"{x}.{name}.crossed")
            parts[kept] = graph.node(op, [straight, crossed], f"{x}.{name}")
        return graph.node("Concat", parts, f"{x}.rotated", {"axis": -1})

    def _cached(self, kind: str, layer: int, new: str) -> str:
        """Put new keys or values behind the past ones; return all of them."""
        c, graph, spec = self.config, self.graph, self.spec
        whole: Shape = ["batch", c.n_kv_head, spec.capacity, c.head_dim]
        past = graph.input(f"past_{kind}.{layer}", self.dtype, whole)
        if spec.form == "scatter":
            present = f"present_{kind}.{layer}"
            graph.output(present, self.dtype, whole)
            attributes = {"axis": -2, "mode": "linear"}
            return graph.node("TensorScatter", [past, new, self.starts], present, attributes)
        shape: Shape = ["batch", c.n_kv_head, "width", c.head_dim]
        graph.output(f"new_{kind}.{layer}", self.dtype, shape)
        graph.node("Identity", [new], f"new_{kind}.{layer}")
        return graph.node("Concat", [past, new], f"layers.{layer}.{kind}.all", {"axis": 2})

    def _fused(self, at: str, query: str, key: str, value: str, scale: float) -> str:
        inputs = [query, key, value, self.mask]
        return self.graph.node("Attention", inputs, f"{at}.mixed", {"scale": scale})

    def _spelled_out(self, at: str, query: str, key: str, value: str, scale: float) -> str:
        """Attention of matrix products and a softmax in float32, as `nn.Attention` has it."""
        c, graph = self.config, self.graph
        groups = c.n_head // c.n_kv_head
        mask = self.mask
        if groups > 1:
            shape = graph.integers(0, c.n_kv_head, groups, -1, c.head_dim)
            query = graph.node("Reshape", [query, shape], f"{at}.query.grouped")
            key = graph.node("Unsqueeze", [key, graph.integers(2)], f"{at}.key.shared")
            value = graph.node("Unsqueeze", [value, graph.integers(2)], f"{at}.value.shared")
            mask = graph.node("Unsqueeze", [mask, graph.integers(2)], f"{at}.mask")
        perm = [0, 1, 3, 2] if groups == 1 else [0, 1, 2, 4, 3]
        turned = graph.node("Transpose", [key], f"{at}.key.turned", {"perm": perm})
        product = graph.node("MatMul", [query, turned], f"{at}.product")
        wide = product if c.upcast_attention else self.blocks.widen(product, f"{at}.product.wide")
        scores = graph.node("Mul", [wide, graph.scalar(scale, "float32")], f"{at}.scores")
        never = graph.scalar(float(np.finfo(np.float32).min), "float32")
        seen = graph.node("Where", [mask, scores, never], f"{at}.seen")
        weights = graph.node("Softmax", [seen], f"{at}.weights", {"axis": -1})
        if not c.upcast_attention:
            weights = self.blocks.narrow(weights, f"{at}.weights.narrow")
        mixed = graph.node("MatMul", [weights, value], f"{at}.mixed")
        if groups == 1:
            return mixed
        shape = graph.integers(0, c.n_head, -1, c.head_dim)
        return graph.node("Reshape", [mixed, shape], f"{at}.joined")
