"""The TensorRT runner over plans that a double runs with ONNX Runtime: any step, same tokens."""

from __future__ import annotations

import json

import pytest
import torch

import drawn
import tensorrt_double as double
import tensorrt_install
import tiny
from drawn import prompts, step_of
from porttool.config import Sampling
from porttool.errors import CheckpointError, EngineError, UsageError
from porttool.generate import generate
from porttool.nn import KVCache
from porttool.plugins import load_registry
from porttool.runner import load_runner
from tensorrt_install import LIMITS, HostStream, build, install


@pytest.mark.parametrize("options", [{}, {"cache": "concat"}, {"static_batch": False}])
@pytest.mark.parametrize("shape", ["gpt2", "mqa", "gpt-next"])
def test_logits_of_any_step(tmp_path, library, shape, options):
    """The builder's profiles and the runner's bindings carry every kind of step."""
    checkpoint, engine = build(tmp_path, shape, **options)
    runner = load_runner(engine, load_registry())
    reference = drawn.decoder(checkpoint.config, drawn.weights(checkpoint.config))
    cache = KVCache(checkpoint.config, 3, 50, dtype=torch.float64)
    for step in (
        step_of(prompts(3, 8), [2, 0], [0, 0]),
        step_of(prompts(30), [1], [0]),
        step_of([[5], [6]], [2, 0], [3, 8]),
        step_of([[5], [6], [7]], [1, 2, 0], [30, 4, 9]),
        step_of([[5, 1, 2], [6]], [2, 0], [5, 10]),
        step_of([[5], [6]], [1, 2], [31, 8]),
        step_of(prompts(16, 3), [1, 2], [32, 9]),  # one row's padding would leave the cache
    ):
        wanted = reference(step, cache)
        got = runner.step(step, all_positions=True)
        real = torch.arange(step.tokens.shape[1]) < step.lengths[:, None]
        torch.testing.assert_close(got[real].double(), wanted[real], rtol=0, atol=2e-4)
        ends = wanted[torch.arange(len(wanted)), step.lengths - 1]
        torch.testing.assert_close(runner.step(step).double(), ends, rtol=0, atol=2e-4)


@pytest.mark.parametrize("options", [{}, {"cache": "concat"}, {"static_batch": False}])
def test_same_tokens_as_torch(tmp_path, library, options):
    """Rows join and leave: where the batch may vary, every size is captured and comes back."""
    checkpoint, engine = build(tmp_path, **options)
    registry = load_registry()
    plain = drawn.engine(checkpoint, tmp_path / "torch", limits=LIMITS)
    runners = [load_runner(engine, registry), load_runner(plain, registry, {"device": "cpu"})]
    ids = prompts(3, 9, 1, 14)
    beams = Sampling(max_new_tokens=5, num_beams=3)
    drawn_tokens = Sampling(max_new_tokens=9, temperature=1.0)
    for sampling in (Sampling(max_new_tokens=7), beams, drawn_tokens):
        mine, theirs = (
            [[c.tokens for c in row] for row in generate(r, ids, sampling, eos=range(0, 211, 5))]
            for r in runners
        )
        assert mine == theirs


def test_decoding_is_captured_once_and_runs_in_its_own_profile(tmp_path, library):
    _, engine = build(tmp_path)
    runner = load_runner(engine, load_registry())
    generate(runner, prompts(3, 9, 4), Sampling(max_new_tokens=8), eos=())
    runs = double.IExecutionContext.runs
    assert [profile for profile, _ in runs] == [0] + [1] * 7
    assert HostStream.captured == 1
    assert runs[1][1]["past_key.0"] == (3, 4, 48, 12)


def test_streamed_weights_are_not_captured(tmp_path, library):
    _, engine = build(tmp_path, weight_streaming=True)
    generate(load_runner(engine, load_registry()), prompts(3), Sampling(max_new_tokens=4), eos=())
    assert HostStream.captured == 0
    whole = load_runner(engine, load_registry(), {"weight_streaming_budget": 1000})
    generate(whole, prompts(3), Sampling(max_new_tokens=4), eos=())
    assert HostStream.captured == 1


def test_prompt_table(tmp_path, library):
    checkpoint, engine = build(tmp_path)
    runner = load_runner(engine, load_registry())
    reference = drawn.decoder(checkpoint.config, drawn.weights(checkpoint.config))
    table = torch.randn(4, checkpoint.config.d_model, generator=torch.Generator().manual_seed(1))
    runner.load_prompt_table(table)
    reference.prompt_table = table.double()
    step = step_of([[211, 214, 5]], [0], [0])
    wanted = reference(step, KVCache(checkpoint.config, 3, 50, dtype=torch.float64))
    got = runner.step(step, all_positions=True)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-4)


def test_older_versions_get_the_concatenating_form(tmp_path, library):
    install(library, "10.13.3.9")
    _, engine = build(tmp_path)
    assert engine.manifest.built[0]["cache"] == "concat"
    assert engine.manifest.built[0]["attention_layers"] == 0
    out = generate(
        load_runner(engine, load_registry()), prompts(3), Sampling(max_new_tokens=3), eos=()
    )
    assert len(out[0][0].tokens) == 3
    with pytest.raises(EngineError, match=r"TensorScatter present_key.0: needs TensorRT 10.15"):
        drawn.engine(
            build(tmp_path / "other" if (tmp_path / "other").mkdir() is None else tmp_path)[0],
            tmp_path / "scatter", kind="tensorrt", limits=LIMITS, options={"cache": "scatter"},
        )  # fmt: skip


