"""What the rules of TensorRT's limits ask about a graph, collected once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
INTEGERS = frozenset({TensorProto.INT32, TensorProto.INT64})
BOOL = frozenset({TensorProto.BOOL})
QUANTIZED = frozenset({TensorProto.INT8, TensorProto.FLOAT8E4M3FN, TensorProto.INT4})
TYPES = FLOATS | INTEGERS | BOOL | QUANTIZED
NUMBERS = FLOATS | INTEGERS


@dataclass(frozen=True)
class GraphFacts:
    """What the rules ask about: types, shapes, what is constant, what is input or output."""

    types: Mapping[str, int]
    shapes: Mapping[str, Sequence[int | str]]
    constants: Mapping[str, TensorProto]
    inputs: frozenset[str]
    outputs: frozenset[str]


def gather_facts(model: onnx.ModelProto) -> GraphFacts:
    """Collect what the rules ask about."""
    graph = model.graph
    values = [*graph.input, *graph.value_info, *graph.output]
    types = {v.name: v.type.tensor_type.elem_type for v in values}
    shapes = {v.name: dimensions(v) for v in values if v.type.tensor_type.HasField("shape")}
    for weight in graph.initializer:
        types[weight.name] = weight.data_type
        shapes[weight.name] = list(weight.dims)
    return GraphFacts(
        types=types,
        shapes=shapes,
        constants={w.name: w for w in graph.initializer},
        inputs=frozenset(v.name for v in graph.input),
        outputs=frozenset(v.name for v in graph.output),
    )


def dimensions(value: onnx.ValueInfoProto) -> list[int | str]:
    """Return a value's dimensions, a name where one is not known."""
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes as Python values."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}
