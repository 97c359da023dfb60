"""What TensorRT's ONNX parser refuses, found before a build: operators, types, forms, sizes.

The rules are those of the parser's operator table and change log, TensorRT 10.13 to 11. A graph
that passes may still be refused by a version that we do not know; one that fails would be.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import helper

from porttool.engines.tensorrt.graph_facts import GraphFacts, dimensions, gather_facts
from porttool.engines.tensorrt.operators import OPERATORS, Version
from porttool.errors import EngineError

OPSETS = range(9, 25)
MAX_IR = 11
MAX_FILE_BYTES = 1 << 31
"""A protobuf message cannot be larger: beyond it, weights must be external."""


@dataclass(frozen=True)
class Problem:
    """Something that TensorRT refuses."""

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        """Return it as one line."""
        return f"{self.operator} {self.node}: {self.reason}"


Shapes = dict[str, list[int | str]]
"""Dimensions by name of a tensor, a name where one may vary."""


def tensor_shapes(path: Path) -> tuple[Shapes, Shapes]:
    """Return the dimensions of a graph's inputs and of its outputs."""
    graph = onnx.load(str(path), load_external_data=False).graph
    inputs, outputs = ({v.name: dimensions(v) for v in vs} for vs in (graph.input, graph.output))
    return inputs, outputs


def require_supported(path: Path, version: Version) -> None:
    """Raise EngineError with everything that TensorRT of a version refuses in a file."""
    problems = find_problems(path, version)
    if problems:
        listed = "\n  ".join(map(str, problems[:20]))
        raise EngineError(
            f"{path}: TensorRT {version[0]}.{version[1]} refuses this graph:\n  {listed}"
        )


def find_problems(path: Path, version: Version) -> list[Problem]:
    """Return what TensorRT of a version refuses in a file."""
    size = path.stat().st_size
    if size >= MAX_FILE_BYTES:
        reason = f"the file has {size} bytes; over 2 GB, weights must be external data"
        return [Problem(path.name, "model", reason)]
    model = onnx.load(str(path), load_external_data=False)
    found = [Problem(path.name, "model", reason) for reason in model_problems(model)]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    facts = gather_facts(inferred)
    for node in inferred.graph.node:
        reasons = node_problems(node, facts, version)
        found += [Problem(node.name or node.output[0], node.op_type, r) for r in reasons]
    return found


def model_problems(model: onnx.ModelProto) -> list[str]:
    """Return what is wrong with versions and with the types of inputs and weights."""
    found = []
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version not in OPSETS:
            found.append(f"opset {opset.version}; TensorRT reads {OPSETS[0]} to {OPSETS[-1]}")
    if model.ir_version > MAX_IR:
        found.append(f"IR version {model.ir_version}; porttool writes at most {MAX_IR}")
    return found


def node_problems(node: onnx.NodeProto, facts: GraphFacts, version: Version) -> list[str]:
    """Return what TensorRT refuses about one node."""
    if node.domain not in ("", "ai.onnx"):
        return [f"the domain {node.domain!r} is not standard ONNX"]
    known = OPERATORS.get(node.op_type)
    if known is None:
        return ["TensorRT has no importer for this operator, or we do not know of one"]
    if version < known.since:
        return [f"needs TensorRT {known.since[0]}.{known.since[1]}"]
    found = []
    for name in filter(None, [*node.input, *node.output]):
        kind = facts.types.get(name)
        if kind is not None and kind not in known.types:
            found.append(f"{name} is {helper.tensor_dtype_to_string(kind)}")
    return found + [reason for rule in known.rules if (reason := rule(node, facts)) is not None]
