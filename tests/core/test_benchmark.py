"""Benchmarks: medians that are medians, sides that fail alone, and the command from end to end."""

from __future__ import annotations

import json
from itertools import cycle

import pytest
import torch

import drawn
from porttool.benchmark import BenchmarkResult, Method, grid, memory
from porttool.benchmark import measurement as measuring
from porttool.benchmark.engines import spread
from porttool.benchmark.measurement import Benchmark
from porttool.benchmark.memory import Counter, Meter, ResidentMemory
from porttool.benchmark.peers import CompiledSide, HuggingFaceModel, TransformersSide
from porttool.benchmark.results import Ceiling
from porttool.benchmark.roofline import decode_cost, measure_ceiling, prefill_cost
from porttool.benchmark.run import label
from porttool.benchmark.side import Side, SideFailed, Timing
from porttool.cli import invoke
from porttool.config import ModelConfig
from porttool.engine import Engine
from porttool.errors import EngineError
from porttool.nn import meta_decoder
from porttool.plugins import load_registry
from porttool.progress import SILENT
from porttool.runner import load_verified

CONFIG = drawn.shape("gpt2")
CEILING = Ceiling(flops=1e12, copy_bandwidth=1e9, read_bandwidth=2e9)
TINY = {"vocab_size": 61, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4}


def test_tokens_of_a_chunk_share_its_time():
    """The first token alone; then two chunks of three and a rest of one, seen as they arrive."""
    times = [1.0, 4.0, 4.1, 4.2, 10.0, 10.1, 10.2, 11.0]
    assert spread(times, 3) == pytest.approx((1, 1, 1, 2, 2, 2, 1))
    assert spread([1.0, 3.0, 4.0], 1) == pytest.approx((2, 1))
    assert spread([1.0, 9.0, 9.1], 16) == pytest.approx((4, 4))


def test_the_grid_is_every_combination():
    cells = grid((1, 8), (16, 32), (4,))
    assert [(c.batch_size, c.input_len) for c in cells] == [(1, 16), (8, 16), (1, 32), (8, 32)]
    assert str(cells[1]) == "batch 8, input 16, output 4"


class Pretender(Side):
    """Takes the times that it is told to; raises those that are errors."""

    device, dtype, through_torch, description = "cpu", "float32", True, "a pretender"

    def __init__(self, name, runs, unloadable=None):
        self.name = name
        self.runs = cycle(runs)
        self.unloadable = unloadable
        self.asked = []

    def load(self):
        if self.unloadable:
            raise SideFailed(self.unloadable)

    def run(self, prompts, output_len):
        self.asked.append(prompts)
        found = next(self.runs)
        if isinstance(found, SideFailed):
            raise found
        return found


def even(first, token):
    """A run whose three later tokens take equally long."""
    return Timing(first, (token,) * 3, first + 3 * token)


def measured(sides, cells, monkeypatch, **method):
    monkeypatch.setattr(measuring, "measure_ceiling", lambda *_: CEILING)
    monkeypatch.setattr(measuring, "PAUSE", 0)
    run = Benchmark(CONFIG, Method(**{"warmup": 1, "repeats": 3, **method}), SILENT)
    for side in sides:
        run.load(side)
    return run.measure_all(cells)


