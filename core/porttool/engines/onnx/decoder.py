"""The canonical decoder as an ONNX graph, operation for operation what `nn.Decoder` does.

Inputs
    tokens     [batch, width] int64: ids from vocab_size on are rows of the prompt table
    positions  [batch, width] int64: of every token, padding included
    starts     [batch] int64: tokens of the row that the cache holds already
    wanted     [rows] int64: which of the batch * width tokens, row after row, get logits
    prompt_table [n, d_model], only if the engine has room for one
    past_key.N, past_value.N  [batch, n_kv_head, capacity, head_dim] for each layer

Outputs
    logits     [rows, vocab_size] float32
    present_key.N, present_value.N  like the past: the same memory may be bound to both
    (form `scatter`), or new_key.N, new_value.N [batch, n_kv_head, width, head_dim], which the
    runner puts into the cache (form `concat`)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from porttool.engines.onnx.attention import AttentionBlock
from porttool.engines.onnx.blocks import Blocks, GraphSpec
from porttool.errors import EngineError

if TYPE_CHECKING:
    import onnx

    from porttool.engines.onnx.weights import StoredTensor


def decoder_model(spec: GraphSpec, tensors: Mapping[str, StoredTensor]) -> onnx.ModelProto:
    """Return the model of a specification, its weights where `tensors` says.

    Raises EngineError for a config with a number that is none in float32.
    """
    try:
        with np.errstate(over="raise", divide="raise"):
            return DecoderGraph(spec, tensors).build()
    except FloatingPointError as error:
        raise EngineError(
            "norm_eps, rotary_base or attention_scale of the config is beyond float32 "
            f"({error}); convert the source again"
        ) from error


class DecoderGraph:
    """Builds the graph of one model."""

    def __init__(self, spec: GraphSpec, tensors: Mapping[str, StoredTensor]) -> None:
        self.spec = spec
        self.config = spec.config
        self.dtype = spec.dtype
        self.blocks = Blocks(spec, tensors)
        self.graph = self.blocks.graph

    def build(self) -> onnx.ModelProto:
        """Return the whole model."""
        graph = self.graph
        tokens = graph.input("tokens", "int64", ["batch", "width"])
        positions = graph.input("positions", "int64", ["batch", "width"])
        starts = graph.input("starts", "int64", ["batch"])
        wanted = graph.input("wanted", "int64", ["rows"])
        self.attention = AttentionBlock(self.spec, self.blocks, positions, starts)
        x = self._embed(tokens, positions)
        for layer in range(self.config.n_layer):
            x = self._layer(layer, x)
        self._logits(x, wanted)
        metadata = {"porttool.form": self.spec.form, "porttool.capacity": str(self.spec.capacity)}
        return graph.model("decoder", metadata)

    def _embed(self, tokens: str, positions: str) -> str:
        c, graph = self.config, self.graph
        real = tokens
        if self.spec.prompt_rows:
            size = graph.constant("vocab_size", np.array(c.vocab_size, np.int64))
            zero = graph.constant("zero", np.array(0, np.int64))
            virtual = graph.node("GreaterOrEqual", [tokens, size], "virtual")
            real = graph.node("Where", [virtual, zero, tokens], "tokens.real")
        x = graph.node("Gather", [self.blocks.weight("embedding.weight"), real], "embedding.out")
        graph.module("embedding", real, x)
        if self.spec.prompt_rows:
            table = graph.input("prompt_table", self.dtype, [self.spec.prompt_rows, c.d_model])
            beyond = graph.node("Sub", [tokens, size], "tokens.beyond")
            row = graph.node("Where", [virtual, beyond, zero], "prompt.row")
            rows = graph.node("Gather", [table, row], "prompt.rows")
            which = graph.node("Unsqueeze", [virtual, graph.integers(2)], "prompt.which")
            x = graph.node("Where", [which, rows, x], "prompt.out")
        if c.position == "learned":
            at = graph.node(
                "Gather", [self.blocks.weight("position.weight"), positions], "position.out"
            )
            graph.module("position", positions, at)
            x = graph.node("Add", [x, at], "embedded")
        return x

    def _layer(self, layer: int, x: str) -> str:
        at = f"layers.{layer}"
        attended = self.attention.add(layer, self.blocks.norm(f"{at}.norm1", x))
        x = self.graph.node("Add", [x, attended], f"{at}.attended")
        moved = self._mlp(f"{at}.mlp", self.blocks.norm(f"{at}.norm2", x))
        return self.graph.node("Add", [x, moved], f"{at}.out")

    def _mlp(self, at: str, x: str) -> str:
        c, graph = self.config, self.graph
        hidden = self.blocks.linear(f"{at}.up", x, bias=c.mlp_bias)
        if not c.gated:
            hidden = self.blocks.activate(f"{at}.act", hidden)
        else:
            sizes = graph.integers(c.d_ff, c.d_ff)
            names = [f"{at}.gate", f"{at}.linear"]
            gate, linear = graph.nodes("Split", [hidden, sizes], names, {"axis": -1})
            hidden = graph.node(
                "Mul", [self.blocks.activate(f"{at}.act", gate), linear], f"{at}.gated"
            )
        return self.blocks.linear(f"{at}.down", hidden, bias=c.mlp_bias)

    def _logits(self, x: str, wanted: str) -> None:
        """Pick the wanted tokens, normalise them and project them on the vocabulary."""
        c, graph = self.config, self.graph
        shape = graph.integers(-1, c.d_model)
        rows = graph.node("Reshape", [x, shape], "rows.all")
        rows = graph.node("Gather", [rows, wanted], "rows")
        normed = self.blocks.norm("norm", rows)
        weight = self.blocks.weight("embedding.weight" if c.tied_head else "head.weight")
        out = "logits" if self.dtype == "float32" else "logits.narrow"
        graph.node("Gemm", [normed, weight], out, {"transB": 1})
        self.blocks.widen(out, "logits")
        graph.output("logits", "float32", ["rows", c.vocab_size])
