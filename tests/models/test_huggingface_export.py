"""Checkpoints as folders that transformers runs: the same model, and something to verify beside."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import nemo_writer
import source_cases as foreign
import tiny
from porttool import huggingface_export, shards
from porttool.checkpoint import Checkpoint
from porttool.cli import invoke as porttool
from porttool.config import ModelConfig
from porttool.errors import CheckpointError, UsageError
from porttool.huggingface_export.architectures import architecture_of
from porttool.testing import transformers_logits
from porttool_gpt2.conformance import GPT2Conformance
from porttool_gpt_next.conformance import NemoConformance
from porttool_santacoder.conformance import SantaCoderConformance

CASES = {
    "GPT2LMHeadModel": foreign.OpenAI,
    "GPT2LMHeadModel, Megatron": foreign.MegatronRanks,
    "GPTBigCodeForCausalLM": SantaCoderConformance,
    "NemotronForCausalLM": NemoConformance,
    "StableLmForCausalLM": foreign.GPT2B,
}
IDS = [5, 9, 2, 33, 1, 19]


@pytest.mark.parametrize("name", CASES)
def test_a_source_that_transformers_cannot_run_is_verified(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    case = CASES[name]()
    source = tmp_path / "source"
    case.write_source(source, 0)
    told = [f"--{k.replace('_', '-')}={v}" for k, v in case.options.items()]
    assert porttool(["convert", "source", "-o", "checkpoint", *told]) == 0
    export = ["export", "checkpoint", "--format", "huggingface", "-o", "hf", "--dtype"]
    assert porttool([*export, "float64"]) == 0
    config = json.loads(Path("hf/config.json").read_text())
    assert config["architectures"] == [name.partition(",")[0]]
    ours, theirs = transformers_logits(tmp_path / "hf", IDS), case.reference_logits(source, IDS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)

    assert porttool([*export, "float32", "--force"]) == 0
    assert porttool(["build", "checkpoint", "-o", "engine", "--dtype", "float32"]) == 0
    verify = ["verify", "engine", "--hf-model", "hf", "--runner-set", "device", "cpu",
              "--set", "prompt_len", "12", "--set", "new_tokens", "6"]  # fmt: skip
    capsys.readouterr()
    assert porttool([*verify, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["reference"].endswith("float32, of porttool's own export")
    assert {"config", "weights", "prefill", "decode"} <= {v["name"] for v in report["verdicts"]}

    tensors = load_file("hf/model.safetensors")
    changed = sorted(n for n in tensors if "norm" in n or "ln_" in n)[1]
    tensors[changed][3] += 0.5
    save_file(tensors, "hf/model.safetensors", {"format": "pt"})
    assert porttool(verify) == 1


def test_what_was_exported_converts_to_the_same_checkpoint(tmp_path):
    """Also in several files, which an index lists, and with its tokenizer."""
    source = tiny.write_source(tmp_path / "source", tiny.gpt2(vocab_size=320))
    tiny.train_tokenizer(source)
    first = tiny.converted(source, tmp_path / "first")
    (first.tokenizer / "notes.txt").write_text("of nobody's manifest")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SMALL_SHARD_BYTES", 1 << 12)
        folder = huggingface_export.export(first, tmp_path / "hf")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert not (folder / "notes.txt").exists()
    again = tiny.converted(folder, tmp_path / "again")
    assert again.config == first.config
    assert again.manifest.tokens == first.manifest.tokens
    assert (again.tokenizer / "tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()
    with (first.tokenizer / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: has \d+ bytes, the manifest says"):
        huggingface_export.export(first, tmp_path / "third")
    assert not (tmp_path / "third").exists()
    for name in first.names():
        theirs = again.file_of(name).load(name)
        assert theirs.equal(first.file_of(name).load(name)), name


def test_scores_that_are_not_scaled_stay_so(tmp_path):
    source = tiny.write_source(tmp_path / "source", tiny.gpt2(scale_attn_weights=False))
    folder = huggingface_export.export(tiny.converted(source, tmp_path / "c"), tmp_path / "hf")
    ours, theirs = (transformers_logits(place, IDS) for place in (folder, source))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_norms_stored_minus_one_lose_nothing_and_what_a_reader_should_know_is_said(tmp_path):
    model = nemo_writer.sentencepiece_model(50)
    values = {**nemo_writer.GPT_2B, "tokenizer": {"library": "sentencepiece", "model": "nemo:b_a"}}
    nemo_writer.write(
        tmp_path / "m.nemo", values, nemo_writer.draw(values), files={"b_a": model}
    )  # fmt: skip
    checkpoint = tiny.converted(tmp_path / "m.nemo", tmp_path / "checkpoint", dtype="bfloat16")
    said = Mock()
    folder = huggingface_export.export(checkpoint, tmp_path / "hf", progress=said)
    notes = [call.args[0] for call in said.note.call_args_list]
    assert ["tokenizer.model is left out" in note for note in notes] == [True, False]
    assert "these weights may be rounded" in notes[1]
    assert not list(folder.glob("tokenizer*"))
    found = load_file(folder / "model.safetensors")
    weight = checkpoint.file_of("norm.weight").load("norm.weight")
    assert (found["model.norm.weight"] - 1).equal(weight.float())
    assert found["lm_head.weight"].dtype == torch.bfloat16


def test_an_interrupted_export_goes_on_and_nothing_of_others_is_replaced(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    GPT2Conformance().write_source(Path("source"), 0)
    checkpoint = tiny.converted(Path("source"), Path("checkpoint"))
    with monkeypatch.context() as patch:
        stop = KeyboardInterrupt()
        patch.setattr(
            huggingface_export.writing, "copy_tokenizer", lambda *_: (_ for _ in ()).throw(stop)
        )
        with pytest.raises(KeyboardInterrupt):
            huggingface_export.export(checkpoint, Path("hf"))
    assert not Path("hf").exists()
    written = []
    monkeypatch.setattr(shards, "write_tensors", lambda *a: written.append(a))
    huggingface_export.export(checkpoint, Path("hf"))
    assert not written  # its one file was there
    export = ["export", "checkpoint", "--format", "huggingface", "-o"]
    assert porttool([*export, "hf"]) == 2
    assert porttool([*export, "source", "--force"]) == 2
    assert porttool([*export, "new", "--tp", "2"]) == 2
    assert "--tp 2: a Hugging Face folder is not divided" in capsys.readouterr().err
    assert Checkpoint.open(Path("checkpoint")).names()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gated": True}, "learned positions with a gated MLP"),
        ({"norm": "rmsnorm", "norm_bias": False}, "RMSNorm and norms without a bias"),
        ({"n_kv_head": 2}, "grouped key heads"),
        ({"n_kv_head": 1, "inverse_layer_scale": True}, "scores divided by the layer"),
        ({"head_dim": 9}, "heads that are not the model's width"),
        ({"mlp_bias": False}, "these biases"),
        ({"attention_scale": 0.3}, "this scale of scores"),
        ({"position": "rotary"}, "rotary positions with a plain MLP and norms stored as they act"),
        ({"position": "rotary", "gated": True}, "these biases"),
        ({"position": "rotary", "norm": "layernorm1p", "upcast_attention": True}, "in float32"),
    ],
)
def test_a_model_that_transformers_lacks_is_refused(changes, reason):
    config = ModelConfig(**{
        "vocab_size": 67, "n_positions": 48, "n_layer": 2, "n_head": 4, "n_kv_head": 4,
        "head_dim": 16, "d_model": 64, "d_ff": 40, "activation": "gelu", "attention_scale": 0.25,
        **changes,
    })  # fmt: skip
    with pytest.raises(UsageError, match=reason):
        architecture_of(config)
