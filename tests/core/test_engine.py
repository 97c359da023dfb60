from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from porttool import folder
from porttool.checkpoint import Checkpoint
from porttool.config import Limits
from porttool.engine import Engine, choose_limits
from porttool.engines.torch.builder import TorchBuilder
from porttool.engines.torch.loading import load_weights, open_weights
from porttool.errors import CheckpointError, EngineError, PluginError, UsageError
from porttool.folder import hash_file
from porttool.runner import load_runner, load_verified
from tiny import full_logits, reference_logits


@pytest.fixture
def copy(tmp_path, engine_folder):
    return shutil.copytree(engine_folder, tmp_path / "engine")


def edit_manifest(folder, change):
    file = folder / "engine.json"
    values = json.loads(file.read_text())
    change(values)
    tiny.edit_manifest(file, **values)


def test_it_opens_and_says_what_it_is(engine_folder, registry):
    manifest = Engine.open(engine_folder, registry).manifest
    assert (manifest.kind, manifest.family, manifest.dtype) == ("torch", "gpt2", "float64")
    assert (manifest.world_size, manifest.dummy) == (1, False)
    assert manifest.tokens.eos == (66,)
    assert manifest.builder.distribution == manifest.converter.distribution == "porttool"
    assert len(manifest.checkpoint_digest) == 64


def test_an_engine_of_the_checkpoints_own_type_shares_its_files(tmp_path, checkpoint):
    engine = tiny.built(checkpoint, tmp_path / "engine")
    weights = next(engine.rank_path().glob("*.safetensors"))
    assert weights.samefile(checkpoint.path / weights.name)


def test_what_a_build_returns_is_what_stands_there(tmp_path, checkpoint):
    """Its seal, too, which `build --json` tells."""
    built = tiny.built(checkpoint, tmp_path / "engine")
    assert built.manifest.seal
    assert built.manifest == Engine.open(tmp_path / "engine").manifest


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (None, "TorchBuilder.build_rank returned a NoneType, not a Mapping"),
        ({"scale": torch.ones(1)}, "TorchBuilder.build_rank returned what JSON cannot hold: Obj"),
    ],
)
def test_a_builder_that_returns_no_record_is_named(tmp_path, checkpoint, monkeypatch, record, said):
    monkeypatch.setattr(TorchBuilder, "build_rank", lambda *_, **__: record)
    with pytest.raises(PluginError, match=said):
        tiny.built(checkpoint, tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dtype", "atol"), [("float16", 0.05), ("bfloat16", 0.4)])
def test_narrow_engines_are_near(tmp_path, registry, checkpoint, reference, dtype, atol):
    engine = tiny.built(checkpoint, tmp_path / "engine", dtype=dtype)
    found = full_logits(tiny.loaded(engine.path, registry), [5, 9, 2, 40])
    expected = reference_logits(reference, [5, 9, 2, 40])
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=0)
    assert not found.double().equal(expected)


