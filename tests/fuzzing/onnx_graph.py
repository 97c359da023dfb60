"""Changes of an ONNX graph that leave it a protobuf message: values, names, nodes, weights."""

from __future__ import annotations

from random import Random
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor as Field

from fuzzing.mutate import NUMBERS, mutate_bytes

TEXTS = ("", "x" * 5000, "/etc/passwd", "../../secret", "../engine.json", "model.onnx", ".", "\0",
         "-1", "1e5", str(1 << 40), str(1 << 63), "0", "4", "If", "Loop", "logits",
         "ai.x")  # fmt: skip
"""Places, sizes and names that a weight, a node or a value may claim."""

OPERATORS = ("Identity", "Add", "MatMul", "Gather", "Reshape", "Transpose", "Expand", "Cast",
             "Softmax", "Range", "ConstantOfShape", "Concat", "Squeeze", "Nothing")  # fmt: skip


def mutate_graph(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Change one to three things in a model."""
    model = onnx.ModelProto.FromString(data)
    said = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choice((change_field, change_field, change_weight, change_node, change_node))
        said.append(change(rng, model))
    return model.SerializeToString(deterministic=True), "graph: " + "+".join(said)


def change_weight(rng: Random, model: onnx.ModelProto) -> str:
    """Change where a weight lies or what it says it is."""
    stored = [t for t in model.graph.initializer if t.external_data]
    if not stored:
        return change_field(rng, model)
    weight = rng.choice(stored)
    match rng.randrange(4):
        case 0:
            weight.dims[:] = [size(rng), *weight.dims[1:]]
            return f"{weight.name} is {list(weight.dims)}"
        case 1:
            weight.data_type = rng.randrange(30)
            return f"{weight.name} is of type {weight.data_type}"
        case _:
            entry = rng.choice(weight.external_data)
            near = int(entry.value) if entry.value.isdigit() else 0
            entry.value = rng.choice((*TEXTS, str(near + 4), str(near * 2), str(near // 2)))
            return f"{weight.name}: {entry.key} {entry.value!r:.40}"


def change_node(rng: Random, model: onnx.ModelProto) -> str:
    """Give a node another operator, another input, or another place; or take it away."""
    nodes = model.graph.node
    if not nodes:
        return change_field(rng, model)
    at, other = rng.randrange(len(nodes)), rng.choice(nodes)
    node = nodes[at]
    match rng.randrange(5):
        case 0:
            node.op_type = rng.choice((other.op_type, *OPERATORS))
        case 1 | 2 if node.input:
            value = rng.choice((*other.input, *other.output, "tokens", ""))
            node.input[rng.randrange(len(node.input))] = value
        case 3:
            node.CopyFrom(onnx.NodeProto.FromString(other.SerializeToString()))
        case _:
            del nodes[at]
            return "a node less"
    return f"{node.op_type} of {list(node.input)!r:.60}"


def change_field(rng: Random, model: onnx.ModelProto) -> str:
    """Change any field anywhere: set it, empty it, or double what is repeated."""
    message, field = rng.choice(list(fields(model)))
    if field.is_repeated:
        values = getattr(message, field.name)
        at = rng.randrange(len(values))
        match rng.randrange(3):
            case 0:
                del values[at]
            case 1:
                values.extend([values[at]])
            case _ if field.message_type is None:
                values[at] = other_value(rng, field, values[at])
            case _:
                values[at].Clear()
    elif field.message_type is not None or rng.random() < 0.2:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, other_value(rng, field, getattr(message, field.name)))
    return f"{message.DESCRIPTOR.name}.{field.name}"


def fields(message: Any) -> Any:
    """Yield every set field below a message, with the message that it belongs to."""
    for field, value in message.ListFields():
        yield message, field
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from fields(inner)


def other_value(rng: Random, field: Field, value: Any) -> Any:
    """Return another value that the field's type can hold."""
    match field.cpp_type:
        case Field.CPPTYPE_STRING if field.type == Field.TYPE_BYTES:
            return mutate_bytes(rng, value)[0]
        case Field.CPPTYPE_STRING:
            return rng.choice(TEXTS)
        case Field.CPPTYPE_FLOAT | Field.CPPTYPE_DOUBLE:
            return rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf"), value * 2))
        case Field.CPPTYPE_ENUM:
            return rng.choice(field.enum_type.values).number
        case Field.CPPTYPE_INT64:
            return size(rng)
        case _:
            return size(rng) % (1 << 31)


def size(rng: Random) -> int:
    """Return a number that fits 64 bits with a sign."""
    return rng.choice([n for n in NUMBERS if n < 1 << 63])
