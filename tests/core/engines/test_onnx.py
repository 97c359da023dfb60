"""ONNX engines against the canonical decoder: every flag, any slots, several tokens a step."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import drawn
import tiny
from drawn import prompts, step_of
from porttool import api
from porttool.config import Limits, ModelConfig, Sampling
from porttool.engine import Engine
from porttool.engines.onnx.attention import rotary_angles
from porttool.engines.onnx.rows import RowMap
from porttool.engines.onnx.weights import write_weights
from porttool.errors import UsageError
from porttool.generate import generate
from porttool.nn import KVCache
from porttool.nn.attention import rotary_angles as nn_angles
from porttool.nn.trace import traced
from porttool.plugins import load_registry
from porttool.progress import Progress
from porttool.runner import load_runner
from porttool.shards import plan_shards

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

LIMITS = Limits(max_batch_size=5, max_input_len=30, max_output_len=18, max_prompt_rows=4)
CACHES = ("scatter", "concat")


class Pair:
    """An ONNX engine and the canonical decoder in float64, each with a cache."""

    def __init__(self, folder, shape="gpt2", cache="scatter", dtype="float32", limits=LIMITS):
        self.config = drawn.shape(shape)
        tensors = drawn.weights(self.config)
        self.checkpoint = drawn.checkpoint(folder / "checkpoint", self.config, tensors)
        self.engine = drawn.engine(
            self.checkpoint, folder / "engine", kind="onnx", options={"cache": cache},
            dtype=dtype, limits=limits,
        )  # fmt: skip
        self.registry = load_registry()
        self.runner = load_runner(self.engine, self.registry, {"device": "cpu", "threads": 2})
        self.reference = drawn.decoder(self.config, tensors)
        self.cache = KVCache(
            self.config, limits.max_batch_size, self.config.n_positions, dtype=torch.float64
        )
        self.tolerance = {"float32": 1e-4, "float16": 0.05}[dtype]

    def check(self, step):
        """Feed both; every real token's logits agree, and each row's last ones."""
        wanted = self.reference(step, self.cache)
        got = self.runner.step(step, all_positions=True)
        last = self.runner.step(step)
        real = torch.arange(step.tokens.shape[1]) < step.lengths[:, None]
        scale = max(1.0, float(wanted[real].std()))
        close = {"rtol": 0, "atol": self.tolerance * scale}
        assert got.dtype == last.dtype == torch.float32
        torch.testing.assert_close(got[real].double(), wanted[real], **close)
        ends = wanted[torch.arange(len(wanted)), step.lengths - 1]
        torch.testing.assert_close(last.double(), ends, **close)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("shape", drawn.SHAPES)
def test_every_flag_and_any_slots(tmp_path, shape, cache):
    pair = Pair(tmp_path, shape, cache)
    pair.check(step_of(prompts(3, 8, 1), [4, 0, 2], [0, 0, 0]))
    pair.check(step_of([[5], [6], [7]], [4, 0, 2], [3, 8, 1]))
    pair.check(step_of([[9, 1, 2], [3], [8, 8]], [2, 4, 0], [2, 4, 9]))  # a few tokens a row
    pair.check(step_of(prompts(20), [3], [0]))  # one joins
    pair.check(step_of([[1], [2]], [3, 0], [20, 11]))  # two have left from the middle
    pair.check(step_of([[4, 5], [6], [1]], [0, 2, 4], [9, 5, 5]))  # one steps back
    pair.runner.copy_slots([0, 2, 4], [2, 0, 1])
    pair.cache.copy_slots(torch.tensor([0, 2, 4]), torch.tensor([2, 0, 1]))
    pair.check(step_of([[4], [6], [1]], [0, 1, 2], [6, 6, 11]))


@pytest.mark.parametrize("cache", CACHES)
def test_padding_never_leaves_the_cache(tmp_path, cache):
    """A row that fills its last place stands beside one that gets many tokens."""
    pair = Pair(tmp_path, cache=cache)
    pair.check(step_of(prompts(30, 4), [1, 3], [0, 0]))
    pair.check(step_of(prompts(17), [1], [30]))
    pair.check(step_of([[7], [1, 2, 3, 4, 5]], [1, 3], [47, 4]))
    with pytest.raises(UsageError, match="would reach 49 tokens"):
        pair.runner.step(step_of([[7]], [1], [48]))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("shape", ["gpt2", "scaled", "gpt-next"])
def test_float16(tmp_path, shape, cache):
    pair = Pair(tmp_path, shape, cache, dtype="float16")
    pair.check(step_of(prompts(3, 8, 1), [4, 0, 2], [0, 0, 0]))
    pair.check(step_of([[5], [6], [7]], [4, 0, 2], [3, 8, 1]))


@pytest.mark.parametrize("cache", CACHES)
def test_what_overflowed_in_a_row_stays_with_it(tmp_path, cache):
    """Token 205 has a value beyond float16: a later row in its slot does not see it."""
    made = drawn.overflowing(tmp_path / "checkpoint")
    engine = drawn.engine(
        made, tmp_path / "engine", kind="onnx", options={"cache": cache}, limits=LIMITS,
        dtype="float16",
    )  # fmt: skip
    runner = load_runner(engine, load_registry(), {"device": "cpu"})
    steps = [step_of(prompts(3, 9), [2, 4], [0, 0]), step_of([[5], [6]], [2, 4], [3, 9])]
    expected = [runner.step(step) for step in steps]
    assert not runner.step(step_of([[205] * 20, [1]], [2, 3], [0, 0])).isfinite().all()
    runner.copy_slots([2], [4])
    runner.step(step_of([[5]], [4], [20]))
    runner.step(step_of([[5], [6], [6]], [1, 3, 4], [0, 1, 21]))  # moves the rows
    for step, logits in zip(steps, expected, strict=True):
        torch.testing.assert_close(runner.step(step), logits)


@pytest.mark.parametrize("cache", CACHES)
def test_a_prompt_is_padded_with_nothing_that_is_not_its_own(tmp_path, cache):
    """Token 0 has a value beyond float16, and the graph computes what it is padded with."""
    engine = drawn.engine(
        drawn.overflowing(tmp_path / "checkpoint", 0), tmp_path / "engine", kind="onnx",
        options={"cache": cache}, limits=LIMITS, dtype="float16",
    )  # fmt: skip
    runner = load_runner(engine, load_registry(), {"device": "cpu"})
    together = runner.prefill([[1] * 9, [2, 3]], [0, 1])
    torch.testing.assert_close(together[1:], runner.prefill([[2, 3]], [2]))


@pytest.mark.parametrize("cache", CACHES)
def test_prompt_table(tmp_path, cache):
    pair = Pair(tmp_path, cache=cache)
    table = torch.randn(3, pair.config.d_model, generator=torch.Generator().manual_seed(1))
    pair.runner.load_prompt_table(table)
    pair.reference.prompt_table = table.double()
    step = step_of([[211, 213, 5], [9, 212]], [0, 1], [0, 0])
    pair.check(step)
    with pytest.raises(UsageError, match="9 rows, the engine has room for 4"):
        pair.runner.load_prompt_table(torch.zeros(9, pair.config.d_model))


@pytest.mark.parametrize("shape", drawn.SHAPES)
def test_same_tokens_as_torch(tmp_path, shape):
    """Greedy with more prompts than slots, and beams: the loop drives both engines alike."""
    pair = Pair(tmp_path, shape)
    engine = drawn.engine(pair.checkpoint, tmp_path / "torch", limits=LIMITS)
    torch_runner = load_runner(engine, pair.registry, {"device": "cpu"})
    ids = prompts(3, 9, 1, 14, 6, 2, 5)
    for sampling in (Sampling(max_new_tokens=9), Sampling(max_new_tokens=6, num_beams=2)):
        mine, theirs = (
            [[c.tokens for c in row] for row in generate(r, ids, sampling, eos=(7, 40))]
            for r in (pair.runner, torch_runner)
        )
        assert mine == theirs


def test_gpt2_from_its_source(tmp_path, reference, checkpoint):
    """Converted, built and run, against transformers."""
    engine = drawn.engine(checkpoint, tmp_path / "engine", kind="onnx", dtype="float32")
    runner = load_runner(Engine.open(engine.path, load_registry()), load_registry())
    prompt = [5, 9, 2, 60, 33, 4]
    wanted = tiny.reference_logits(reference, prompt)
    torch.testing.assert_close(tiny.full_logits(runner, prompt).double(), wanted, rtol=0, atol=1e-4)
    assert "ONNX Runtime" in runner.description


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", ["gpt2", "gpt-next", "mqa"])
def test_trace_names_every_module(tmp_path, shape, dtype):
    pair = Pair(tmp_path, shape, dtype=dtype)
    step = step_of(prompts(4, 4), [0, 1], [0, 0])
    mine, wanted = pair.runner.trace(step), traced(pair.reference, step)
    assert list(mine) == list(wanted)  # verify names the first that differs
    for name, value in wanted.items():
        atol = pair.tolerance * max(1.0, float(value.double().std()))
        torch.testing.assert_close(mine[name].double(), value.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("cache", CACHES)
def test_verify_says_where_a_graph_goes_wrong(tmp_path, monkeypatch, cache):
    """The exporter gives the second layer's attention another scale."""
    from porttool.engines.onnx import decoder, stored_graph

    written = decoder.decoder_model

    def wrong_model(spec, tensors):
        model = written(spec, tensors)
        model.graph.initializer.append(onnx.helper.make_tensor("wrong", 1, (), [0.5]))
        for node in model.graph.node:
            if node.name == "layers.1.attention.mixed" and cache == "scatter":
                node.attribute[0].f = 0.5
            if node.name == "layers.1.attention.scores":
                node.input[1] = "wrong"
        return model

    for module in (decoder, stored_graph):
        monkeypatch.setattr(module, "decoder_model", wrong_model)
    tiny.write_source(tmp_path / "source", tiny.gpt2())
    checkpoint = tiny.converted(tmp_path / "source", tmp_path / "checkpoint")
    engine = drawn.engine(
        checkpoint, tmp_path / "engine", kind="onnx", dtype="float32", options={"cache": cache}
    )
    runner_options = {"device": "cpu"}
    report = api.evaluate(
        "parity", engine.path, hf_model=tmp_path / "source", runner_options=runner_options
    )
    assert not report.passed
    notes = " ".join(report.notes)
    assert "first differs at layers.1.attention.out.in" in notes
    assert "layers.1.attention.qkv.out still agrees" in notes


