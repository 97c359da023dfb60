"""The operators that we know TensorRT's ONNX parser to take, and their restrictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx
from onnx import TensorProto, numpy_helper

from porttool.engines.tensorrt.graph_facts import (
    BOOL,
    FLOATS,
    INTEGERS,
    NUMBERS,
    QUANTIZED,
    TYPES,
    GraphFacts,
    attributes,
)

Version = tuple[int, int]
Rule = Callable[[onnx.NodeProto, GraphFacts], str | None]
"""Returns why TensorRT refuses a node, or None."""

MAX_TOPK = 3840
OLD: Version = (10, 0)


@dataclass(frozen=True)
class Operator:
    """One row of the table: the types it takes, the first version, and its restrictions."""

    types: frozenset[int]
    since: Version = OLD
    rules: tuple[Rule, ...] = ()


def one_output(node: onnx.NodeProto, facts: GraphFacts) -> str | None:
    """Only the first output is imported."""
    extra = [name for name in node.output[1:] if name]
    return f"the outputs {extra} are not supported" if extra else None


def constant_input(index: int) -> Rule:
    """Return the rule that an input must be known at build time."""

    def rule(node: onnx.NodeProto, facts: GraphFacts) -> str | None:
        name = node.input[index] if len(node.input) > index else ""
        return f"{name} must be an initializer" if name and name not in facts.constants else None

    return rule


def ranked(rank: int, count: int) -> Rule:
    """Return the rule that the first inputs have a rank."""

    def rule(node: onnx.NodeProto, facts: GraphFacts) -> str | None:
        wrong = [n for n in node.input[:count] if len(facts.shapes.get(n, [0] * rank)) != rank]
        return f"{wrong} must have {rank} dimensions" if wrong else None

    return rule


def masked_attention(node: onnx.NodeProto, facts: GraphFacts) -> str | None:
    """Attention without cache inputs; causal is aligned to the wrong corner behind a cache."""
    if any(node.input[4:]):
        return "past_key, past_value and nonpad_kv_seqlen are not supported"
    given = attributes(node)
    if given.get("softcap") or given.get("qk_matmul_output_mode"):
        return "softcap and qk_matmul_output_mode are not supported"
    if given.get("is_causal"):
        return "is_causal aligns to the upper left corner: wrong behind a cache; give a mask"
    return None


def cache_update(node: onnx.NodeProto, facts: GraphFacts) -> str | None:
    """A cache of fixed capacity that is an input of the graph, updated into an output."""
    given = attributes(node)
    if given.get("axis", -2) != -2 or given.get("mode", b"linear") != b"linear":
        return "only axis -2 and linear mode are supported"
    past, present = node.input[0], node.output[0]
    if past not in facts.inputs or present not in facts.outputs:
        return "the cache must be an input of the graph, and the result an output"
    capacity = facts.shapes.get(past, [])[2:3]
    if not capacity or not isinstance(capacity[0], int):
        return "the cache's capacity must be a fixed number"
    return None


def zero_point_is_zero(node: onnx.NodeProto, facts: GraphFacts) -> str | None:
    """Quantisation is symmetric."""
    name = node.input[2] if len(node.input) > 2 else ""
    if name and (name not in facts.constants or numpy_helper.to_array(facts.constants[name]).any()):
        return "the zero point must be 0"
    return None


def scale_of_activations(node: onnx.NodeProto, facts: GraphFacts) -> str | None:
    """An activation has one scale: a scale for each row or token is for weights alone."""
    if node.input[0] in facts.constants or not facts.shapes.get(node.input[1]):
        return None
    return "an activation takes one scale for the whole tensor; per-token scales are refused"


def sorted_topk(node: onnx.NodeProto, facts: GraphFacts) -> str | None:
    """At most 3840 values, sorted."""
    if attributes(node).get("sorted", 1) != 1:
        return "sorted must be 1"
    k = facts.constants.get(node.input[1])
    if k is not None and int(numpy_helper.to_array(k).item()) >= MAX_TOPK:
        return f"k must be below {MAX_TOPK}"
    return None


def floating_data(node: onnx.NodeProto, facts: GraphFacts) -> str | None:
    """The data is floating point, whatever the other inputs are."""
    name = node.input[0]
    return None if facts.types.get(name) in FLOATS else f"{name} must be floating point"


def int64_positions(node: onnx.NodeProto, facts: GraphFacts) -> str | None:
    """Positions of a rotary embedding are int64."""
    name = node.input[3] if len(node.input) > 3 else ""
    return "position_ids must be int64" if name and facts.types[name] != TensorProto.INT64 else None


ANY = TYPES - QUANTIZED
LOGIC = Operator(NUMBERS | BOOL)
NUMERIC = Operator(NUMBERS)
FLOATING = Operator(FLOATS)
MOVING = Operator(ANY)
REDUCING = Operator(NUMBERS, rules=(constant_input(1),))

OPERATORS: dict[str, Operator] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Min", "Max", "Pow", "Neg", "Abs", "Range"),
                    NUMERIC),
    **dict.fromkeys(("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"), LOGIC),
    **dict.fromkeys(("And", "Or", "Not", "Xor"), Operator(BOOL)),
    **dict.fromkeys(("Sqrt", "Exp", "Log", "Sin", "Cos", "Tanh", "Sigmoid", "Softmax", "Relu",
                     "Erf", "Gelu", "MatMul", "Reciprocal"), FLOATING),
    **dict.fromkeys(("Reshape", "Transpose", "Concat", "Unsqueeze", "Squeeze", "Identity", "Where",
                     "Split", "Slice", "Expand", "Shape", "GatherND", "GatherElements", "Trilu",
                     "ScatterND", "Constant"), MOVING),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"), REDUCING),
    "Cast": Operator(TYPES),
    "Gather": Operator(ANY),
    "Gemm": FLOATING,
    "Swish": Operator(FLOATS, (11, 0)),
    "LayerNormalization": Operator(FLOATS, rules=(one_output,)),
    "RMSNormalization": Operator(FLOATS, (10, 15)),
    "RotaryEmbedding": Operator(FLOATS | INTEGERS, (10, 15), (int64_positions,)),
    "Attention": Operator(FLOATS | BOOL, (10, 14), (one_output, ranked(4, 4), masked_attention)),
    "TensorScatter": Operator(NUMBERS, (10, 15), (ranked(4, 2), cache_update)),
    "QuantizeLinear": Operator(TYPES, rules=(zero_point_is_zero, scale_of_activations)),
    "DequantizeLinear": Operator(TYPES, rules=(zero_point_is_zero,)),
    "TopK": Operator(NUMBERS, rules=(sorted_topk,)),
    "CumSum": Operator(NUMBERS, rules=(constant_input(1), floating_data)),
}  # fmt: skip
