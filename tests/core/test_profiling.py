"""Profiles: what a step costs, whose every node is, and a trace that holds together."""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path

import pytest
import torch

import drawn
import tiny
from porttool import cli
from porttool.benchmark import Cell
from porttool.benchmark.roofline import decode_cost, prefill_cost
from porttool.errors import EngineError, UsageError
from porttool.nn import meta_decoder
from porttool.plugins import load_registry
from porttool.profiling import ProfileShape, peak, profile
from porttool.profiling.costs import Cost, Peak, StepSize, total_cost
from porttool.profiling.counters import Counter, by_kernel, read_counters, write_counters
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


def test_a_cpus_speed_is_not_that_of_a_type_it_lacks(monkeypatch):
    """Products in float16 may take a CPU a hundred times float32's time: more than 1000 %."""
    seconds = {torch.float16: 3.0, torch.bfloat16: 0.5, torch.float32: 1.0, torch.uint8: 1.0}
    monkeypatch.setattr(peak, "best_seconds", lambda call, cuda: seconds[call().dtype])
    assert peak.measure_peak("cpu", "float16").flops == 2 * 1024**3
    assert peak.measure_peak("cpu", "bfloat16").flops == 4 * 1024**3


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
    runner = open_runner(folder / "torch")
    found = profile(runner, SHAPE, tmp_path / "out")
    assert [(line.phase, line.layer, line.module) for line in found.lines] == [
        ("prefill", -1, "step"), ("decode", -1, "step")
    ]  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out" / "layers.csv").read_text().splitlines()))
    for row, (name, phase) in zip(rows, found.phases.items(), strict=True):
        assert (row["phase"], float(row["flops"])) == (name, phase["flops"])
        assert float(row["roofline"]) == pytest.approx(phase["roofline"], abs=1e-4)
    assert found.kernels and all(calls > 0 for _, calls, _ in found.kernels)
    assert found.phases["prefill"]["flops"] > found.phases["decode"]["flops"]
    cell = Cell(batch_size=SHAPE.batch, input_len=SHAPE.prompt, output_len=SHAPE.new)
    for phase, cost in (("prefill", prefill_cost), ("decode", decode_cost)):
        needed = cost(runner.config, cell, runner.engine.manifest.dtype)
        assert (found.phases[phase]["flops"], found.phases[phase]["bytes"]) == (
            needed.flops, needed.nbytes
        )  # fmt: skip
    with pytest.raises(UsageError, match=r"^--batch-size is 9, the engine holds 4: give"):
        profile(open_runner(folder / "torch"), ProfileShape(9, 9, 4), tmp_path)


def test_a_step_of_several_tokens_is_shared_by_them(tmp_path, folder, monkeypatch):
    """An engine that gives three at a time needs four steps for ten, and one for three."""
    from porttool.runner import Runner

    steps = []

    class Threes(Runner):
        name, decodes_on_device, tokens_at_once = "threes", True, 3

        def step(self, step, *, all_positions=False):
            return torch.zeros(len(step.slots), 211)

        def copy_slots(self, source, target):
            raise NotImplementedError

        def decode(self, step, n_tokens, choose=None):
            steps.append((step.starts.tolist(), n_tokens))
            time.sleep(0.06)
            return torch.zeros(len(step.slots), min(n_tokens, 3))

    runner = Threes(open_runner(folder / "torch").engine)
    found = profile(runner, ProfileShape(batch=2, prompt=9, new=10), tmp_path / "out")
    assert steps[1:] == [([9, 9], 10), ([12, 12], 7), ([15, 15], 4), ([18, 18], 1)]
    assert 0.019 < found.phases["decode"]["seconds"] < 0.04


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_command_writes_everything(tmp_path, folder, capsys, engine):
    pytest.importorskip("matplotlib")
    size = ["--prompt-len", "9", "--new-tokens", "2", "--output", str(tmp_path / "out")]
    assert cli.invoke(["profile", str(folder / engine), *size, "--set", "device", "cpu"]) == 0
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert names == {"trace.json", "layers.csv", "kernels.csv", "profile.json", "modules.png"}
    assert "of the roofline" in capsys.readouterr().out


