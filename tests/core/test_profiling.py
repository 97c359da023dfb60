"""Profiles: what a step costs, whose every node is, and a trace that holds together."""

from __future__ import annotations

import csv
import json
import sys

import pytest
import torch

import drawn
import tiny
from porttool import cli
from porttool.errors import EngineError, UsageError
from porttool.nn import meta_decoder
from porttool.plugins import load_registry
from porttool.profiling import ProfileShape, profile
from porttool.profiling.costs import Cost, Peak, StepSize, total_cost
from porttool.profiling.run import outermost
from porttool.profiling.table import make_table, module_of, over_layers
from porttool.profiling.tools import run_tool, tool_command
from porttool.runner import TimedNode, load_runner

SHAPE = ProfileShape(batch=2, prompt=9, new=4)


@pytest.mark.parametrize("name", drawn.SHAPES)
def test_decoding_one_token_costs_every_weight_once(name):
    """Two operations and one read for each number of a matrix; the cache is read besides."""
    config = drawn.shape(name)
    cost = total_cost(config, StepSize(batch=1, width=1, reach=10, itemsize=4))
    shapes = {n: t.shape for n, t in meta_decoder(config).state_dict().items()}
    matrices = sum(
        s.numel() for n, s in shapes.items()
        if len(s) == 2 and n not in ("position.weight", "embedding.weight")
    )  # fmt: skip
    matrices += shapes["embedding.weight"].numel() if config.tied_head else 0
    attention = 4 * config.n_head * config.head_dim * 10 * config.n_layer
    assert cost.flops == 2 * matrices + attention
    cache = 2 * config.n_kv_head * config.head_dim * 10 * config.n_layer
    assert 4 * (matrices + cache) < cost.nbytes < 4.8 * (matrices + cache)


def test_roofline_is_the_slower_of_the_two():
    peak = Peak(flops=100.0, bandwidth=10.0)
    assert Cost(200, 5).seconds(peak) == 2
    assert Cost(200, 50).seconds(peak) == 5


@pytest.mark.parametrize(
    ("node", "found"),
    [
        ("layers.3.attention.qkv.product", (3, "attention.qkv")),
        ("layers.3.attention.mixed", (3, "attention")),
        ("layers.12.attention.out.out", (12, "attention.out")),
        ("layers.0.mlp.act", (0, "mlp")),
        ("layers.0.mlp.down.product/MatMulAddFusion", (0, "mlp.down")),
        ("layers.1.norm2.out", (1, "norm2")),
        ("layers.1.attended", (1, "residual")),
        ("layers.1.out", (1, "residual")),
        ("present_value.7", (7, "attention")),
        ("logits", (-1, "head")),
        ("norm.out", (-1, "head")),
        ("embedding.out", (-1, "embedding")),
        ("something", (-1, "other")),
    ],
)
def test_modules_of_nodes(node, found):
    assert module_of(node) == found


def test_tables_are_means_over_runs():
    config = drawn.shape("gpt2")
    nodes = [("decode", TimedNode("layers.0.mlp.up.product", "MatMul", run, 0.0, 30.0))
             for run in (3, 4)]  # fmt: skip
    peak = Peak(1e9, 1e9)
    sizes = {"decode": StepSize(1, 1, 5, 4)}
    (line,) = make_table(nodes, config, sizes=sizes, runs={"decode": 2}, peak=peak)
    assert (line.layer, line.module, line.seconds) == (0, "mlp.up", 30e-6)
    assert line.cost.flops == 2 * 56 * 72
    assert over_layers([line, line], peak)[0].seconds == 60e-6


