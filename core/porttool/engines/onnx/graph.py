"""A typed, named ONNX graph under construction: every value has a name that we chose."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from porttool.config import Dtype
from porttool.engines.onnx.element_types import ELEMENT_TYPES
from porttool.errors import EngineError

if TYPE_CHECKING:
    from porttool.engines.onnx.weights import StoredTensor

IR_VERSION = 11
MODULES = "porttool.modules"
"""Key of the model's metadata: canonical module → names of what goes in and what comes out."""

Shape = Sequence[int | str]


class Graph:
    """Nodes, inputs, outputs and weights of one model; values are referred to by name."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._modules: dict[str, tuple[str, str]] = {}

    def input(self, name: str, dtype: str, shape: Shape) -> str:
        """Declare an input; a string in the shape is a dimension known at run time."""
        self._inputs.append(helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype], shape))
        return name

    def output(self, name: str, dtype: str, shape: Shape) -> None:
        """Declare a value as an output."""
        self._outputs.append(helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype], shape))

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        output: str,
        attributes: Mapping[str, Any] | None = None,
    ) -> str:
        """Add a node with one output, named like it."""
        return self.nodes(op, inputs, [output], attributes)[0]

    def nodes(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        attributes: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Add a node with several outputs, named like the first."""
        made = helper.make_node(op, list(inputs), list(outputs), name=outputs[0])
        made.attribute.extend(helper.make_attribute(k, v) for k, v in (attributes or {}).items())
        self._nodes.append(made)
        return list(outputs)

    def module(self, name: str, value_in: str, value_out: str) -> str:
        """Note what goes into and comes out of a module of the canonical decoder."""
        self._modules[name] = (value_in, value_out)
        return value_out

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> str:
        """Put a small array into the file itself; a name used before is the same array."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def integers(self, *values: int) -> str:
        """Put a vector of int64 into the file: a shape, axes, the sizes of a split."""
        return self.constant("int64:" + ",".join(map(str, values)), np.array(values, np.int64))

    def scalar(self, value: float, dtype: Dtype) -> str:
        """Put one number of a type into the file."""
        name = f"{dtype}:{value!r}"
        if name not in self._initializers:
            self._initializers[name] = helper.make_tensor(name, ELEMENT_TYPES[dtype], (), [value])
        return name

    def weight(self, tensor: StoredTensor) -> str:
        """Refer to a tensor in a file beside the model."""
        if tensor.name not in self._initializers:
            proto = TensorProto(
                name=tensor.name,
                dims=tensor.shape,
                data_type=ELEMENT_TYPES[tensor.dtype],
                data_location=TensorProto.EXTERNAL,
            )
            place = {"location": tensor.file, "offset": tensor.offset, "length": tensor.nbytes}
            for key, value in place.items():
                proto.external_data.add(key=key, value=str(value))
            self._initializers[tensor.name] = proto
        return tensor.name

    def model(self, name: str, metadata: Mapping[str, str]) -> onnx.ModelProto:
        """Return the finished model."""
        graph = helper.make_graph(
            self._nodes, name, self._inputs, self._outputs, list(self._initializers.values())
        )
        model = helper.make_model(
            graph,
            producer_name="porttool",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", self.opset)],
        )
        helper.set_model_props(model, {**metadata, MODULES: json.dumps(self._modules)})
        return model


def serialized(model: onnx.ModelProto) -> bytes:
    """Return a model as its file holds it: the same bytes for the same model."""
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def check_model(path: str) -> onnx.ModelProto:
    """Check a model file and infer every shape strictly; return it with the shapes, no weights.

    Raises EngineError naming the value whose type or rank is not known, or the checker's finding.
    """
    try:
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(
            model, check_type=True, strict_mode=True, data_prop=True
        )
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EngineError(f"{path}: the exported graph is not valid ONNX: {error}") from error
    known = {value.name for value in [*inferred.graph.value_info, *inferred.graph.output]
             if value.type.tensor_type.HasField("shape")}  # fmt: skip
    for node in inferred.graph.node:
        if missing := set(node.output) - known:
            raise EngineError(f"{path}: no shape can be inferred for {sorted(missing)}")
    return inferred
