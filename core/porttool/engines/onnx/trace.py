"""Looking inside the graph: every module's input and output as extra outputs of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from porttool.config import dtype_name
from porttool.engines.onnx.element_types import ELEMENT_TYPES
from porttool.engines.onnx.graph import MODULES
from porttool.engines.onnx.session import SessionSettings, make_session, translated_errors
from porttool.nn import Step


def traced(
    graph: bytes, folder: Path, settings: SessionSettings, step: Step, table: Tensor
) -> dict[str, Tensor]:
    """Run a step over an empty cache; return `<module>.in` and `.out` in order, then `logits`.

    Floating-point values are float32 on the CPU. The last norm and the head see rows
    [n * width, …] in the graph; they come back as [n, width, …] like everything else.
    """
    model = onnx.ModelProto.FromString(graph)
    modules = json.loads({p.key: p.value for p in model.metadata_props}[MODULES])
    wanted = {name for pair in modules.values() for name in pair}
    seen = expose(model, wanted)
    session = make_session(model.SerializeToString(), settings, folder)
    names = [*seen.values(), "logits"]
    with translated_errors(f"{folder}: ONNX Runtime could not run the traced step"):
        found = session.run_with_ort_values(names, trace_feeds(session, step, table))
    values = {
        name: by_row(torch.from_numpy(value.numpy()), step)
        for name, value in zip(names, found, strict=True)
    }
    record = {}
    for module, ends in modules.items():
        for end, value in zip(("in", "out"), ends, strict=True):
            record[f"{module}.{end}"] = values[seen[value]]
    return {**record, "logits": values["logits"]}


def by_row(value: Tensor, step: Step) -> Tensor:
    """Return [n * width, d] as [n, width, d]; what is by row already as it is."""
    flat = value.is_floating_point() and value.ndim == 2
    return value.view(*step.tokens.shape, -1) if flat else value


def expose(model: onnx.ModelProto, wanted: set[str]) -> dict[str, str]:
    """Add outputs for values, as float32 where they are 16-bit; value → name of its output."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    graph = inferred.graph
    types = {v.name: v.type.tensor_type.elem_type
             for v in [*graph.value_info, *graph.input, *graph.output]}  # fmt: skip
    seen = {}
    for name in sorted(wanted):
        kept = types[name] in (TensorProto.FLOAT, TensorProto.INT64)
        op, kind = ("Identity", types[name]) if kept else ("Cast", TensorProto.FLOAT)
        attributes = {} if kept else {"to": kind}
        seen[name] = f"traced:{name}"
        model.graph.node.append(helper.make_node(op, [name], [seen[name]], **attributes))
        model.graph.output.append(helper.make_tensor_value_info(seen[name], kind, None))
    return seen


def trace_feeds(session: Any, step: Step, table: Tensor) -> dict[str, Any]:
    """Return the inputs of a step that starts from nothing, every token wanted."""
    given = {
        "tokens": step.tokens,
        "positions": step.positions,
        "starts": step.starts,
        "wanted": torch.arange(step.tokens.numel()),
        "prompt_table": table.cpu(),
    }
    feeds = {}
    for value in session.get_inputs():
        tensor = given.get(value.name)
        if tensor is None:
            tensor = torch.zeros(len(step.slots), *value.shape[1:], dtype=table.dtype)
        feeds[value.name] = as_ort_value(tensor)
    return feeds


def as_ort_value(tensor: Tensor) -> Any:
    """Hand a tensor on the CPU to ONNX Runtime; numpy has no bfloat16, so its bits go over."""
    from onnxruntime import OrtValue

    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    number = ELEMENT_TYPES[dtype_name(tensor.dtype)]
    return OrtValue.ortvalue_from_numpy_with_onnx_type(bits.numpy(), number)
