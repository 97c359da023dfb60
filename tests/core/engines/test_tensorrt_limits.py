"""The checker of TensorRT's limits: our graphs pass, and each graph that it must refuse fails."""

from __future__ import annotations

import numpy as np
import pytest

import drawn

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from porttool.engines.tensorrt import limits  # noqa: E402
from porttool.engines.tensorrt.limits import find_problems, require_supported  # noqa: E402
from porttool.errors import EngineError  # noqa: E402

F, H, INT, B = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.BOOL
CACHE = [2, 4, 32, 8]


def graph(folder, nodes, inputs, outputs, constants=(), opset=24, ir=11):
    """Write a model of nodes; inputs and outputs are (name, type, shape)."""
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(*value) for value in inputs],
            [helper.make_tensor_value_info(*value) for value in outputs],
            [numpy_helper.from_array(array, name) for name, array in constants],
        ),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("custom", 1)],
        ir_version=ir,
    )
    path = folder / "model.onnx"
    onnx.save(made, str(path))
    return path


def node(op, inputs, outputs=("y",), **attributes):
    return helper.make_node(op, list(inputs), list(outputs), **attributes)


def attention(*extra, outputs=("y",), shape=(2, 4, 3, 8), mask=(2, 1, 3, 3), **attributes):
    """One Attention node over q, k, v and what else is given."""
    names = ["q", "k", "v", *extra]
    inputs = [(n, F, list(shape)) for n in ("q", "k", "v")]
    inputs += [(n, F, list(shape)) for n in extra if n and n != "m"]
    inputs += [("m", B, mask)] if "m" in extra else []
    return [node("Attention", names, outputs, **attributes)], inputs, [("y", F, None)], ()


def scatter(**attributes):
    inputs = [("past", F, CACHE), ("new", F, [2, 4, 1, 8]), ("at", INT, [2])]
    return (
        [node("TensorScatter", ["past", "new", "at"], **attributes)],
        inputs,
        [("y", F, CACHE)],
        (),
    )


def quantize(scale, zero=0):
    constants = [("s", np.full(scale, 0.1, np.float32)), ("z", np.full(scale, zero, np.int8))]
    axis = {"axis": 0} if scale else {}
    nodes = [node("QuantizeLinear", ["x", "s", "z"], **axis)]
    return nodes, [("x", F, [4, 8])], [("y", TensorProto.INT8, [4, 8])], constants


def quantized_product():
    """A static scale for the activation, one a column for the weight: W8A8 as it may come."""
    constants = [("s", np.array(0.1, np.float32)), ("z", np.array(0, np.int8)),
                 ("w", np.ones((8, 4), np.int8)), ("ws", np.ones(4, np.float32))]  # fmt: skip
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "ws"], ["wd"], axis=1),
        node("MatMul", ["xd", "wd"]),
    ]
    return nodes, [("x", F, [2, 8])], [("y", F, [2, 4])], constants


def topk(k, **attributes):
    nodes = [node("TopK", ["x", "k"], ["y", "i"], **attributes)]
    outputs = [("y", F, None), ("i", INT, None)]
    return nodes, [("x", F, [1, 9999])], outputs, [("k", np.array([k]))]


def plain(op, kind=F, **attributes):
    return [node(op, ["x"], **attributes)], [("x", kind, [4])], [("y", kind, [4])], ()


def dynamic_cache():
    nodes, inputs, _, _ = scatter()
    moving = [2, 4, "capacity", 8]
    return nodes, [("past", F, moving), *inputs[1:]], [("y", F, moving)], ()


def inner_cache():
    nodes, inputs, outputs, _ = scatter()
    nodes = [node("Identity", ["past"], ["inner"]), node("TensorScatter", ["inner", "new", "at"])]
    return nodes, inputs, outputs, ()


def reduction(axes_known):
    nodes = [node("ReduceMean", ["x", "axes"])]
    inputs = [("x", F, [4, 8])] + ([] if axes_known else [("axes", INT, [1])])
    return nodes, inputs, [("y", F, None)], [("axes", np.array([1]))] if axes_known else ()


def rotary(kind):
    nodes = [node("RotaryEmbedding", ["x", "c", "s", "p"])]
    inputs = [("x", F, [1, 2, 3, 8]), ("c", F, [9, 4]), ("s", F, [9, 4]), ("p", kind, [1, 3])]
    return nodes, inputs, [("y", F, [1, 2, 3, 8])], ()