def test_medians_over_rounds_and_percentiles_over_tokens(monkeypatch):
    slow = even(9.0, 9.0)
    ours = Pretender("porttool torch", [slow, even(0.3, 0.01), even(0.1, 0.02), even(0.2, 0.03)])
    theirs = Pretender("HF eager", [slow, even(0.4, 0.04), even(0.4, 0.06), even(0.4, 0.3)])
    (cell,) = grid((2,), (5,), (4,))
    found = measured([ours, theirs], [cell], monkeypatch)
    first, second = found.measurements
    assert (first.first_token_ms, first.token_ms) == pytest.approx((200, 20))
    assert first.token_ms_p90 == pytest.approx(30)
    assert first.tokens_per_second == pytest.approx(2 * 4 / (0.2 + 0.09))
    assert first.times_as_fast == pytest.approx(4)  # of 4, 3 and 10
    assert second.times_as_fast == 1
    bytes_a_token = decode_cost(CONFIG, cell, "float32").nbytes
    assert first.decode_roofline == pytest.approx(bytes_a_token / 2e9 / 0.02)
    operations = prefill_cost(CONFIG, cell, "float32")
    assert first.prefill_roofline == pytest.approx(operations.seconds(PEAK) / 0.2)
    assert len(first.rounds) == 3 and first.rounds[0].ceiling == CEILING
    assert ours.asked == theirs.asked and len(ours.asked) == 4
    assert len(ours.asked[0]) == 2 and len(ours.asked[0][0]) == 5


PEAK = measuring.peak_of(CEILING)


def test_what_fails_does_so_alone_and_says_why(monkeypatch):
    good = Pretender("good", [even(0.1, 0.1)])
    absent = Pretender("absent", [], unloadable="no such thing")
    cold = Pretender("cold", [SideFailed("cannot warm up")])
    late = Pretender("late", [even(0.1, 0.1), even(0.1, 0.1), SideFailed("out of memory")])
    cells = grid((1,), (4,), (4,))
    found = measured([good, absent, cold, late], cells, monkeypatch)
    assert [m.side for m in found.measurements] == ["good"]
    assert found.measurements[0].times_as_fast is None
    assert [(f.side, f.cell, f.reason) for f in found.failures] == [
        ("absent", None, "no such thing"),
        ("cold", cells[0], "cannot warm up"),
        ("late", cells[0], "out of memory"),
    ]
    assert [s.name for s in found.sides] == ["good", "cold", "late"]


def test_a_cell_beside_which_nothing_more_fits_costs_no_other(monkeypatch):
    """The device's own speed needs memory, too."""
    left = iter([CEILING] * 4 + [None] + [CEILING] * 3)

    def measure(*_):
        if (found := next(left)) is None:
            raise EngineError("no 4 GB left")
        return found

    sides = [Pretender(name, [even(0.1, 0.1)]) for name in ("first", "second")]
    run = Benchmark(CONFIG, Method(warmup=1, repeats=3), SILENT)
    monkeypatch.setattr(measuring, "measure_ceiling", measure)
    monkeypatch.setattr(measuring, "PAUSE", 0)
    for side in sides:
        run.load(side)
    found = run.measure_all(grid((1, 2, 3), (4,), (4,)))
    assert [(m.side, m.cell.batch_size) for m in found.measurements] == [
        ("first", 1), ("second", 1), ("first", 3), ("second", 3)
    ]  # fmt: skip
    assert [(f.side, f.cell.batch_size, f.reason) for f in found.failures] == [
        ("first", 2, "no 4 GB left"), ("second", 2, "no 4 GB left")
    ]  # fmt: skip


class Scripted(Counter):
    """Reads what a list says: in use, and at most."""

    name = "scripted"

    def __init__(self, *readings):
        self.readings = iter(readings)

    def reset(self):
        pass

    def read(self):
        return next(self.readings)


def test_memory_is_what_is_held_and_the_rise_above_it():
    meter = Meter(Scripted((10, 10), (30, 50), (100, 100), (105, 160)))
    with meter.watch():  # loading: leaves 20, took 40
        pass
    assert (meter.held, meter.peak) == (20, 40)
    meter.reset()
    with meter.watch():  # others' 70 are not ours; ours rises by 60 and keeps 5
        pass
    assert (meter.held, meter.peak) == (25, 80)


