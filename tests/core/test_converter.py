from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from porttool import shards
from porttool.checkpoint import Checkpoint
from porttool.converter import Refinement
from porttool.errors import PluginError, PorttoolError, SourceError, UsageError
from porttool.progress import SILENT, Progress
from porttool_gpt2.converter import GPT2Converter
from tiny import Form


@pytest.fixture
def copy(tmp_path, source):
    return shutil.copytree(source, tmp_path / "source")


def edit(folder, change):
    """Change the tensors of a single-file source."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder, tmp_path, **options):
    """The message with which a conversion is refused; nothing may be left at its place."""
    with pytest.raises(SourceError) as caught:
        tiny.converted(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("transformer.h.1.ln_2.bias"), "tensors missing from the source: h.1.ln_2"),
        (lambda t: t.update({"transformer.h.0.attn.rotary": torch.ones(2)}),
         "nothing accounts for in model.safetensors: h.0.attn.rotary"),
        (lambda t: t.update({"transformer.h.3.ln_1.bias": torch.ones(24)}), "h.3.ln_1.bias"),
        (lambda t: t.update({"wte.weight": torch.ones(67, 24)}),
         "model.safetensors: transformer.wte.weight and wte.weight are both wte.weight"),
        (lambda t: t.update({"transformer.wpe.weight": torch.ones(47, 24)}),
         "position.weight should be [48, 24] but comes out as [47, 24] of wpe.weight [47, 24]"),
        (lambda t: t.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(96, 24)}),
         "layers.0.mlp.up.weight should be [96, 24] but comes out as [24, 96]"),
        (lambda t: t.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(5)}),
         "h.0.mlp.c_fc.weight [5] in model.safetensors"),
        (lambda t: t["transformer.h.2.ln_1.weight"].fill_(float("nan")),
         "layers.2.norm1.weight: holds NaN or infinity"),
        (lambda t: t["transformer.wte.weight"][60].fill_(float("-inf")),
         "embedding.weight: holds NaN or infinity"),
        (lambda t: t.update({"lm_head.weight": torch.ones(67, 24)}),
         "lm_head.weight in model.safetensors differs from wte.weight"),
        (lambda t: [t.update({n: v.int()}) for n, v in list(t.items())],
         "in model.safetensors is int32, not a floating-point tensor"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(tmp_path, copy, change, said):
    edit(copy, change)
    assert said in refusal(copy, tmp_path)


def test_integer_weights_among_floats(tmp_path, copy):
    edit(copy, lambda t: t.update({"transformer.wpe.weight": torch.ones(48, 24).int()}))
    said = "wpe.weight in model.safetensors is int32, not a floating-point tensor"
    assert said in refusal(copy, tmp_path)


def test_nonfinite_weights_when_asked_for(tmp_path, copy):
    edit(copy, lambda t: t["transformer.ln_f.weight"][3].fill_(float("nan")))
    found = tiny.converted(copy, tmp_path / "out", allow_nonfinite=True)
    assert found.file_of("norm.weight").load("norm.weight").isnan().nonzero().tolist() == [[3]]


def test_overflow_in_half_precision(tmp_path, copy):
    edit(copy, lambda t: t["transformer.ln_f.weight"][3].fill_(70000.0))
    said = refusal(copy, tmp_path, dtype="float16")
    assert "norm.weight: values up to 7e+04 do not fit float16; choose --dtype bfloat16" in said
    assert tiny.converted(copy, tmp_path / "out", dtype="bfloat16").manifest.dtype == "bfloat16"


def test_overflow_in_single_precision(tmp_path, copy):
    large = torch.full((24,), 1e300, dtype=torch.float64)
    edit(copy, lambda t: t.update({"transformer.ln_f.weight": large}))
    said = refusal(copy, tmp_path, dtype="float32")
    assert "norm.weight: values up to 1e+300 do not fit float32; choose --dtype float64" in said


@pytest.mark.parametrize("wanted", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_to_every_other(tmp_path, reference, stored, wanted):
    form = Form(dtype=stored)
    source = tiny.write_source(tmp_path / "source", reference, form)
    found = tiny.converted(source, tmp_path / "out", dtype=wanted)
    name, target = "layers.0.attention.qkv.weight", getattr(torch, wanted)
    weight = reference.transformer.h[0].attn.c_attn.weight
    assert found.manifest.dtype == wanted
    assert found.file_of(name).load(name).equal(weight.t().to(stored).to(target))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_the_sources_own_dtype_is_kept(tmp_path, reference, stored):
    source = tiny.write_source(tmp_path / "s", reference, Form(dtype=stored, masks=True))
    found = tiny.converted(source, tmp_path / "out").manifest.dtype
    assert found == str(stored).removeprefix("torch.")


def test_the_type_of_what_is_left_out_does_not_count(tmp_path, copy):
    """Old checkpoints keep masks and rotary frequencies in float32 beside weights in half of it."""
    edit(copy, lambda t: [t.update({n: v.half()}) for n, v in list(t.items())])
    edit(copy, lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 48, 48)}))
    assert tiny.converted(copy, tmp_path / "out").manifest.dtype == "float16"


@pytest.mark.parametrize(
    ("most", "one", "wanted"),
    [
        (torch.float16, torch.float32, "float32"),
        (torch.float32, torch.bfloat16, "float32"),
        (torch.float16, torch.bfloat16, "float32"),
        (torch.float32, torch.float64, "float64"),
    ],
)
def test_of_several_types_one_is_taken_that_holds_all(tmp_path, copy, most, one, wanted):
    """A narrower one, or either of two halves, would round the weights without a word."""
    edit(copy, lambda t: [t.update({n: v.to(most)}) for n, v in list(t.items())])
    third = (torch.ones(48, 24, dtype=torch.float64) / 3).to(one)
    edit(copy, lambda t: t.update({"transformer.wpe.weight": third}))
    stored = load_file(copy / "model.safetensors")
    found = tiny.converted(copy, tmp_path / "out")
    assert found.manifest.dtype == wanted
    for ours, theirs in {"position.weight": "wpe.weight", "norm.bias": "ln_f.bias"}.items():
        tensor = found.file_of(ours).load(ours)
        assert tensor.double().equal(stored[f"transformer.{theirs}"].double())


class Unpacking(GPT2Converter):
    """Reads what has to be unpacked first, and says what module that is of."""

    @contextmanager
    def prepare(self, source, scratch, progress):
        ready = scratch / "ready"
        shutil.copytree(source / "packed", ready)
        try:
            yield ready
        finally:
            shutil.rmtree(ready)

    def module(self, config):
        raise PluginError("asked for the module of the base")


class Narrower(Refinement):
    """A family that an unpacking one reads."""

    name = family = "narrower"
    refines = "unpacking"

    def recognises(self, config):
        return True


def test_a_refinement_reads_as_its_base_does(tmp_path, source):
    shutil.copytree(source, tmp_path / "source" / "packed")
    (tmp_path / "scratch").mkdir()
    made = Narrower(Unpacking())
    with made.prepare(tmp_path / "source", tmp_path / "scratch", SILENT) as ready:
        config = made.open(ready).config
    assert not ready.exists()
    with pytest.raises(PluginError, match="the module of the base"):
        made.module(config)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_shards_and_their_index(tmp_path, reference, file):
    source = tiny.write_source(tmp_path / "source", reference, Form(file=file, shards=3))
    stem, suffix = file.rsplit(".", 1)
    shard = source / f"{stem}-00002-of-00003.{suffix}"
    index = source / f"{file}.index.json"
    kept, data = index.read_text(), shard.read_bytes()
    values = json.loads(kept)

    shard.unlink()
    assert f"{shard.name}: the shard is missing; fetch it again" in refusal(source, tmp_path)
    shard.write_bytes(data[: len(data) // 2])
    said = refusal(source, tmp_path)
    assert shard.name in said
    assert "truncated or damaged" in said
    shard.write_bytes(data)

    name = next(n for n, f in values["weight_map"].items() if f == shard.name)
    values["weight_map"][name] = f"{stem}-00001-of-00003.{suffix}"
    index.write_text(json.dumps(values))
    assert f"the index and its shards disagree about: {name}" in refusal(source, tmp_path)
    values["weight_map"] |= {name: shard.name, "transformer.h.9.ln_1.weight": shard.name}
    index.write_text(json.dumps(values))
    said = "the index and its shards disagree about: transformer.h.9.ln_1.weight"
    assert said in refusal(source, tmp_path)
    values["weight_map"][name] = "../outside.bin"
    index.write_text(json.dumps(values))
    assert "names a file outside the folder: '../outside.bin'" in refusal(source, tmp_path)
    index.write_text(json.dumps({"weight_map": [1]}))
    assert "there is no weight_map" in refusal(source, tmp_path)
    index.write_text("{")
    assert f"{index.name}: damaged JSON" in refusal(source, tmp_path)
    index.write_text(kept)

    first = source / f"{stem}-00001-of-00003.{suffix}"
    tensors = tiny.weights(reference, Form())
    tiny.write_file(first, {n: tensors[n] for n, f in json.loads(kept)["weight_map"].items()
                            if f == first.name or n == name})  # fmt: skip
    assert f"{name} is in {first.name} and again in {shard.name}" in refusal(source, tmp_path)


def test_no_weights_and_no_config(tmp_path, copy):
    (copy / "model.safetensors").unlink()
    assert "no model.safetensors, no pytorch_model.bin and no index" in refusal(copy, tmp_path)
    (copy / "config.json").unlink()
    with pytest.raises(UsageError, match="no installed family recognises this"):
        tiny.converted(copy, tmp_path / "out")


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(PorttoolError, match="gone"):
        tiny.converted(tmp_path / "gone", tmp_path / "out")


def test_safetensors_go_before_bin(tmp_path, copy):
    torch.save({"wrong": torch.ones(1)}, copy / "pytorch_model.bin")
    assert tiny.converted(copy, tmp_path / "out").manifest.family == "gpt2"


def test_a_source_that_changes_under_our_hands(tmp_path, copy, monkeypatch):
    from porttool import converter

    def meddle(*source):
        os.utime(copy / "config.json", (1, 1))
        return {}

    monkeypatch.setattr(converter, "read_tokenizer", meddle)
    said = f"{copy / 'config.json'}: changed while it was read; convert it again, with nothing"
    assert said in refusal(copy, tmp_path)


def test_the_tokenizer_travels_along(tmp_path, tokenizer_folder):
    copy = tiny.write_source(tmp_path / "wide", tiny.gpt2(vocab_size=320))
    shutil.copy(tokenizer_folder / "tokenizer.json", copy)
    found = tiny.converted(copy, tmp_path / "out")
    assert (found.tokenizer / "tokenizer.json").read_bytes() == (
        tokenizer_folder / "tokenizer.json"
    ).read_bytes()
    assert "tokenizer/tokenizer.json" in found.manifest.files


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(tmp_path, tokenizer_folder):
    """With a single one, too; as many as rows travel along."""
    copy = tiny.write_source(tmp_path / "narrow", tiny.gpt2(vocab_size=319))
    shutil.copy(tokenizer_folder / "tokenizer.json", copy)
    assert "tokenizer.json: the tokenizer has the id 319" in refusal(copy, tmp_path)


def test_shard_size_and_workers_do_not_change_the_tensors(tmp_path, copy, checkpoint):
    found = tiny.converted(copy, tmp_path / "out", workers=4, max_shard_bytes=9000)
    assert len(found.weight_files()) > 5
    for name in checkpoint.names():
        expected = checkpoint.file_of(name).load(name)
        assert found.file_of(name).load(name).equal(expected)


KILLED = """
import sys, time
from pathlib import Path
import tiny
from porttool.progress import Progress