def test_operations_inside_others_do_not_count_twice():
    events = [
        {"name": n, "tid": t, "ts": b, "dur": d}
        for n, t, b, d in (("a", 1, 0, 10), ("b", 1, 2, 3), ("c", 2, 2, 3), ("d", 1, 10, 5))
    ]
    assert [e["name"] for e in outermost(events)] == ["a", "c", "d"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model as an ONNX and as a torch engine."""
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("profiled")
    config = drawn.shape("gpt2")
    checkpoint = drawn.checkpoint(path / "checkpoint", config, drawn.weights(config))
    drawn.engine(checkpoint, path / "onnx", kind="onnx")
    drawn.engine(checkpoint, path / "torch")
    return path


def open_runner(path):
    from porttool.engine import Engine

    return load_runner(Engine.open(path), load_registry(), {"device": "cpu"})


def test_every_node_of_the_graph_in_one_trace(tmp_path, folder):
    runner = open_runner(folder / "onnx")
    before = tiny.full_logits(runner, [1, 2, 3])
    found = profile(runner, SHAPE, tmp_path / "out")
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    steps = [e for e in events if e.get("name") == "porttool.decode" and e["ph"] == "X"]
    nodes = [e for e in events if e.get("cat") == "engine"]
    assert len([e for e in events if e.get("cat") == "user_annotation"]) >= 2 + 1 + SHAPE.new
    assert len([n for n in nodes if n["name"].startswith("layers.1.mlp.up")]) >= 3 + SHAPE.new
    first = min(e["ts"] for e in steps)
    assert any(first <= n["ts"] < first + 1e6 for n in nodes)
    modules = {(line.layer, line.module) for line in found.lines if line.phase == "decode"}
    assert {(i, m) for i in (0, 1) for m in ("attention", "attention.qkv", "mlp.up")} <= modules
    in_nodes = sum(line.seconds for line in found.lines if line.phase == "decode")
    assert 0 < in_nodes < max(e["dur"] for e in steps) / 1e6
    rows = list(csv.DictReader((tmp_path / "out" / "layers.csv").read_text().splitlines()))
    assert len(rows) == len(found.lines)
    torch.testing.assert_close(tiny.full_logits(runner, [1, 2, 3]), before)


def test_engines_without_a_profiler_of_their_own_have_torch_operations(tmp_path, folder):
    found = profile(open_runner(folder / "torch"), SHAPE, tmp_path / "out")
    assert found.lines == []
    assert found.kernels and all(calls > 0 for _, calls, _ in found.kernels)
    assert found.phases["prefill"]["flops"] > found.phases["decode"]["flops"]
    with pytest.raises(UsageError, match="batch 9, prompt 9, 4 new tokens: the engine holds 4"):
        profile(open_runner(folder / "torch"), ProfileShape(9, 9, 4), tmp_path)


def test_command_writes_everything(tmp_path, folder, capsys):
    pytest.importorskip("matplotlib")
    size = ["--prompt-len", "9", "--new-tokens", "2", "--output", str(tmp_path / "out")]
    assert cli.invoke(["profile", str(folder / "onnx"), *size, "--set", "device", "cpu"]) == 0
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert names == {"trace.json", "layers.csv", "kernels.csv", "profile.json", "modules.png"}
    assert "of the roofline" in capsys.readouterr().out


def test_tools_around_a_run(tmp_path, monkeypatch):
    nsys = tool_command("nsys", ["profile", "ENGINE"], tmp_path)
    assert nsys[-3:] == ["porttool", "profile", "ENGINE"]
    assert "--cuda-graph-trace=node" in nsys and "--trace=cuda,nvtx,cublas,osrt" in nsys
    ncu = tool_command("ncu", ["profile", "ENGINE"], tmp_path)
    assert ncu[1:4] == ["--section", "ComputeWorkloadAnalysis", "--csv"]
    with pytest.raises(UsageError, match=r"nowhere-to-be-found is not installed .* --flag"):
        run_tool(["nowhere-to-be-found", "--flag"])
    run_tool([sys.executable, "-c", ""])
    with pytest.raises(EngineError, match="status 3"):
        run_tool([sys.executable, "-c", "raise SystemExit(3)"])
