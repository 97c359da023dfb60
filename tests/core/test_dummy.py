"""Dummy builds: the shape that was asked for, seeded weights, and a mark that nobody can miss."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import drawn
from porttool.cli import invoke
from porttool.config import ModelConfig
from porttool.dummy import Knobs, drawn_checkpoint, dummy_config, find_shape, read_shape
from porttool.engine import Engine
from porttool.errors import SourceError, UsageError
from porttool.nn import KVCache, meta_decoder
from porttool.progress import format_bytes
from porttool.sharding import rank_config

TINY = ["--n-layer", "2", "--n-embd", "32", "--n-head", "4", "--vocab-size", "61",
        "--n-positions", "40"]  # fmt: skip


def parameters(config):
    return sum(t.numel() for t in meta_decoder(config).state_dict().values())


@pytest.mark.parametrize(
    ("model", "n_parameters"),
    [
        ("gpt2", 124_439_808),
        ("camel5b", 5_047_369_728),
        ("santacoder", 1_124_886_528),
        ("gpt_next", 2_253_590_528),
        ("starcoder", 15_517_456_384),
    ],
)
def test_families_name_the_shape_they_are_published_with(registry, model, n_parameters):
    assert parameters(find_shape(registry, model, None)) == n_parameters


def test_knobs_alone(registry):
    """The ancestor's 175B: heads share the width, the MLP is four times as wide."""
    knobs = Knobs(n_layer=96, n_embd=12288, n_head=96, vocab_size=51200, n_positions=1024)
    made = dummy_config(find_shape(registry, None, None), knobs)
    assert (made.head_dim, made.d_ff, made.n_kv_head) == (128, 49152, 96)
    assert (made.position, made.activation, made.qkv_bias) == ("learned", "gelu", True)
    assert made.attention_scale == 128**-0.5


def test_a_family_changed_by_knobs(registry):
    gpt2, santacoder = (find_shape(registry, m, None) for m in ("gpt2", "santacoder"))
    large = dummy_config(gpt2, Knobs(n_layer=48, n_embd=1600, n_head=25))
    assert parameters(large) == 1_557_611_200
    wider = dummy_config(santacoder, Knobs(n_embd=6144, n_head=48))
    assert (wider.n_kv_head, wider.head_dim, wider.d_ff) == (1, 128, 24576)
    deeper = dummy_config(gpt2, Knobs(n_layer=13))
    assert deeper == gpt2.model_copy(update={"n_layer": 13})


def test_kinds_by_knobs():
    base = drawn.shape("gpt2")
    made = dummy_config(base, Knobs(hidden_act="fast-swiglu", rotary_pct=0.5, bias=False))
    assert (made.activation, made.gated) == ("silu", True)
    assert (made.position, made.rotary_dim) == ("rotary", 6)
    assert not (made.qkv_bias or made.out_bias or made.mlp_bias) and made.norm_bias
    assert dummy_config(made, Knobs(rotary_pct=0)).position == "learned"
    assert dummy_config(base, Knobs(head_dim=16)).attention_scale == base.attention_scale


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"n_layer": 2}, "needs --n-embd, --n-head, --vocab-size, --n-positions"),
        ({"n_embd": 30, "n_head": 4}, "--n-embd 30 is not a multiple of --n-head 4; give"),
        ({"n_embd": 32, "n_head": 4, "n_kv_head": 3}, "n_head 4 is not a multiple of n_kv_head 3"),
        ({"n_embd": 28, "n_head": 4, "rotary_pct": 1}, "rotary dimension 7 is odd"),
        ({"n_embd": 32, "n_head": 4, "hidden_act": "tanh"}, "--hidden-act tanh: porttool knows"),
        ({"n_embd": 32, "n_head": 4, "n_layer": 5000}, "n_layer: .* less than or equal to 1024"),
    ],
)
def test_what_the_decoder_cannot_express_is_refused(knobs, message):
    rest = {"n_layer": 1, "vocab_size": 9, "n_positions": 9} if len(knobs) > 1 else {}
    with pytest.raises(UsageError, match=message):
        dummy_config(None, Knobs(**{**rest, **knobs}))


def test_shapes_from_files(registry, tmp_path, checkpoint):
    config = drawn.shape("gpt-next")
    bare = tmp_path / "shape.json"
    bare.write_text(config.model_dump_json())
    assert read_shape(registry, bare, None) == config
    assert read_shape(registry, checkpoint.path / "checkpoint.json", None) == checkpoint.config
    theirs = {
        "model_type": "gpt_bigcode", "n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 61,
        "n_positions": 40, "multi_query": True, "activation_function": "gelu_pytorch_tanh",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    assert read_shape(registry, tmp_path, None).n_kv_head == 1
    (tmp_path / "config.json").write_text(json.dumps({**theirs, "mystery": 1}))
    with pytest.raises(SourceError, match="mystery") as caught:
        read_shape(registry, tmp_path, None)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: unknown keys")
    bare.write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match=f"^{re.escape(str(bare))}: no installed family .*'llama'"):
        read_shape(registry, bare, None)
    bare.write_text(json.dumps({**config.model_dump(), "n_kv_head": 3}))
    with pytest.raises(UsageError, match="not a decoder's shape"):
        read_shape(registry, bare, None)


def draw(folder, config, **options):
    with drawn_checkpoint(config, folder / "engine", **options) as found:
        assert found.manifest.dummy
        return load_file(found.path / "model.safetensors")