def test_shared_weights_count_for_both(monkeypatch):
    """The second side loads nothing, and holds what the first one loaded all the same."""
    run = Benchmark(CONFIG, Method(), SILENT)
    first, second = Pretender("first", []), Pretender("second", [])
    second.shares_with, other = "first", Pretender("other", [])
    kept = []
    first.load = lambda: kept.append(torch.ones(64 << 18))
    for side in (first, second, other):
        run.load(side)
    held = [entry.meter.held for entry in run.entries]
    assert held[0] > 60e6 and held[1] > 60e6 and held[2] < 5e6


def test_what_a_side_forgets_before_a_cell_it_no_longer_holds(monkeypatch):
    """Compiled code and its cache are thrown away and made anew: they count once."""
    side, made = Pretender("compiled", [even(0.1, 0.1)]), []
    side.prepare = made.clear

    def run(prompts, output_len):
        made[:] = made or [torch.ones(64 << 18)]
        return even(0.1, 0.1)

    side.run = run
    found = measured([side], grid((1, 2, 3), (4,), (4,)), monkeypatch)
    peaks = [m.peak_memory_bytes for m in found.measurements]
    assert all(60e6 < peak < 90e6 for peak in peaks)


def test_resident_memory_sees_an_allocation():
    meter = Meter(ResidentMemory())
    with meter.watch():
        kept = torch.ones(64 << 18)
    assert 60e6 < meter.held < 90e6
    with meter.watch():
        torch.ones(32 << 18).sum()
    assert meter.peak > meter.held + 25e6
    assert kept.nbytes == 64 << 20


def test_costs_are_weights_and_cache():
    config = ModelConfig(**{**drawn.BASE, "d_model": 512, "d_ff": 2048, "n_layer": 4})
    (cell,) = grid((8,), (40,), (4,))
    weights = sum(t.numel() for t in meta_decoder(config).state_dict().values())
    cache = 8 * 42 * 2 * config.n_kv_head * config.head_dim * config.n_layer
    found = decode_cost(config, cell, "float16").nbytes / 2
    assert 1.0 < found / (weights + cache) < 1.1
    assert prefill_cost(config, cell, "float16").flops == pytest.approx(
        2 * 8 * 40 * (weights - config.vocab_size * config.d_model), rel=0.1
    )


def test_the_ceiling_is_measured():
    found = measure_ceiling("cpu", "float32")
    assert found.flops > 1e9 and found.copy_bandwidth > 1e8 and found.read_bandwidth > 1e8