def graph_of(pair):
    return onnx.load(str(pair.engine.rank_path() / "model.onnx"), load_external_data=False)


@pytest.mark.parametrize(("cache", "opset"), [("scatter", 24), ("concat", 20)])
def test_graph_is_small_standard_and_shares_the_tied_embedding(tmp_path, cache, opset):
    pair = Pair(tmp_path, cache=cache)
    model = graph_of(pair)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    assert model.ir_version == 11
    assert {node.domain for node in model.graph.node} == {""}
    users = [n.op_type for n in model.graph.node if "embedding.weight" in n.input]
    assert sorted(users) == ["Gather", "Gemm"]
    outside = {i.name for i in model.graph.initializer if i.external_data}
    assert outside == set(pair.checkpoint.names())


def test_weight_files_are_safetensors_that_the_graph_points_into(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    small = partial(plan_shards, max_bytes=60_000)
    monkeypatch.setattr("porttool.shards.plan_shards", small)
    pair = Pair(tmp_path, "gpt-next", dtype="float16")
    folder = pair.engine.rank_path()
    files = sorted(f.name for f in folder.glob("*.safetensors"))
    assert len(files) > 2
    stored = {k: v for f in files for k, v in load_file(folder / f).items()}
    for initializer in graph_of(pair).graph.initializer:
        if place := {e.key: e.value for e in initializer.external_data}:
            first, n = int(place["offset"]), int(place["length"])
            raw = (folder / place["location"]).read_bytes()[first : first + n]
            tensor = stored[initializer.name]
            assert raw == tensor.view(torch.uint8).numpy().tobytes()
            assert first % tensor.element_size() == 0
    assert all(t.dtype == torch.float16 for t in stored.values())
    pair.check(step_of(prompts(3, 8), [1, 0], [0, 0]))


class Seen(Progress):
    total = done = 0

    def start(self, title, total):
        self.total = total

    def advance(self, amount):
        self.done += amount


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_progress_ends_at_its_total(tmp_path, checkpoint, dtype):
    seen = Seen()
    write_weights(checkpoint, dtype, tmp_path, progress=seen)
    assert seen.done == seen.total > 0


def test_manifest_records_graph_and_session(tmp_path, checkpoint):
    engine = drawn.engine(
        checkpoint, tmp_path / "engine", kind="onnx", options={"optimization": "basic"}
    )
    (record,) = engine.manifest.built
    assert record["session"] == {"optimization": "basic"}
    assert (record["opset"], record["cache"]) == (24, "scatter")
    assert record["capacity"] == engine.manifest.limits.max_len


def test_rows_are_moved_only_when_they_lie_apart():
    rows = RowMap(4)
    assert rows.arrange([2, 1]).moves == []
    assert rows.arrange([2, 1]).order == [1, 0]
    apart = rows.arrange([3, 0])
    assert (apart.first, apart.moves) == (0, [(3, 1), (1, 3)])
    assert rows.row_of == [0, 3, 2, 1]
    assert rows.arrange([0, 3]).moves == []
    assert sorted(rows.row_of) == [0, 1, 2, 3]


@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_rotary_angles_are_the_models_own_at_long_positions(base):
    """A last bit of a frequency is a thousandth of a turn ten thousand positions on."""
    config = ModelConfig(**{**drawn.BASE, "head_dim": 128, "position": "rotary",
                            "rotary_base": base})  # fmt: skip
    wanted = nn_angles(config, torch.arange(10000), torch.float32)
    assert abs(torch.from_numpy(rotary_angles(config, 10000)) - wanted).max() == 0