REFUSED = {
    "unknown operator": (plain("Hardmax"), "no importer"),
    "custom domain": (plain("Relu", domain="custom"), "not standard ONNX"),
    "float64": (plain("Relu", TensorProto.DOUBLE), "x is TensorProto.DOUBLE"),
    "integers where floats belong": (plain("Abs", TensorProto.INT8), "x is TensorProto.INT8"),
    "causal": (attention(is_causal=1), "aligns to the upper left corner"),
    "softcap": (attention(softcap=30.0), "softcap"),
    "three dimensions": (
        attention(shape=(2, 3, 32), q_num_heads=4, kv_num_heads=4), "must have 4 dimensions"),
    "mask of two dimensions": (attention("m", mask=(3, 3)), "['m'] must have 4"),
    "cache inside attention": (
        attention("", "pk", "pv", outputs=("y", "nk", "nv")), "past_key, past_value"),
    "present outputs": (attention(outputs=("y", "nk", "nv")), "the outputs ['nk', 'nv']"),
    "scatter on another axis": (scatter(axis=2), "only axis -2"),
    "ring buffer": (scatter(axis=-2, mode="circular"), "linear mode"),
    "capacity not fixed": (dynamic_cache(), "capacity must be a fixed number"),
    "cache is no input": (inner_cache(), "must be an input of the graph"),
    "per-token scales": (quantize([4]), "per-token scales are refused"),
    "zero point": (quantize([], zero=3), "zero point must be 0"),
    "large k": (topk(3840), "k must be below 3840"),
    "unsorted": (topk(5, sorted=0), "sorted must be 1"),
    "axes not known": (reduction(False), "axes must be an initializer"),
    "rotary positions": (rotary(TensorProto.INT32), "position_ids must be int64"),
    "integer cumulative sum": (
        ([node("CumSum", ["x", "a"])], [("x", INT, [4])], [("y", INT, [4])], [("a", np.array(0))]),
        "must be floating point"),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_graphs(tmp_path, parts, message):
    path = graph(tmp_path, *parts)
    assert message in "\n".join(map(str, find_problems(path, (11, 4))))
    with pytest.raises(EngineError, match=r"TensorRT 11\.4 refuses this graph"):
        require_supported(path, (11, 4))


ACCEPTED = {
    "attention with a mask": attention("m"),
    "cache update": scatter(axis=-2),
    "one scale": quantize([]),
    "quantised product": quantized_product(),
    "small k": topk(50),
    "known axes": reduction(True),
    "rotary": rotary(INT),
    "half": plain("Relu", H),
}


@pytest.mark.parametrize("parts", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted_graphs(tmp_path, parts):
    assert find_problems(graph(tmp_path, *parts), (11, 4)) == []


def test_versions_and_size(tmp_path, monkeypatch):
    path = graph(tmp_path, *plain("Relu"), opset=25, ir=12)
    found = "\n".join(map(str, find_problems(path, (11, 4))))
    assert "opset 25" in found and "IR version 12" in found
    path = graph(tmp_path, *scatter())
    assert [str(p) for p in find_problems(path, (10, 14))] == [
        "TensorScatter y: needs TensorRT 10.15"
    ]
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 100)
    with pytest.raises(EngineError, match="over 2 GB, weights must be external data"):
        require_supported(path, (11, 4))


@pytest.mark.parametrize(("cache", "version"), [("scatter", (10, 15)), ("concat", (10, 13))])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", drawn.SHAPES)
def test_our_graphs_pass(tmp_path, shape, cache, version, dtype):
    from porttool.builder import BuildRequest
    from porttool.config import Limits
    from porttool.engines.onnx.export import export_model
    from porttool.progress import SILENT

    config = drawn.shape(shape)
    checkpoint = drawn.checkpoint(tmp_path / "checkpoint", config, drawn.weights(config))
    request = BuildRequest(
        dtype, Limits(max_input_len=9, max_output_len=9, max_prompt_rows=2), config
    )
    (tmp_path / "out").mkdir()
    made = export_model(checkpoint, request, tmp_path / "out", form=cache, progress=SILENT)
    assert find_problems(made.path, version) == []
