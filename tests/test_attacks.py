"""Hostile sources through the front door: refused with a reason, and nothing of them is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import time
import tracemalloc
import zipfile
from contextlib import suppress
from warnings import catch_warnings

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import nemo_writer as nemo
import tiny
from attacks import CARRIERS, gadgets, torch_zip, tree, write_archive, write_hugging_face
from fuzzing.judge import Watch
from porttool import api
from porttool.errors import PorttoolError
from porttool.token_files import read_tokens

WATCH = Watch()
SECONDS = 10
BYTES = 50_000_000


def refusal(source, folder, registry, *, prompts=False, **options):
    """The message with which a source is refused: quickly, in little memory, nothing else done."""
    out = folder / "output" / "made"
    out.parent.mkdir(exist_ok=True)
    start = time.perf_counter()
    tracemalloc.start()
    try:
        with WATCH.on(out.parent), pytest.raises(PorttoolError) as caught:
            if prompts:
                api.convert_prompts(source, out, registry=registry, **options)
            else:
                api.convert(source, out, registry=registry, **options)
        assert tracemalloc.get_traced_memory()[1] < BYTES
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < SECONDS
    assert WATCH.seen == []
    assert not out.exists()
    assert len(str(caught.value)) < 5000
    return str(caught.value)


# ---- pickles with code ------------------------------------------------------------------------

GADGETS = list(gadgets("marker"))


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("gadget", GADGETS)
def test_pickles_with_code(tmp_path, registry, carrier, gadget):
    marker = tmp_path / "it_ran"
    source = CARRIERS[carrier](tmp_path / "source", tree(gadgets(marker)[gadget]))
    prompts = "prompts" in carrier or carrier == "adapter"
    model = "prompt_tuning" if prompts else None
    said = refusal(source, tmp_path, registry, prompts=prompts, model=model)
    assert not marker.exists()
    assert str(source) in said
    assert "wants more than tensors" in said or "damaged" in said or "not a tensor" in said


@pytest.mark.parametrize("gadget", GADGETS)
def test_the_traps_are_live(tmp_path, gadget):
    """Python's own reader springs them; two only reach for code, and that is seen."""
    marker = tmp_path / "it_ran"
    with WATCH.on(tmp_path), suppress(Exception), catch_warnings(action="ignore"):
        pickle.loads(tree(gadgets(marker)[gadget]))
    assert any("pickle.find_class" in seen for seen in WATCH.seen)
    assert marker.exists() == (gadget not in ("by attribute", "new object"))


# ---- archives ---------------------------------------------------------------------------------


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


MEMBERS = {
    "symbolic link": (member("x", tarfile.SYMTYPE, "/etc/passwd"), "a link"),
    "hard link": (member("model_weights.ckpt", tarfile.LNKTYPE, "/etc/passwd"), "a link"),
    "block device": (member("x", tarfile.BLKTYPE), "a device"),
    "character device": (member("x", tarfile.CHRTYPE), "a device"),
    "pipe": (member("x", tarfile.FIFOTYPE), "a device"),
    "parent": (member("../../evil"), "leads outside"),
    "absolute": (member("/tmp/evil"), "leads outside"),
    "backslashes": (member("..\\evil"), "leads outside"),
    "twice": (member("model_config.yaml"), "twice"),
    "twice by another spelling": (member("./x/.././model_config.yaml"), "leads outside"),
    "sparse": (member("x", tarfile.GNUTYPE_SPARSE), "sparse"),
    "of a kind of its own": (member("x", b"Z"), "a device"),
}  # fmt: skip


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("form", ["tar", "gz"])
@pytest.mark.parametrize("prompts", [False, True])
def test_hostile_members(tmp_path, registry, name, form, prompts):
    info, said = MEMBERS[name]
    config = {"virtual_prompt_style": "p-tuning", "task_templates": []} if prompts else {}
    weights = torch_zip(tree(b"N"))
    source = write_archive(tmp_path / "source", weights, form, **config)
    with tarfile.open(source, "r:gz" if form == "gz" else "r:") as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar]
    with tarfile.open(source, "w:gz" if form == "gz" else "w:") as tar:
        for each, data in members:
            tar.addfile(each, io.BytesIO(data))
        tar.addfile(info)
    model = "prompt_tuning" if prompts else "gpt_next"
    assert said in refusal(source, tmp_path, registry, prompts=prompts, model=model)


def test_an_archive_that_unpacks_without_end(tmp_path, registry, monkeypatch):
    monkeypatch.setattr("porttool.sources.archive.SMALL", 1 << 20)
    source = tmp_path / "a.nemo"
    zeros = member("zeros")
    zeros.size = 100_000_000
    config = yaml.safe_dump(nemo.GPT_2B).encode()
    with tarfile.open(source, "w:gz") as tar:
        info = member("model_config.yaml")
        info.size = len(config)
        tar.addfile(info, io.BytesIO(config))
        tar.addfile(zeros, io.BytesIO(bytes(zeros.size)))
    assert "it is a trap" in refusal(source, tmp_path, registry)


