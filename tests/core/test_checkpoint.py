from __future__ import annotations

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from porttool import folder
from porttool.checkpoint import Checkpoint, CheckpointManifest, read_manifest
from porttool.errors import CheckpointError, PorttoolError
from porttool.folder import hash_file


@pytest.fixture
def copy(tmp_path, checkpoint):
    return shutil.copytree(checkpoint.path, tmp_path / "checkpoint")


def edit_manifest(folder, **changes):
    tiny.edit_manifest(folder / "checkpoint.json", **changes)


def flip_bit(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_it_opens_and_says_what_it_is(checkpoint, source):
    opened = Checkpoint.open(checkpoint.path)
    manifest = opened.manifest
    assert (manifest.family, manifest.dtype, manifest.dummy) == ("gpt2", "float32", False)
    assert manifest.source.path == str(source)
    assert manifest.plugin.distribution == "porttool"
    assert manifest.tensors["layers.2.mlp.up.weight"] == (96, 24)
    assert "head.weight" not in manifest.tensors
    assert sorted(opened.names()) == sorted(manifest.tensors)
    assert opened.digest == checkpoint.digest


def test_transposed_weights_are_the_sources(checkpoint, reference):
    name = "layers.1.attention.qkv.weight"
    stored = checkpoint.file_of(name).load(name)
    assert stored.double().equal(reference.transformer.h[1].attn.c_attn.weight.t())


@pytest.mark.parametrize("place", [0.001, 0.5, 0.9999])
def test_a_flipped_bit(copy, place):
    file = copy / "model.safetensors"
    flip_bit(file, int(file.stat().st_size * place))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its SHA-256 is not the manif"):
        Checkpoint.open(copy)


def test_a_cut_file(copy):
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(9000)
    for verify in (True, False):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: has 9000 bytes, the man"):
            Checkpoint.open(copy, verify=verify)


@pytest.mark.parametrize("change", ["rewritten", "replaced", "set back"])
def test_a_file_that_changes_after_it_was_verified(tmp_path, copy, change):
    """Also while it was being verified: nothing of it may go into an engine."""
    opened = Checkpoint.open(copy)
    file = copy / "model.safetensors"
    then = file.stat().st_mtime_ns
    time.sleep(0.02)  # a kernel's clock ticks every 4 ms or so
    if change == "rewritten":
        file.write_bytes(file.read_bytes())
    elif change == "set back":  # to the time that it had
        flip_bit(file, -1)
        os.utime(file, ns=(then, then))
    else:
        shutil.copy2(file, tmp_path / "other")
        (tmp_path / "other").rename(file)
    for link in (True, False):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was read"):
            opened.copy_file(file.name, tmp_path / f"copy{link}", link=link)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was read"):
        opened.require_unchanged()
    for dtype in ("float32", "float16"):
        with pytest.raises(PorttoolError, match=r"model\.safetensors: changed while it was read"):
            tiny.built(opened, tmp_path / "engine", dtype=dtype)
        assert not (tmp_path / "engine").exists()


def test_a_file_that_another_build_links_has_not_changed(tmp_path, copy):
    opened = Checkpoint.open(copy)
    time.sleep(0.02)
    for name in opened.weight_files():
        os.link(copy / name, tmp_path / name)
    opened.require_unchanged()
    for dtype in ("float32", "float16"):
        assert tiny.built(opened, tmp_path / dtype, dtype=dtype).path.is_dir()


def test_a_file_that_changes_while_it_is_verified(copy, monkeypatch):
    def meddle(path):
        found = hash_file(path)
        path.write_bytes(path.read_bytes())
        return found

    monkeypatch.setattr(folder, "hash_file", meddle)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        Checkpoint.open(copy)


def test_no_manifest(copy):
    (copy / "checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint\.json here, so .* make it again$"):
        Checkpoint.open(copy)
    (copy.parent / ".checkpoint.partial").mkdir()
    with pytest.raises(CheckpointError, match="an interrupted run left it half done, run it again"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"format": "x"}'])
def test_a_manifest_that_is_none(copy, content):
    (copy / "checkpoint.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: not a manifest of this version"):
        Checkpoint.open(copy)


def test_every_flipped_bit_of_the_manifest(copy):
    """Also one that leaves a number a number: a wrong epsilon would look like a whole model."""
    file = copy / "checkpoint.json"
    whole = file.read_bytes()
    for at in range(len(whole)):
        for bit in (0, 1, 4):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            with pytest.raises(CheckpointError, match=r"checkpoint\.json: "):
                read_manifest(copy, file.name, CheckpointManifest)
    file.write_bytes(whole)
    Checkpoint.open(copy)


def test_an_unsealed_manifest(copy):
    file = copy / "checkpoint.json"
    values = json.loads(file.read_text())
    for seal in ("", "0" * 64, values["seal"]):
        file.write_text(json.dumps({**values, "seal": seal, "family": "gpt3"}, indent=1))
        with pytest.raises(CheckpointError, match=r"checkpoint\.json: its seal is not the SHA-256"):
            Checkpoint.open(copy)


def test_another_version_of_the_format(copy):
    edit_manifest(copy, format_version=2)
    with pytest.raises(CheckpointError, match=r"not a manifest of this version: format_version"):
        Checkpoint.open(copy)


def test_a_manifest_with_a_field_from_the_future(copy):
    edit_manifest(copy, quantum=True)
    with pytest.raises(CheckpointError, match=r"not a manifest of this version: quantum"):
        Checkpoint.open(copy)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop("norm.bias"), "the tensor norm.bias is missing; convert it again"),
        (lambda t: t.update(more=torch.ones(1)), "the tensor more does not belong here"),
        (lambda t: t.update({"norm.bias": torch.ones(7)}), "norm.bias is float32 [7], the manif"),
        (lambda t: t.update({"norm.bias": torch.ones(24).half()}), "norm.bias is float16 [24]"),
    ],
)
def test_tensors_that_the_manifest_does_not_know(copy, edit, said):
    """Hashes in order, contents not: the manifest of one conversion on files of another."""
    tensors = load_file(copy / "model.safetensors")
    edit(tensors)
    save_file(tensors, copy / "model.safetensors")
    manifest = json.loads((copy / "checkpoint.json").read_text())
    record = hash_file(copy / "model.safetensors").model_dump()
    edit_manifest(copy, files={**manifest["files"], "model.safetensors": record})
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(copy)
    assert said in str(caught.value)


def test_a_tensor_in_two_files(copy):
    """Which of the two is the model's, nobody could say."""
    save_file({"norm.bias": torch.ones(24)}, copy / "more.safetensors")
    files = json.loads((copy / "checkpoint.json").read_text())["files"]
    record = hash_file(copy / "more.safetensors").model_dump()
    edit_manifest(copy, files={**files, "more.safetensors": record})
    with pytest.raises(CheckpointError, match=r"more.safetensors: 'norm.bias' is in another of"):
        Checkpoint.open(copy)