def test_compiling_that_does_not_happen_is_named(monkeypatch, tmp_path):
    """Neither a missing compiler nor a silent return to eager counts as compiled."""
    side = CompiledSide(HuggingFaceModel(tmp_path, dtype="float32", device="cpu"))
    monkeypatch.setattr(TransformersSide, "_generate", lambda *_: None)
    torch._dynamo.utils.counters.clear()
    with pytest.raises(SideFailed, match="compiled nothing"):
        side._generate(torch.zeros(1, 1), 2, None)

    def no_compiler(*_):
        raise RuntimeError("No working C++ compiler found\nin a long trace")

    monkeypatch.setattr(TransformersSide, "_generate", no_compiler)
    with pytest.raises(SideFailed, match=r"torch.compile: RuntimeError: No working C\+\+ compiler"):
        side._generate(torch.zeros(1, 1), 2, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dummy torch engine, an ONNX one of the same shape, and a config for transformers."""
    path = tmp_path_factory.mktemp("bench")
    (path / "hf").mkdir()
    (path / "hf" / "config.json").write_text(json.dumps({"model_type": "gpt2", **TINY}))
    build = ["build", "--dummy", "--config", str(path / "hf"), "--dtype", "float32",
             "--max-batch-size", "4", "--max-input-len", "20", "--max-output-len", "8"]  # fmt: skip
    for kind in ("torch", "onnx"):
        assert invoke([*build, "--engine", kind, "--output", str(path / kind)]) == 0
    return path


SMALL = ["--batch-size", "1,3", "--input-len", "9", "--output-len", "5", "--repeats", "2",
         "--warmup", "1", "--set", "device", "cpu"]  # fmt: skip


def test_the_command_measures_engines_beside_transformers(folder, tmp_path, capsys, monkeypatch):
    for package in ("matplotlib", "onnxruntime", "transformers"):
        pytest.importorskip(package)
    monkeypatch.setattr(measuring, "PAUSE", 0)
    files = [tmp_path / "out.json", tmp_path / "out.png"]
    asked = [*SMALL, "--hf-model", str(folder / "hf"), "--no-compile",
             "--output-json", str(files[0]), "--picture", str(files[1])]  # fmt: skip
    assert invoke(["bench", str(folder / "torch"), str(folder / "onnx"), *asked]) == 0
    found = BenchmarkResult.model_validate_json(files[0].read_text())
    names = ["porttool torch torch", "porttool onnx onnx", "HF eager"]
    assert [s.name for s in found.sides] == names
    assert [(m.cell.batch_size, m.side) for m in found.measurements] == [
        (batch, name) for batch in (1, 3) for name in names
    ]
    assert all(side.random_weights for side in found.sides)
    assert found.sides[0].bytes_on_disk > 4 * 28_000 and found.sides[2].bytes_on_disk == 0
    for m in found.measurements:
        assert 0 < m.token_ms <= m.token_ms_p90 <= m.token_ms_p99 < m.rounds[0].total_ms * 10
        assert m.first_token_ms > 0 and m.tokens_per_second > 0 and m.peak_memory_bytes >= 0
        assert m.decode_roofline > 0 and m.prefill_roofline > 0 and m.times_as_fast > 0
        for each in m.rounds:
            assert each.first_token_ms + each.token_ms <= each.total_ms
    assert files[1].stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "RANDOM WEIGHTS" in shown and "x eager" in shown


def test_an_engine_that_fails_in_a_cell_is_listed(folder, capsys, monkeypatch):
    """A library that has no memory left for a larger batch costs nobody the smaller one."""
    onnxruntime = pytest.importorskip("onnxruntime")
    run = onnxruntime.InferenceSession.run_with_iobinding

    def short_of_memory(session, binding, *rest):
        if binding.get_outputs()[0].shape()[0] > 1:
            raise RuntimeError("Available memory of 5 is smaller than requested bytes of 7")
        return run(session, binding, *rest)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", short_of_memory)
    assert invoke(["bench", str(folder / "onnx"), *SMALL, "--json"]) == 0
    found = BenchmarkResult.model_validate_json(capsys.readouterr().out)
    assert [m.cell.batch_size for m in found.measurements] == [1]
    (failure,) = found.failures
    assert failure.cell.batch_size == 3 and "Available memory of 5" in failure.reason


def test_tokens_that_the_host_gets_at_a_time_are_told(folder, capsys, monkeypatch):
    from porttool.engines.torch import cpu

    if not load_verified(folder / "torch", load_registry(), {"device": "cpu"}).decodes_on_device:
        pytest.skip("nothing is compiled here")
    for read, n in ((1, 1), (1 << 40, 16)):
        monkeypatch.setattr(cpu, "READ_AT_ONCE", read)
        assert invoke(["bench", str(folder / "torch"), *SMALL, "--json"]) == 0
        found = BenchmarkResult.model_validate_json(capsys.readouterr().out)
        assert found.sides[0].tokens_a_sample == n


def test_where_the_system_counts_no_memory(folder, capsys, monkeypatch, tmp_path):
    """Containers may have the file that resets the peak, and refuse to write it."""
    monkeypatch.setattr(memory, "CLEAR", tmp_path)
    assert invoke(["bench", str(folder / "torch"), *SMALL, "--batch-size", "1", "--json"]) == 0
    found = BenchmarkResult.model_validate_json(capsys.readouterr().out)
    assert found.measurements[0].peak_memory_bytes is None
    assert found.sides[0].memory_counter == "none here"


def test_json_on_standard_output(folder, capsys):
    assert invoke(["bench", str(folder / "torch"), *SMALL, "--batch-size", "1", "--json"]) == 0
    found = BenchmarkResult.model_validate_json(capsys.readouterr().out)
    assert found.random_weights and len(found.measurements) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "1,64"], "--batch-size 64 asked for, {}/torch holds 4; build it with "
                                   "--max-batch-size 64"),
        (["--input-len", "21"], "--input-len 21 asked for"),
        (["--output-len", "9"], "--output-len 9 asked for"),
        (["--output-len", "1"], "--output-len '1': give whole numbers from 2 on"),
        (["--batch-size", "1,x"], "--batch-size '1,x': give whole numbers"),
        (["--picture", "nowhere/out.png"], "there is no folder"),
        (["--output-json", "-"], "--output-json writes a file, name one; --json prints"),
        (["--picture", "out.gif"], "--picture out.gif: its name should end in .png, .svg, .pdf"),
        (["--hf-model", "{}"], "{}: there is no config.json"),
        (["--hf-model", "{}/nothere"], "{}/nothere: there is no such folder"),
        (["--hf-model", "{}/other"], "is not the engine's model: it has vocab_size 60, not 61"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_before_anything_runs(folder, arguments, message, capsys):
    (folder / "other").mkdir(exist_ok=True)
    other = {"model_type": "gpt2", **TINY, "vocab_size": 60}
    (folder / "other" / "config.json").write_text(json.dumps(other))
    filled = [a.format(folder) for a in arguments]
    status = invoke(["bench", str(folder / "torch"), *SMALL, *filled])
    shown = capsys.readouterr()
    assert status in (1, 2) and shown.out == ""
    assert message.format(folder) in " ".join(shown.err.split())
    assert "loading" not in shown.err


def test_engines_of_two_models_are_measured_apart(folder, tmp_path, capsys):
    build = ["build", "--dummy", "--config", str(folder / "hf"), "--n-layer", "1"]
    assert invoke([*build, "--output", str(tmp_path / "other")]) == 0
    assert invoke(["bench", str(folder / "torch"), str(tmp_path / "other"), *SMALL]) == 2
    assert "measure them apart" in capsys.readouterr().err


def test_a_benchmark_of_nothing_fails(monkeypatch):
    absent = Pretender("absent", [], unloadable="no such thing")
    with pytest.raises(EngineError, match="nothing could be measured: absent: no such thing"):
        measured([absent], grid((1,), (4,), (4,)), monkeypatch)


def test_engines_with_one_name_are_told_apart_by_their_paths(folder):
    first, second = Engine.open(folder / "torch"), Engine.open(folder / "onnx")
    assert label(first, [first]) == "porttool torch"
    assert label(first, [first, second]) == "porttool torch torch"
    assert label(first, [first, first]) == f"porttool torch {folder / 'torch'}"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the peers' own
def test_on_a_gpu_all_three_take_turns(folder, tmp_path):
    """Memory comes from torch's allocator, and what is called compiled is."""
    build = ["build", "--dummy", "--config", str(folder / "hf"), "--dtype", "float16"]
    assert invoke([*build, "--output", str(tmp_path / "half")]) == 0
    asked = ["--batch-size", "1,3", "--input-len", "9", "--output-len", "20", "--repeats", "2",
             "--hf-model", str(folder / "hf")]  # fmt: skip
    written = ["--output-json", str(tmp_path / "o.json")]
    assert invoke(["bench", str(tmp_path / "half"), *asked, *written]) == 0
    found = BenchmarkResult.model_validate_json((tmp_path / "o.json").read_text())
    assert found.failures == () and len(found.measurements) == 6
    assert {(s.device, s.memory_counter) for s in found.sides} == {("cuda", "torch's allocator")}
    assert all(0 < m.peak_memory_bytes < 2e9 for m in found.measurements)