def test_weights_follow_the_seed_and_a_sensible_scale(tmp_path):
    config = ModelConfig(**{**drawn.BASE, "d_model": 96, "d_ff": 384})
    first, again, other = (draw(tmp_path, config, seed=s) for s in (7, 7, 8))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)
    assert not torch.equal(first["layers.0.mlp.up.weight"], first["layers.1.mlp.up.weight"])
    assert {t.dtype for t in first.values()} == {torch.float16}
    assert 0.019 < first["layers.1.mlp.up.weight"].float().std() < 0.021
    assert 0.9 < first["norm.weight"].float().mean() < 1.1
    centred = config.model_copy(update={"norm": "layernorm1p"})
    assert abs(draw(tmp_path, centred)["norm.weight"].float().mean()) < 0.1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def dummy(tmp_path_factory):
    """A dummy engine, built by the command."""
    path = tmp_path_factory.mktemp("dummy") / "engine"
    command = ["build", "--dummy", *TINY, "--dtype", "float32", "--max-output-len", "8"]
    assert invoke([*command, "--output", str(path)]) == 0
    assert [p.name for p in path.parent.iterdir()] == ["engine"]
    return path


def test_the_engine_says_that_it_is_a_dummy(dummy, capsys):
    manifest = Engine.open(dummy).manifest
    assert (manifest.dummy, manifest.family, manifest.converter.component) == (True, *["dummy"] * 2)
    assert manifest.source.path == "random weights, seed 0"
    assert invoke(["inspect", str(dummy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dummy"] is True


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_inspect_tells_how_much_memory_an_engine_takes(tmp_path, capsys, n_ranks):
    engine = tmp_path / "engine"
    build = ["build", "--dummy", *TINY, "--output", str(engine), "--tp", str(n_ranks)]
    assert invoke([*build, "--dtype", "float32", "--max-batch-size", "3"]) == 0
    capsys.readouterr()
    assert invoke(["inspect", str(engine), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["memory"]
    weights = sum(file.stat().st_size for file in engine.rglob("*.safetensors")) // n_ranks
    made = Engine.open(engine).manifest
    cache = KVCache(rank_config(made.config, n_ranks), 3, made.limits.max_len)
    n_bytes = cache.keys.nbytes + cache.values.nbytes
    rows = f"(3 rows of {made.limits.max_len} tokens)" + " on each rank" * (n_ranks > 1)
    assert said == (
        f"{format_bytes(weights)} of weights and {format_bytes(n_bytes)} of cache {rows}, "
        "and what a step needs"
    )


@pytest.mark.parametrize(("batch", "width", "beams"), [("2", "8", 2), ("8", "4", 4)])
def test_a_build_tells_how_many_beams_can_run(tmp_path, capsys, batch, width, beams):
    """Beams are rows of the batch."""
    command = ["build", "--dummy", *TINY, "--output", str(tmp_path / "engine")]
    assert invoke([*command, "--max-batch-size", batch, "--max-beam-width", width]) == 0
    assert f"batch {batch}, input 20, output 20, beams {beams};" in capsys.readouterr().out


def test_it_runs_with_token_ids_and_a_warning(dummy, tmp_path, capsys):
    (tmp_path / "ids.csv").write_text("1,2,3\n")
    command = ["run", str(dummy), "--max-output-len", "4", "--set", "compiled", "false"]
    assert invoke([*command, "--set", "device", "cpu", "--input-tokens",
                   str(tmp_path / "ids.csv")]) == 0  # fmt: skip
    shown = capsys.readouterr()
    assert len(shown.out.split()) == 4
    assert "weights of this engine are random" in shown.err
    assert invoke([*command, "--input-text", "hello"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify", "summarize"])
def test_there_is_nothing_to_verify(dummy, command, capsys, source):
    assert invoke([command, str(dummy), "--hf-model", str(source)]) == 2
    said = capsys.readouterr().err
    assert "has random weights (build --dummy): it is a port of nothing" in said
    assert "parity" not in said  # the evaluator's name is no command's


def test_ranks_and_other_engines(tmp_path):
    command = ["build", "--dummy", *TINY]
    assert invoke([*command, "--tp", "2", "--output", str(tmp_path / "two")]) == 0
    assert Engine.open(tmp_path / "two").manifest.world_size == 2
    pytest.importorskip("onnx")
    assert invoke([*command, "--engine", "onnx", "--output", str(tmp_path / "onnx")]) == 0
    assert Engine.open(tmp_path / "onnx").manifest.dummy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dummy", *TINY], "name the engine's folder with --output"),
        (["CKPT", "--dummy", *TINY, "--output", "x"], "leave the checkpoint CKPT out"),
        (["CKPT", "--n-layer", "2", "--output", "x"], "--n-layer: only a --dummy build"),
        (["--dummy", "--model", "gpt2", "--hidden-act", "tanh", "--output", "x"], "--hidden-act"),
        (["--dummy", "--model", "gpt3", "--output", "x"], "'gpt3'"),
    ],
)
def test_requests_that_contradict_themselves(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke(["build", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_there_already(capsys, tmp_path):
    command = ["build", "--dummy", *TINY, "--output", str(tmp_path / "taken")]
    (tmp_path / "taken").mkdir()
    assert invoke(command) == 0, "an empty folder is as good as none"
    assert invoke(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "taken exists already (a finished engine of dummy in float16, from " in said
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
