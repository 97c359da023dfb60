"""Greedy decoding on a CPU: the graph without its head, whose product compiled code replaces.

A step of one token is bound by reading the weights, and the head is the largest of them. Whoever
asks for the likeliest token alone needs few of its rows (`native.head`). One session does both, so
that no weight is held twice: the graph, in memory, gets an input that says which rows to project.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from porttool.engines.native.head import ScreenedHead
from porttool.engines.onnx.cached_graph import HIDDEN, PROJECTED


def choosing(graph: bytes, folder: Path) -> tuple[bytes, ScreenedHead]:
    """Return a float32 model of a folder with an input that chooses rows, and its head.

    Raises NativeUnavailable where nothing can be compiled.
    """
    model = onnx.ModelProto.FromString(graph)
    place, head = next((i, n) for i, n in enumerate(model.graph.node) if n.output[0] == "logits")
    screened = screened_head(model, head.input[1], folder)
    project_some(model.graph, place)
    return model.SerializeToString(), screened


def screened_head(model: onnx.ModelProto, name: str, folder: Path) -> ScreenedHead:
    """Map a weight from its file, as ONNX Runtime does: the system can take its pages back."""
    stored = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    entry = {item.key: item.value for item in stored.external_data}
    rows = np.memmap(
        folder / entry["location"], np.float32, "c", int(entry["offset"]), tuple(stored.dims)
    )
    return ScreenedHead(torch.from_numpy(rows))


def project_some(graph: onnx.GraphProto, place: int) -> None:
    """Let the head, the node at `place`, project the rows of the last norm that a run asks for."""
    rows = helper.make_node("Gather", [HIDDEN, PROJECTED], ["logits.rows"], name="logits.rows")
    graph.node[place].input[0] = rows.output[0]
    graph.node.insert(place, rows)
    graph.input.append(helper.make_tensor_value_info(PROJECTED, TensorProto.INT64, [PROJECTED]))
    logits = next(value for value in graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[0].dim_param = PROJECTED
    graph.output.append(helper.make_tensor_value_info(HIDDEN, TensorProto.FLOAT, None))