def test_a_flipped_bit(copy, registry):
    file = next((copy / "rank0").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank0/.*: its SHA-256 is not the manifest's"):
        Engine.open(copy, registry)


@pytest.mark.parametrize("damage", ["data", "header", "length"])
def test_a_flipped_bit_is_found_while_weights_are_loaded(copy, registry, damage):
    """Whatever the loader thinks of it: the file's name, and that it was altered."""
    file = next((copy / "rank0").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[{"data": -3, "header": 9, "length": 0}[damage]] ^= 4
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{file.name}: its SHA-256 is not the manifest's"):
        load_verified(copy, registry, {"device": "cpu"})


def test_weights_that_cannot_be_read_are_named(copy, registry, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    file = next((copy / "rank0").glob("*.safetensors"))
    with pytest.raises(CheckpointError, match=rf"{file.name}: Input/output error$"):
        load_verified(copy, registry, {"device": "cpu"})
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: Not a directory"):
        open_weights(file / "gone.safetensors")


def test_a_tensor_in_two_files_is_refused(copy, registry):
    file = next((copy / "rank0").glob("*.safetensors"))
    more = file.with_name("more.safetensors")
    save_file({"norm.bias": torch.zeros(1, dtype=torch.float64)}, more)

    def add(values):
        values["files"][f"rank0/{more.name}"] = hash_file(more).model_dump()

    edit_manifest(copy, add)
    with pytest.raises(CheckpointError, match=r"'norm\.bias' is in another of the engine's files"):
        load_verified(copy, registry, {"device": "cpu"})


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_files_without_tensors_are_hashed_too(copy, registry, device):
    file = next((copy / "rank0").glob("*.safetensors"))
    save_file({}, file)

    def alter(values):
        values["files"][f"rank0/{file.name}"] = hash_file(file).model_dump()

    edit_manifest(copy, alter)
    engine = Engine.open(copy, registry)
    assert load_weights(engine, device) == {}
    with pytest.raises(EngineError, match="embedding"):
        load_verified(copy, registry, {"device": "cpu"})
    save_file({}, file, metadata={"a": "b"})
    with pytest.raises(CheckpointError, match=rf"{file.name}: its SHA-256 is not"):
        load_weights(engine, device)


def test_weights_are_hashed_once(copy, registry, monkeypatch):
    hashed = []
    monkeypatch.setattr(folder, "hash_file", lambda path: hashed.append(path) or hash_file(path))
    load_verified(copy, registry, {"device": "cpu"})
    assert not hashed  # by any but the loader: there are no other files
    with pytest.raises(UsageError, match="devise"):
        load_verified(copy, registry, {"devise": "cpu"})
    assert not hashed  # what is wrong is not in a file
    Engine.open(copy, registry)
    assert [path.suffix for path in hashed] == [".safetensors"]


def test_a_file_that_is_gone(copy, registry):
    next((copy / "rank0").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"\.safetensors: the file is missing; make the fol"):
        Engine.open(copy, registry)


def test_weights_that_the_manifest_does_not_know_are_not_loaded(copy, registry):
    expected = full_logits(tiny.loaded(copy, registry), [5, 9, 2])
    [file] = (copy / "rank0").glob("*.safetensors")
    tensors = load_file(file)
    save_file({n: t * 2 for n, t in tensors.items()}, copy / "rank0" / "z.safetensors")
    assert full_logits(tiny.loaded(copy, registry), [5, 9, 2]).equal(expected)


def test_no_engine_there(tmp_path, registry):
    with pytest.raises(CheckpointError, match=r"there is no engine\.json here"):
        Engine.open(tmp_path, registry)


def test_a_checkpoint_is_no_engine(checkpoint, registry):
    with pytest.raises(UsageError, match=r"a checkpoint of porttool, not an engine: build it"):
        Engine.open(checkpoint.path, registry)


def test_another_version_of_the_format(copy, registry):
    edit_manifest(copy, lambda m: m.update(format_version=2))
    with pytest.raises(
        CheckpointError, match=r"engine\.json: not a manifest of this version: form"
    ):
        Engine.open(copy, registry)


def test_another_version_of_the_plugin(copy, registry):
    edit_manifest(copy, lambda m: m["builder"].update(version="0.0.1"))
    with pytest.raises(PluginError) as caught:
        Engine.open(copy, registry)
    assert "built by" in str(caught.value)
    assert "porttool 0.0.1" in str(caught.value)
    Engine.open(copy)  # its files are whole: it can still be inspected


def test_a_kind_that_is_not_installed(copy, registry):
    edit_manifest(copy, lambda m: m.update(kind="torhc"))
    with pytest.raises(UsageError, match=r"no runner named 'torhc'; did you mean 'torch'\?"):
        Engine.open(copy, registry)


@pytest.mark.parametrize("damage", ["tensors", "checkpoint.json"])
def test_a_checkpoint_of_another_version_is_not_built(tmp_path, checkpoint, damage):
    folder = shutil.copytree(checkpoint.path, tmp_path / "checkpoint")
    file = folder / "checkpoint.json"
    change = {"format_version": 0} if damage == "tensors" else {"porttool_format": 1}
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match="not a manifest of this version"):
        Checkpoint.open(folder)


def test_options_nobody_knows(engine_folder, registry):
    with pytest.raises(UsageError) as caught:
        load_runner(Engine.open(engine_folder), registry, {"devise": "cpu"})
    assert "bad option for 'torch': devise" in str(caught.value)
    assert "its options are: device, canonical" in str(caught.value)
    with pytest.raises(UsageError, match=r"device: .*'auto', 'cpu' or 'cuda'.*got 'tpu'"):
        load_runner(Engine.open(engine_folder), registry, {"device": "tpu"})


def test_a_gpu_that_is_not_there(engine_folder, registry, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="device cuda was asked for, but torch sees no GPU"):
        load_runner(Engine.open(engine_folder), registry, {"device": "cuda"})


def test_the_canonical_decoder_states_its_limits(runner):
    from porttool.nn import Step

    with pytest.raises(UsageError, match="a row would reach 49 tokens, but the engine holds 48"):
        runner.step(Step.prefill([[1] * 49]))
    with pytest.raises(UsageError, match="slot 4 asked for, but the engine has 4; build it with a"):
        runner.step(Step.prefill([[1]], [4]))


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ({}, (24, 24)),
        ({"max_input_len": 40}, (40, 8)),
        ({"max_output_len": 10}, (38, 10)),
        ({"max_input_len": 47, "max_output_len": 1}, (47, 1)),
    ],
)
def test_limits_that_were_not_asked_for(checkpoint, asked, got):
    limits = choose_limits(checkpoint.config, **asked)
    assert (limits.max_input_len, limits.max_output_len) == got