class Slow(Progress):
    def advance(self, n_bytes):
        print(n_bytes, flush=True)
        time.sleep(0.02)

tiny.converted(Path(sys.argv[1]), Path(sys.argv[2]), max_shard_bytes=9000, progress=Slow())
"""


def test_a_killed_conversion_goes_on(tmp_path, copy, checkpoint):
    """kill -9 in the middle; the same work again keeps the shards that were complete."""
    output, partial = tmp_path / "out", tmp_path / ".out.partial"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(copy), str(output)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(tiny.__file__).parent)},
    )  # fmt: skip
    until = time.monotonic() + 60
    while len(list(partial.glob("*.safetensors"))) < 5 and time.monotonic() < until:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not output.exists()
    with pytest.raises(PorttoolError, match="an interrupted run left it half done"):
        Checkpoint.open(output)
    journal = (partial / "journal.jsonl").read_text().splitlines()
    names = [json.loads(line)["name"] for line in journal[1:]]
    times = {n: (partial / n).stat().st_mtime_ns for n in names}
    assert 1 <= len(times) < 14
    found = tiny.converted(copy, output, max_shard_bytes=9000)
    assert {n: (output / n).stat().st_mtime_ns for n in times} == times
    assert not partial.exists()
    Checkpoint.open(output)
    for name in checkpoint.names():
        assert found.file_of(name).load(name).equal(checkpoint.file_of(name).load(name))


class Interrupted(Progress):
    """Ctrl-C after twenty tensors."""

    calls = 0

    def advance(self, n_bytes):
        self.calls += 1
        if self.calls > 20:
            raise KeyboardInterrupt


def test_other_settings_do_not_take_over_what_was_left(tmp_path, copy):
    with pytest.raises(KeyboardInterrupt):
        tiny.converted(copy, tmp_path / "out", max_shard_bytes=9000, progress=Interrupted())
    kept = sorted((tmp_path / ".out.partial").glob("*.safetensors"))
    before = {p.name: p.stat().st_mtime_ns for p in kept}
    found = tiny.converted(copy, tmp_path / "out", max_shard_bytes=9000, dtype="float16")
    after = {p.name: p.stat().st_mtime_ns for p in found.path.glob("*.safetensors")}
    assert before
    assert not before.items() & after.items()
    Checkpoint.open(tmp_path / "out")


def test_another_division_into_files_takes_nothing_over(tmp_path, copy, monkeypatch):
    """As another version's is: a file left behind would hold tensors twice."""
    with pytest.raises(KeyboardInterrupt):
        tiny.converted(copy, tmp_path / "out", max_shard_bytes=9000, progress=Interrupted())
    assert list((tmp_path / ".out.partial").glob("*.safetensors"))
    monkeypatch.setattr(shards, "SMALL_SHARD_BYTES", 1 << 12)
    found = tiny.converted(copy, tmp_path / "out", max_shard_bytes=9000)
    files = {name for name in found.manifest.files if name.endswith(".safetensors")}
    assert files == set(found.weight_files())


def test_an_output_that_is_there_already(tmp_path, copy, checkpoint):
    found = tiny.converted(copy, tmp_path / "out")
    said = rf"already \(a finished checkpoint of gpt2 in float32, from {copy}\).*add --force to"
    with pytest.raises(UsageError, match=said):
        tiny.converted(copy, tmp_path / "out")
    again = tiny.converted(copy, tmp_path / "out", dtype="float16", replace=True)
    assert (found.manifest.dtype, again.manifest.dtype) == ("float32", "float16")


def test_no_room_is_told_before_anything_is_written(tmp_path, copy, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 1000))
    with pytest.raises(PorttoolError, match=r"1\.00 kB are free; free some space, or choose ano"):
        tiny.converted(copy, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