def good_zip():
    saved = io.BytesIO()
    torch.save({f"h.{i}": torch.ones(3) * i for i in range(3)}, saved)
    return saved.getvalue()


def central(data, at, field, width, change):
    """A zip whose table of contents says something else of its entry number `at`."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        begin = archive.start_dir
    for _ in range(at):
        name, extra, comment = struct.unpack_from("<HHH", data, begin + 28)
        begin += 46 + name + extra + comment
    old = int.from_bytes(data[begin + field : begin + field + width], "little")
    new = (change(old) % (1 << 8 * width)).to_bytes(width, "little")
    return data[: begin + field] + new + data[begin + field + width :]


def rewritten(data, method=zipfile.ZIP_STORED, twice=False):
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        if twice:
            with pytest.warns(UserWarning, match="Duplicate name"):
                new.writestr(old.namelist()[0], b"x")
    return out.getvalue()


ZIPS = {
    "compressed": (lambda d: rewritten(d, zipfile.ZIP_DEFLATED), "is compressed"),
    "a bomb": (lambda d: rewritten(d, zipfile.ZIP_LZMA), "is compressed"),
    "an entry twice": (lambda d: rewritten(d, twice=True), "twice"),
    "overlapping": (lambda d: central(d, 3, 42, 4, lambda _: 0), "overlaps|no header"),
    "inside another": (lambda d: central(d, 3, 42, 4, lambda o: o - 40), "no header"),
    "beyond the end": (lambda d: central(central(d, 2, 24, 4, lambda _: 1 << 31), 2, 20, 4,
                                         lambda _: 1 << 31), "overlaps|beyond"),
    "sizes that differ": (lambda d: central(d, 2, 24, 4, lambda s: s + 4), "compressed"),
    "terabytes": (lambda d: central(central(d, 2, 24, 4, lambda _: 0xFFFFFFFE), 2, 20, 4,
                                    lambda _: 0xFFFFFFFE), "overlaps|beyond"),
}  # fmt: skip


@pytest.mark.parametrize("name", ZIPS)
@pytest.mark.parametrize("nested", [False, True])
def test_hostile_zips(tmp_path, registry, name, nested):
    change, said = ZIPS[name]
    write = write_archive if nested else write_hugging_face
    source = write(tmp_path / "source", change(good_zip()))
    message = refusal(source, tmp_path, registry, model="gpt_next" if nested else "gpt2")
    assert any(word in message for word in said.split("|"))


# ---- arrays, YAML, configs, headers -----------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("prompts", [True, False])
def test_arrays_of_objects(tmp_path, registry, prompts):
    file = tmp_path / "a.npy"
    for array in (np.array([Evil(), None], dtype=object),
                  np.array([(1, Evil())], dtype=[("a", "i4"), ("b", "O")])):  # fmt: skip
        np.save(file, array, allow_pickle=True)
        if prompts:
            assert "never read" in refusal(file, tmp_path, registry, prompts=True)
            continue
        with WATCH.on(tmp_path / "nowhere"), pytest.raises(PorttoolError, match="never read"):
            read_tokens(file)
        assert WATCH.seen == []


BOMB = "\n".join(
    ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
)
MERGES = "\n".join(
    ["m0: &m0 {a: 1}"]
    + [f"m{i}: &m{i} {{<<: [{','.join([f'*m{i - 1}'] * 10)}]}}" for i in range(1, 9)]
)
YAMLS = {
    "object": ("x: !!python/object/apply:os.system ['true']", "constructor for the tag"),
    "new object": ("x: !!python/object/new:os.system ['true']", "constructor for the tag"),
    "module": ("x: !!python/module:os", "constructor for the tag"),
    "name": ("x: !!python/name:os.system", "constructor for the tag"),
    "tuple": ("x: !!python/tuple [1]", "constructor for the tag"),
    "laughs": (f"{BOMB}\nnum_layers: *a9", "more than 50000 values"),
    "laughs where any value goes": (f"{BOMB}\noptim: *a9", "more than 50000 values"),
    "merges": (MERGES, "more than 50000 values"),
    "recursion": ("num_layers: &r [*r]", "more than 50000 values"),
    "depth": ("x: " + "[" * 5000, "nested more than 50 deep"),
    "depth of mappings": ("x: " + "{a: " * 5000, "nested more than 50 deep"),
    "depth of lines": ("x:\n" + "\n".join(" " * i + "a:" for i in range(1, 200)), "50 deep"),
    "digits": ("hidden_size: 0x" + "f" * 5000, "a number of 5002 digits"),
    "sixties": ("hidden_size: " + ":".join(["59"] * 3000), "a number of 8999 digits"),
    "no such day": ("seed: 2001-99-99", "damaged"),
    "size": ("x: '" + "y" * 300_000 + "'", "no model_config.yaml here, or one far too large"),
}


@pytest.mark.parametrize("name", YAMLS)
def test_hostile_yaml(tmp_path, registry, name):
    added, said = YAMLS[name]
    key = added.rpartition("\n")[2].partition(":")[0]
    values = {k: v for k, v in nemo.GPT_2B.items() if k != key}
    data = f"{yaml.safe_dump(values)}\n{added}\n".encode()
    source = nemo.pack(tmp_path / "a.nemo", {"model_config.yaml": data}, "tar")
    assert said in refusal(source, tmp_path, registry, model="gpt_next")


HUGE = (10**9, -1, 0, 1 << 63, 10**30, 10**400, 1e308, float("nan"), True, "3", [3], None)


@pytest.mark.parametrize("value", HUGE, ids=lambda v: f"{v!r:.12}")
@pytest.mark.parametrize("key", ["n_layer", "n_embd", "n_head", "vocab_size", "n_positions"])
def test_absurd_dimensions(tmp_path, registry, key, value):
    source = tiny.write_source(tmp_path / "source", small())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, key: value}))
    assert str(source) in refusal(source, tmp_path, registry)


def small():
    return tiny.gpt2(n_layer=1, n_embd=6, n_head=1)


@pytest.mark.parametrize("value", HUGE, ids=lambda v: f"{v!r:.12}")
@pytest.mark.parametrize("key", ["num_layers", "hidden_size", "kv_channels", "ffn_hidden_size"])
def test_absurd_dimensions_in_yaml(tmp_path, registry, key, value):
    if value is None and key != "num_layers":
        pytest.skip("null is the default")
    state = nemo.saved(nemo.rank_state(nemo.GPT_2B, nemo.draw(nemo.GPT_2B), "legacy", 0, 0))
    source = write_archive(tmp_path / "source", state, **{key: value})
    assert "model.nemo" in refusal(source, tmp_path, registry, model="gpt_next")


def test_dimensions_that_fit_one_by_one(tmp_path, registry):
    """Heads and their width are each possible, their product is not."""
    config = {"num_attention_heads": 1 << 24, "kv_channels": 1 << 24}
    state = nemo.saved(nemo.rank_state(nemo.GPT_2B, nemo.draw(nemo.GPT_2B), "legacy", 0, 0))
    source = write_archive(tmp_path / "source", state, **config)
    assert "no dimension" in refusal(source, tmp_path, registry, model="gpt_next")


def test_a_header_that_claims_terabytes(tmp_path, registry):
    source = tiny.write_source(tmp_path / "source", small())
    file = source / "model.safetensors"
    entry = {"dtype": "F32", "shape": [1 << 20, 1 << 18], "data_offsets": [0, 1 << 40]}
    header = json.dumps({"transformer.wte.weight": entry}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    assert "the file has" in refusal(source, tmp_path, registry)
    file.write_bytes(struct.pack("<Q", 1 << 40) + header + bytes(64))
    assert "its header length lies" in refusal(source, tmp_path, registry)


def test_a_file_of_terabytes_that_are_not_there(tmp_path, registry):
    """A sparse file holds what its header says: the shape tells, before any of it is read."""
    source = tiny.write_source(tmp_path / "source", small())
    file = source / "model.safetensors"
    tensors = tiny.weights(small(), tiny.Form())
    wide = tensors.pop("transformer.wte.weight")
    save_file(tensors, file)
    length = struct.unpack("<Q", file.read_bytes()[:8])[0]
    whole = file.read_bytes()
    header = json.loads(whole[8 : 8 + length])
    end = len(whole) - 8 - length
    rows = 1 << 36
    header["transformer.wte.weight"] = {
        "dtype": "F32", "shape": [rows, wide.shape[1]],
        "data_offsets": [end, end + rows * wide.shape[1] * 4],
    }  # fmt: skip
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text + whole[8 + length :])
        out.truncate(8 + len(text) + end + rows * wide.shape[1] * 4)
    assert file.stat().st_size > 1 << 40
    assert "comes out as [68719476736, 6]" in refusal(source, tmp_path, registry)


@pytest.mark.parametrize("shape", ["(1099511627776, 1024)", "(4611686018427387904, 4)", "(1,)*99"])
def test_an_array_that_claims_terabytes(tmp_path, registry, shape):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(64)
    (tmp_path / "a.npy").write_bytes(data)
    said = refusal(tmp_path / "a.npy", tmp_path, registry, prompts=True)
    assert "not an array of numbers" in said


# ---- code beside the weights ------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, "gpt2"])
@pytest.mark.parametrize(
    "auto_map",
    [{"AutoModelForCausalLM": "evil.Model"}, {"AutoConfig": "someone/evil--evil.Config"},
     "evil.Model", ["evil.Model"], {"AutoModelForCausalLM": ["evil.Model", None]}],
)  # fmt: skip
def test_code_of_a_repository_is_not_run(tmp_path, registry, auto_map, model):
    source = tiny.edit_config(tiny.write_source(tmp_path / "source", small()), auto_map=auto_map)
    marker = tmp_path / "it_ran"
    code = f"open({str(marker)!r}, 'w')\nclass Model: pass\nclass Config: pass\n"
    for name in ("evil.py", "__init__.py", "configuration_gpt2.py", "modeling_gpt2.py"):
        (source / name).write_text(code)
    said = refusal(source, tmp_path, registry, model=model)
    assert "runs code of its own" in said
    assert "evil." in said
    assert not marker.exists()