def test_limits_beyond_the_positions(checkpoint):
    with pytest.raises(UsageError, match=r"--max-input-len 40 plus --max-output-len 9 is more than "
                       r"the model's 48 positions"):  # fmt: skip
        choose_limits(checkpoint.config, max_input_len=40, max_output_len=9)
    rotary = checkpoint.config.model_copy(update={"position": "rotary"})
    assert choose_limits(rotary, max_input_len=40, max_output_len=9).max_len == 49


@pytest.mark.parametrize(
    ("asked", "flag"),
    [
        ({"max_batch_size": 10**8}, "--max-batch-size 100000000: .* less than or equal to"),
        ({"max_prompt_rows": 10**12}, "--max-prompt-embedding-table-size 1000000000000: "),
    ],
)
def test_limits_that_no_engine_has(checkpoint, asked, flag):
    with pytest.raises(UsageError, match=flag):
        choose_limits(checkpoint.config, **asked)


def test_an_output_that_is_there_already(tmp_path, checkpoint):
    limits = Limits(max_input_len=8, max_output_len=8)
    tiny.built(checkpoint, tmp_path / "engine")
    said = r"engine exists already \(a finished engine of gpt2 in float32, from .*, or add --force"
    with pytest.raises(UsageError, match=said):
        tiny.built(checkpoint, tmp_path / "engine", limits=limits)
    again = tiny.built(checkpoint, tmp_path / "engine", limits=limits, replace=True)
    assert Engine.open(again.path).manifest.limits == limits


def test_an_interrupted_build_is_not_taken_for_an_engine(tmp_path, checkpoint, monkeypatch):
    from porttool.engines.torch.builder import TorchBuilder

    def stop(*_, **options):
        (options["out"] / "half").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TorchBuilder, "build_rank", stop)
        with pytest.raises(KeyboardInterrupt):
            tiny.built(checkpoint, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
    with pytest.raises(CheckpointError, match="an interrupted run left it half done, run it again"):
        Engine.open(tmp_path / "engine")
    engine = tiny.built(checkpoint, tmp_path / "engine")
    assert not list(engine.path.rglob("half"))


def test_the_tokenizer_travels_along(tmp_path, tokenizer_folder, registry):
    folder = tiny.write_source(tmp_path / "source", tiny.gpt2(vocab_size=320))
    shutil.copy(tokenizer_folder / "tokenizer.json", folder)
    checkpoint = tiny.converted(folder, tmp_path / "checkpoint")
    engine = tiny.built(checkpoint, tmp_path / "engine")
    assert "tokenizer/tokenizer.json" in engine.manifest.files
    (engine.tokenizer / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer/tokenizer\.json: has 2 bytes"):
        Engine.open(engine.path, registry)
