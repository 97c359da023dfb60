"""The parts that layers are made of: casts, linear maps, norms, activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from porttool.config import Dtype, ModelConfig
from porttool.engines.onnx.element_types import ELEMENT_TYPES
from porttool.engines.onnx.graph import Graph
from porttool.engines.onnx.record import Form

if TYPE_CHECKING:
    from porttool.engines.onnx.weights import StoredTensor

OPSETS: dict[Form, int] = {"scatter": 24, "concat": 20}
"""`scatter` needs Attention and TensorScatter (TensorRT 10.15); `concat` needs neither (10.13)."""


@dataclass(frozen=True)
class GraphSpec:
    """What shapes a graph: the model, the type, what the cache holds, and the cache's form."""

    config: ModelConfig
    dtype: Dtype
    capacity: int
    prompt_rows: int = 0
    form: Form = "scatter"


class Blocks:
    """Adds the parts of one model to its graph; modules have the canonical decoder's names."""

    def __init__(self, spec: GraphSpec, tensors: Mapping[str, StoredTensor]) -> None:
        self.config = spec.config
        self.dtype = spec.dtype
        self.tensors = tensors
        self.graph = Graph(OPSETS[spec.form])

    def weight(self, name: str) -> str:
        """Refer to a stored tensor."""
        return self.graph.weight(self.tensors[name])

    def widen(self, value: str, output: str) -> str:
        """Bring a value of the model's type to float32."""
        return value if self.dtype == "float32" else self._cast(value, "float32", output)

    def narrow(self, value: str, output: str) -> str:
        """Bring a float32 value to the model's type."""
        return value if self.dtype == "float32" else self._cast(value, self.dtype, output)

    def linear(self, at: str, x: str, *, bias: bool) -> str:
        """Multiply by a module's weight and add its bias."""
        graph = self.graph
        stored = self.weight(f"{at}.weight")  # [out, in]
        weight = graph.node("Transpose", [stored], f"{at}.weight.turned", {"perm": [1, 0]})
        if not bias:
            return graph.module(at, x, graph.node("MatMul", [x, weight], f"{at}.out"))
        product = graph.node("MatMul", [x, weight], f"{at}.product")
        out = graph.node("Add", [product, self.weight(f"{at}.bias")], f"{at}.out")
        return graph.module(at, x, out)

    def norm(self, at: str, x: str) -> str:
        """Normalise in float32, whatever the type of x."""
        graph, c = self.graph, self.config
        wide = self.widen(x, f"{at}.wide")
        inputs = [wide, self._norm_weight(f"{at}.weight")]
        out = f"{at}.out" if self.dtype == "float32" else f"{at}.normed"
        if c.norm == "rmsnorm":
            self._rms_norm(at, inputs, out)
        else:
            if c.norm_bias:
                bias = self.weight(f"{at}.bias")
                inputs.append(self.widen(bias, f"{at}.bias.wide"))
            graph.node("LayerNormalization", inputs, out, {"axis": -1, "epsilon": c.norm_eps})
        return graph.module(at, x, self.narrow(out, f"{at}.out"))

    def _norm_weight(self, name: str) -> str:
        """Return a norm's weight in float32, the one that `layernorm1p` leaves out added."""
        wide = self.widen(self.weight(name), f"{name}.wide")
        if self.config.norm != "layernorm1p":
            return wide
        return self.graph.node("Add", [wide, self.graph.scalar(1.0, "float32")], f"{name}.whole")

    def _rms_norm(self, at: str, inputs: list[str], out: str) -> None:
        graph, (x, weight) = self.graph, inputs
        square = graph.node("Mul", [x, x], f"{at}.square")
        mean = graph.node("ReduceMean", [square, graph.integers(-1)], f"{at}.mean")
        sound = graph.node("Add", [mean, graph.scalar(self.config.norm_eps, "float32")],
                           f"{at}.sound")  # fmt: skip
        root = graph.node("Sqrt", [sound], f"{at}.root")
        scaled = graph.node("Div", [x, root], f"{at}.scaled")
        graph.node("Mul", [scaled, weight], out)

    def activate(self, at: str, x: str) -> str:
        """Apply the activation of the MLP."""
        graph, kind = self.graph, self.config.activation
        if kind in ("gelu", "gelu_tanh"):
            form = "tanh" if kind == "gelu_tanh" else "none"
            return graph.node("Gelu", [x], at, {"approximate": form})
        if kind in ("relu", "relu2"):
            kept = graph.node("Relu", [x], f"{at}.kept")
            return graph.node("Mul", [kept, kept], at) if kind == "relu2" else kept
        inner = x
        if kind == "quick_gelu":
            inner = graph.node("Mul", [x, graph.scalar(1.702, self.dtype)], f"{at}.inner")
        gate = graph.node("Sigmoid", [inner], f"{at}.gate")
        return graph.node("Mul", [x, gate], at)

    def _cast(self, value: str, dtype: str, output: str) -> str:
        return self.graph.node("Cast", [value], output, {"to": ELEMENT_TYPES[dtype]})