def test_results_for_machines_come_with_the_picture(tmp_path, folder, capsys):
    pytest.importorskip("matplotlib")
    line = ["profile", str(folder / "torch"), "--json", "--prompt-len", "9", "--new-tokens", "2"]
    assert cli.invoke([*line, "-o", str(tmp_path), "--set", "device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["output"] == str(tmp_path)
    assert (tmp_path / "modules.png").is_file()


def test_without_matplotlib_everything_else_is_shown(tmp_path, folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = ["profile", str(folder / "torch"), "--prompt-len", "9", "--new-tokens", "2"]
    assert cli.invoke([*line, "-o", str(tmp_path), "--set", "device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "Kernels and operations" in out and "modules.png" not in out
    assert "is not drawn: the package 'matplotlib' is not installed" in err.replace("\n", " ")


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_a_vocabulary_smaller_than_the_prompt(tmp_path, kind):
    pytest.importorskip("onnxruntime")
    config = drawn.shape("gpt2").model_copy(update={"vocab_size": 4})
    checkpoint = drawn.checkpoint(tmp_path / "checkpoint", config, drawn.weights(config))
    drawn.engine(checkpoint, tmp_path / "engine", kind=kind)
    found = profile(open_runner(tmp_path / "engine"), SHAPE, tmp_path / "out")
    assert found.phases["decode"]["seconds"] > 0


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, folder, capsys):
    (tmp_path / "file").touch()
    assert cli.invoke(["profile", str(folder / "torch"), "-o", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_tools_around_a_run(tmp_path, capfd):
    run = ["porttool", "profile", "ENGINE"]
    nsys = tool_command("nsys", run, tmp_path)
    assert nsys[-3:] == run
    assert "--cuda-graph-trace=node" in nsys and "--trace=cuda,cudnn,cublas,osrt,nvtx" in nsys
    ncu = " ".join(tool_command("ncu", run, tmp_path))
    assert ncu.startswith("ncu --section ComputeWorkloadAnalysis ") and "--csv" in ncu
    assert "--clock-control none" in ncu and "--nvtx-include porttool.decode/" in ncu
    with pytest.raises(UsageError, match=r"nowhere-to-be-found is not installed .* --flag"):
        run_tool(["nowhere-to-be-found", "--flag"])
    run_tool([sys.executable, "-c", "print('said')"])
    assert capfd.readouterr() == ("", "said\n")
    with pytest.raises(EngineError, match="status 3"):
        run_tool([sys.executable, "-c", "raise SystemExit(3)"])


SAMPLE = Path(__file__).parent / "ncu_prefill.csv"
"""Three launches of what ncu 2025.3 wrote of GPT-2 XL's prompt on an H200."""


def test_counters_of_every_launch(tmp_path):
    counters = read_counters(SAMPLE)
    assert len(counters) == 45  # three launches of fifteen counters; the advice is none
    (first,) = [c for c in counters if c.launch == 0 and c.name == "DRAM Frequency"]
    assert first == Counter(
        0, "residual_norm_kernel", "", "(128, 1, 1)", "(512, 1, 1)",
        "GPU Speed Of Light Throughput", "DRAM Frequency", "hz", 3_183_035_714.29,
    )  # fmt: skip
    matrix, norm = by_kernel(counters)
    assert (matrix.launches, norm.launches) == (2, 1)
    busy = [c.value for c in counters if c.name == "SM Busy" and c.kernel == matrix.kernel]
    assert matrix.means["SM Busy"] == sum(busy) / 2
    assert norm.means["SM Busy"] == 12.14
    write_counters(counters, tmp_path / "counters.csv")
    rows = list(csv.DictReader((tmp_path / "counters.csv").read_text().splitlines()))
    assert len(rows) == 45 and float(rows[0]["value"]) == first.value


def test_counters_know_their_phase(tmp_path):
    """With ranges ncu adds columns; a counter that could not be measured is left out."""
    text = SAMPLE.read_text().splitlines()
    ranges = '"thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"'
    told = '"0:<default domain>:porttool.decode:none:none:none:none:none"'
    lines = [text[3].replace('"Kernel Name"', f'{ranges},"Kernel Name"')]
    lines += [line.replace('"residual_norm', f'{told},"residual_norm') for line in text[4:6]]
    lines += [lines[1].replace("3,183,035,714.29", "n/a")]
    (tmp_path / "ncu.csv").write_text("\n".join(lines))
    assert [c.phase for c in read_counters(tmp_path / "ncu.csv")] == ["decode", "decode"]


def test_no_counters_say_why(tmp_path):
    path = tmp_path / "ncu.csv"
    path.write_text("==ERROR== ERR_NVGPUCTRPERM - no permission\n==PROF== Disconnected\n")
    with pytest.raises(EngineError, match=r"no counters. It said: ==ERROR== ERR_NVGPUCTRPERM"):
        read_counters(path)
    with pytest.raises(EngineError, match="It said: nothing"):
        read_counters(tmp_path / "absent.csv")


NCU = f"""#!{sys.executable}
import shutil, subprocess, sys
arguments = sys.argv[1:]
shutil.copy({str(SAMPLE)!r}, arguments[arguments.index("--log-file") + 1])
run = arguments[arguments.index({sys.executable!r}):]
assert "--under" not in run and run[-1] == "--ranges-only", run
raise SystemExit(subprocess.run(run).returncode)
"""


def test_command_under_a_tool(tmp_path, folder, capsys, monkeypatch):
    """A stand-in for ncu runs what it is given and leaves a real file behind."""
    program = tmp_path / "porttool"
    program.write_text("from porttool import cli\nraise SystemExit(cli.invoke())\n")
    out = tmp_path / "out"
    size = ["--prompt-len", "9", "--new-tokens", "2", "--output", str(out)]
    line = ["profile", str(folder / "torch"), "--under", "ncu", *size, "--set", "device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(program), *line])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.invoke(line) == 2
    assert "ncu is not installed here" in capsys.readouterr().err
    (tmp_path / "ncu").write_text(NCU)
    (tmp_path / "ncu").chmod(0o755)
    assert cli.invoke(line) == 0
    assert {f.name for f in out.iterdir()} == {"ncu.csv", "counters.csv"}
    assert "SM Busy" in capsys.readouterr().out


def test_what_a_tool_prints_is_not_among_the_json(tmp_path, capfd, monkeypatch):
    (tmp_path / "nsys").write_text("#!/bin/sh\necho Generating\n")
    (tmp_path / "nsys").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    line = ["profile", "engine", "--under", "nsys", "--json", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["porttool", *line])
    assert cli.invoke(line) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["trace"] == str(tmp_path / "out" / "nsys.nsys-rep")
    assert err == "Generating\n"
