"""Engine folders that are whole and sealed, but not what the builder wrote: what fuzzing found."""

from __future__ import annotations

import shutil

import pytest
import torch

import drawn
import tiny
from fuzzing.judge import fresh_peak, peak_memory
from porttool.config import Limits
from porttool.engine import Engine
from porttool.errors import EngineError, UsageError
from porttool.folder import hash_file
from porttool.plugins import load_registry
from porttool.runner import load_verified

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

LIMITS = Limits(max_batch_size=2, max_input_len=5, max_output_len=3)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Engines of one model, by the form of their cache; nobody changes them."""
    folder = tmp_path_factory.mktemp("built")
    config = drawn.shape("gpt-next")
    checkpoint = drawn.checkpoint(folder / "checkpoint", config, drawn.weights(config))
    for cache in ("scatter", "concat"):
        drawn.engine(checkpoint, folder / cache, kind="onnx", dtype="float32", limits=LIMITS,
                     options={"cache": cache})  # fmt: skip
    return folder


@pytest.fixture
def engine(built, tmp_path):
    return shutil.copytree(built / "scatter", tmp_path / "engine")


@pytest.fixture
def no_session(monkeypatch):
    """ONNX Runtime may not even see what is altered."""

    def make_session(model, settings, folder):
        pytest.fail("a session was made")

    monkeypatch.setattr("porttool.engines.onnx.runner.make_session", make_session)


def load(folder):
    return load_verified(folder, load_registry(), {"device": "cpu", "threads": 1})


def edit(folder, **changes):
    """Change some of the manifest's tables in part; seal it."""
    made = Engine.open(folder, verify=False).manifest.model_dump(mode="json")
    parts = {k: {**made[k], **v} if isinstance(v, dict) else v for k, v in changes.items()}
    tiny.edit_manifest(folder / "engine.json", **parts)


def nameless_bias(model):
    """A bias without a name: ONNX Runtime 1.31 ends with SIGSEGV when it rewrites the graph."""
    node = next(n for n in model.graph.node if n.op_type == "LayerNormalization")
    node.input[2:] = [""]


def place_outside(model):
    weight = next(t for t in model.graph.initializer if t.name == "head.weight")
    next(e for e in weight.external_data if e.key == "location").value = "../../secret"


def another_word(model):
    model.graph.node[0].doc_string = "mine"


@pytest.mark.parametrize("change", [nameless_bias, place_outside, another_word])
def test_another_graph(engine, no_session, change):
    file = engine / "rank0" / "model.onnx"
    model = onnx.load(str(file), load_external_data=False)
    change(model)
    file.write_bytes(model.SerializeToString(deterministic=True))
    edit(engine, files={"rank0/model.onnx": hash_file(file).model_dump()})
    with pytest.raises(EngineError, match=r"rank0/model\.onnx: not the graph .* build the engine"):
        load(engine)


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, b"\x08\x0b"])
def test_no_graph(engine, no_session, data):
    file = engine / "rank0" / "model.onnx"
    file.write_bytes(data)
    edit(engine, files={"rank0/model.onnx": hash_file(file).model_dump()})
    with pytest.raises(EngineError, match="not the graph"):
        load(engine)


@pytest.mark.parametrize(
    "changes",
    [{"config": {"attention_scale": 0.5}}, {"config": {"activation": "gelu"}},
     {"limits": {"max_output_len": 4}}, {"limits": {"max_prompt_rows": 2}}],
)  # fmt: skip
def test_the_graph_of_another_manifest(engine, no_session, changes):
    edit(engine, **changes)
    with pytest.raises(EngineError, match="not the graph that is written for the manifest's"):
        load(engine)


def test_the_graph_of_another_cache(built, engine, no_session):
    shutil.copy(built / "concat" / "rank0" / "model.onnx", engine / "rank0")
    file = engine / "rank0" / "model.onnx"
    edit(engine, files={"rank0/model.onnx": hash_file(file).model_dump()})
    with pytest.raises(EngineError, match="not the graph"):
        load(engine)


def test_limits_far_beyond_the_graph_cost_nothing(engine, no_session):
    edit(engine, limits={"max_input_len": 1 << 24})
    before = fresh_peak()
    with pytest.raises(EngineError, match="not the graph"):
        load(engine)
    assert peak_memory() - before < 50_000_000


@pytest.mark.parametrize(
    ("cache", "field", "number"),
    [("scatter", "rotary_base", 1e300), ("scatter", "rotary_base", 1e-300),
     ("concat", "attention_scale", 1e300)],
)  # fmt: skip
def test_numbers_that_float32_does_not_hold(built, tmp_path, no_session, cache, field, number):
    folder = shutil.copytree(built / cache, tmp_path / "engine")
    edit(folder, config={field: number})
    with pytest.raises(EngineError, match=r"engine: .*of the config is beyond float32 \("):
        load(folder)


def test_weights_of_another_config_or_type(engine, no_session):
    edit(engine, config={"d_ff": 40})
    with pytest.raises(EngineError, match="the config and the weights disagree about layers"):
        load(engine)
    edit(engine, config={"d_ff": drawn.shape("gpt-next").d_ff}, dtype="float16")
    with pytest.raises(EngineError, match="the manifest says float16, which the weights are not"):
        load(engine)
    edit(engine, dtype="float64")
    with pytest.raises(EngineError, match="no ONNX engine is float64"):
        load(engine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"session": 3}, "describes no ONNX graph: session"),
        ({"session": {"optimization": "/etc/passwd"}}, "no ONNX graph: session.optimization"),
        ({"cache": "paged"}, "no ONNX graph: cache"),
        ({"rank": 1}, "no ONNX graph: rank"),
        (None, "says 1 ranks and describes 0"),
    ],
)
def test_records_of_another_builder(engine, no_session, change, message):
    (record,) = Engine.open(engine).manifest.built
    edit(engine, built=[] if change is None else [{**record, **change}])
    with pytest.raises(EngineError, match=message):
        load(engine)


def test_a_kind_that_nobody_runs(engine):
    edit(engine, kind="x" * 5000)
    with pytest.raises(
        UsageError, match=r"engine, built by porttool [0-9.]+: there is no runner named 'xx"
    ) as caught:
        load(engine)
    assert len(str(caught.value)) < 2000


def test_what_onnx_runtime_raises_and_prints(engine, capsys):
    """Its message quotes a name that is no UTF-8; it would print that it tries again."""
    from porttool.engines.onnx.session import SessionSettings, make_session

    folder = engine / "rank0"
    data = (folder / "model.onnx").read_bytes()
    assert b"layers.0.norm1.out" in data
    bad = data.replace(b"layers.0.norm1.out", b"layers.0.norm1.ou\xff", 1)
    with pytest.raises(EngineError, match=r"rank0: ONNX Runtime cannot load the graph on cpu"):
        make_session(bad, SessionSettings("cpu"), folder)
    assert capsys.readouterr().out == ""


def test_a_step_that_onnx_runtime_refuses(engine):
    runner = load(engine)
    logits = tiny.full_logits(runner, [1, 5])
    assert logits.isfinite().all()
    with pytest.raises(EngineError, match=r"rank0: ONNX Runtime could not run the step: "):
        tiny.full_logits(runner, [1, 1 << 20])
    assert torch.equal(tiny.full_logits(runner, [1, 5]), logits)