def test_stripped_plans_get_their_weights_at_load(tmp_path, library):
    _, engine = build(tmp_path, strip=True)
    assert {"decoder.plan", "model.onnx", "model.safetensors"} <= {
        f.name for f in engine.rank_path().iterdir()
    }
    runner = load_runner(engine, load_registry())
    assert runner._graph.program.engine._refitted == str(engine.rank_path() / "model.onnx")


def test_damaged_and_foreign_plans(tmp_path, library, monkeypatch):
    _, engine = build(tmp_path)
    plan = engine.rank_path() / "decoder.plan"
    whole = plan.read_bytes()
    plan.write_bytes(b"foreign" + whole)
    with pytest.raises(CheckpointError, match="manifest says"):
        type(engine).open(engine.path, load_registry())
    with pytest.raises(EngineError, match=r"cannot load .*magic tag"):
        load_runner(engine, load_registry())
    (tmp_path / "other").mkdir()
    _, other = build(tmp_path / "other", cache="concat")
    plan.write_bytes((other.rank_path() / "decoder.plan").read_bytes())
    with pytest.raises(EngineError, match=r"not those of the manifest: new_key.0, .*present_key.0"):
        load_runner(engine, load_registry())
    plan.write_bytes(whole)
    monkeypatch.setattr(double.ICudaEngine, "get_aliased_input_tensor", lambda self, name: None)
    with pytest.raises(EngineError, match="would not be updated in place"):
        load_runner(engine, load_registry())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda built: [], "the manifest says 1 ranks and describes 0"),
        (lambda built: [{**built, "origin": 3}], "describes no TensorRT plan: origin"),
        (lambda built: [{**built, "options": {"level": 9}}], "describes no TensorRT plan: .*level"),
        (lambda built: [{k: v for k, v in built.items() if k != "inputs"}], "plan: inputs"),
    ],
)
def test_a_manifest_that_describes_no_plan(tmp_path, library, change, message):
    _, engine = build(tmp_path)
    tiny.edit_manifest(engine.path / "engine.json", built=change(engine.manifest.built[0]))
    with pytest.raises(EngineError, match=message):
        load_runner(type(engine).open(engine.path), load_registry())


def test_sizes_beyond_the_plan(tmp_path, library):
    _, engine = build(tmp_path)
    runner = load_runner(engine, load_registry())
    with pytest.raises(UsageError, match="slot 3 asked for, but the engine has 3"):
        runner.step(step_of([[1]], [3], [0]))
    with pytest.raises(UsageError, match="would reach 49"):
        runner.step(step_of([[1]], [0], [48]))
    with pytest.raises(EngineError, match=r"tokens \[3, 31\] is outside the plan's profile"):
        runner.step(step_of(prompts(31), [0], [0]))


def test_all_positions_of_more_than_a_prompt(tmp_path, library, monkeypatch):
    """A plan takes no more tokens at once than its longest prompt has."""
    limits = LIMITS.model_copy(update={"max_input_len": 5, "max_output_len": 43})
    monkeypatch.setattr(tensorrt_install, "LIMITS", limits)
    checkpoint, engine = build(tmp_path)
    step = step_of(prompts(12, 3), [2, 0], [0, 0])
    got = load_runner(engine, load_registry()).step(step, all_positions=True)
    reference = drawn.decoder(checkpoint.config, drawn.weights(checkpoint.config))
    wanted = reference(step, KVCache(checkpoint.config, 3, 50, dtype=torch.float64))
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=0, atol=2e-4)


def test_layer_times_come_with_the_run_they_belong_to(tmp_path, library):
    _, engine = build(tmp_path)
    runner = load_runner(engine, load_registry())

    def work():
        runner.step(step_of(prompts(3), [0], [0]))
        runner.step(step_of([[5]], [0], [3]))
        runner.step(step_of([[5]], [0], [4]))

    nodes = runner.profiled(work)
    assert [n.run for n in nodes] == [0, 0, 1, 1, 2, 2]
    assert (nodes[1].name, nodes[1].begin, nodes[1].duration) == ("logits", 500.0, 500.0)
    assert HostStream.captured == 0
    runner.step(step_of([[5]], [0], [5]))
    assert HostStream.captured == 1


def test_profile_in_the_forms_of_the_library_s_tools(tmp_path, library):
    """Layers as the inspector has them, times as trtexec exports them, a pair for each profile."""
    from porttool.profiling import ProfileShape, profile

    _, engine = build(tmp_path)
    runner = load_runner(engine, load_registry())
    out = tmp_path / "out"
    found = profile(runner, ProfileShape(batch=2, prompt=9, new=5), out)
    assert {line.module for line in found.lines if line.phase == "decode"} == {"mlp.up", "head"}
    for phase, width, count, each in (("prefill", 9, 1, 0.5), ("decode", 1, 5, 1.5)):
        layers = json.loads((out / f"layers_{phase}.json").read_text())
        assert layers["Layers"][0]["Inputs"][0]["Dimensions"] == [3, width]
        first, *times = json.loads((out / f"profile_{phase}.json").read_text())
        assert first == {"count": count}
        suffix = "" if phase == "prefill" else " [profile 1]"
        named = {
            layer["Name"]
            for layer in layers["Layers"]
            if ("[profile" in layer["Name"]) == bool(suffix)
        }
        assert {t["name"] for t in times} == named
        assert all(t["averageMs"] == t["medianMs"] == each for t in times)
        assert sum(t["timeMs"] for t in times) == pytest.approx(2 * count * each)
        assert [t["percentage"] for t in times] == [50, 50]
