"""One test for each kind of thing that fuzzing found and that no other test is about."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch

import tiny
from porttool import api
from porttool.checkpoint import Checkpoint
from porttool.config import Limits, ModelConfig
from porttool.errors import CheckpointError, EngineError, PorttoolError, SourceError
from porttool.huggingface import check_special_ids
from porttool.nn import KVCache
from porttool.reading import flatten
from porttool.sources.json_file import parse_json
from porttool.sources.npy_file import read_npy
from porttool.sources.torch_file import is_zip, open_torch_file
from porttool.token_files import read_tokens
from porttool.weights import listing


def rezipped(path, **records):
    """A torch file with some records replaced."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in entries.items():
            new.writestr(name, records.get(name.rpartition("/")[2], data))


@pytest.mark.parametrize("size", [4, 396, 404])
@pytest.mark.parametrize("nested", [False, True])
def test_a_record_of_another_size_than_its_tensor(tmp_path, size, nested):
    """Mapped, torch would read on into the next record and take it for weights."""
    path = tmp_path / "a.bin"
    tensors = {"a": torch.ones(100), "b": torch.zeros(100)}
    torch.save({"model": [tensors]} if nested else tensors, path)
    rezipped(path, **{"0": bytes(size)})
    with pytest.raises(SourceError, match=rf"a\.bin: a tensor .* 400 .* 'data/0' has {size};"):
        open_torch_file(path)


def test_dictionaries_that_hold_themselves():
    tree: dict[str, object] = {"a": 1}
    tree["b"] = tree
    with pytest.raises(SourceError, match="nested more than 30 deep"):
        list(flatten(tree))


def test_a_zip_that_spans_disks(tmp_path):
    """zipfile.is_zipfile raises on one, instead of saying no."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("a", b"1")
    end = data.getvalue()[-22:]
    locator = b"PK\x06\x07" + struct.pack("<LQL", 0, 0, 7)
    (tmp_path / "a.bin").write_bytes(data.getvalue()[:-22] + locator + end)
    with pytest.raises(SourceError, match=r"a\.bin: the archive is truncated or damaged: zipfiles"):
        is_zip(tmp_path / "a.bin", str(tmp_path / "a.bin"))


@pytest.mark.parametrize(
    "array",
    [np.arange(12, dtype=kind).reshape(3, 4) for kind in ("<i4", ">i8", "u1", "<f2", ">f8")]
    + [np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.float32(3), np.zeros((0, 4))],
)
def test_arrays_are_read_as_numpy_reads_them(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    found = read_npy(tmp_path / "a.npy")
    assert found.dtype == np.asarray(array).dtype.newbyteorder("=")
    assert found.shape == np.asarray(array).shape
    assert np.array_equal(found, array)


HEADERS = {
    "records": "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,)}",
    "texts": "{'descr': '<U4', 'fortran_order': False, 'shape': (2,)}",
    "no size": "{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}",
    "negative": "{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}",
    "no order": "{'descr': '<f4', 'fortran_order': 1, 'shape': (2,)}",
    "another field": "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'x': 1}",
    "open bracket": "{'descr': '<f4', 'fortran_order': False, 'shape': (2,",
    "depth": "(" * 5000,
    "a call": "open('x', 'w')",
    "too small": "{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}",
    "too large": "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}",
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_arrays_that_lie(tmp_path, name):
    text = HEADERS[name].encode() + b"\n"
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text))
    (tmp_path / "a.npy").write_bytes(head + text + bytes(8))
    with warnings.catch_warnings(action="error"), pytest.raises(SourceError, match=r"a\.npy: not"):
        read_npy(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"1,x\n", "line 1"), (b"1,2,,\n3,,4\n", "line 2"), (b"1\n\xff\n", "codec"),
     (b"1," + b"9" * 5000, "line 1"),
     (b"1," + b"2" * 200_000, "field larger than field limit")],
)  # fmt: skip
def test_token_files_that_are_none(tmp_path, content, said):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(PorttoolError, match=said) as caught:
        read_tokens(tmp_path / "a.csv")
    assert len(str(caught.value)) < 500


def test_numbers_without_end():
    assert parse_json("1" + "0" * 99) == 10**99
    with pytest.raises(ValueError, match="a number of 101 digits"):
        parse_json("1" + "0" * 100)


@pytest.mark.parametrize("eos", [[None], [1, "2"], [[1]], True, 1.0, {"a": 1}, -1, 67])
def test_special_ids_that_are_none(tmp_path, eos):
    with pytest.raises(SourceError, match="is outside the vocabulary of 67; correct eos_token_id"):
        check_special_ids({"bos": None, "eos": eos, "pad": None}, 67, tmp_path)
    with pytest.raises(
        SourceError, match=r"the vocabulary of 67; correct pad_token_id in gen.*null"
    ):
        check_special_ids({"bos": 1, "eos": 2, "pad": 67}, 67, tmp_path)


def test_names_without_end():
    assert listing(["x" * 1000, "y"]) == "x" * 200 + ", y"


def test_a_name_too_long_for_the_system(tmp_path, source, registry):
    folder = tiny.write_source(tmp_path / "source", tiny.gpt2(n_layer=1), tiny.Form(shards=2))
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"] = dict.fromkeys(values["weight_map"], "x" * 5000)
    index.write_text(json.dumps(values))
    with pytest.raises(SourceError, match=r"source: File name too long: ") as caught:
        api.convert(folder, tmp_path / "out", registry=registry)
    assert len(str(caught.value)) < 1000


def test_a_manifest_that_names_one(tmp_path, checkpoint):
    import shutil

    folder = shutil.copytree(checkpoint.path, tmp_path / "checkpoint")
    files = json.loads((folder / "checkpoint.json").read_text())["files"]
    tiny.edit_manifest(folder / "checkpoint.json", files={"x" * 5000: files["model.safetensors"]})
    with pytest.raises(CheckpointError, match="File name too long"):
        Checkpoint.open(folder)


def test_an_engine_of_another_config(tmp_path, checkpoint, registry):
    engine = tiny.built(checkpoint, tmp_path / "engine")
    file = engine.path / "engine.json"
    config = {**json.loads(file.read_text())["config"], "d_ff": 48}
    tiny.edit_manifest(file, config=config)
    with pytest.raises(EngineError, match=r"engine: the config and the weights disagree about lay"):
        tiny.loaded(engine.path, registry)


def test_caches_that_no_machine_holds():
    config = ModelConfig(
        vocab_size=8, n_positions=8, n_layer=1000, n_head=1, n_kv_head=1, head_dim=1 << 20,
        d_model=8, d_ff=8, activation="gelu", attention_scale=1.0,
    )  # fmt: skip
    for n_slots in (1 << 10, 1 << 24):
        with pytest.raises(EngineError, match="there is no memory for the caches of"):
            KVCache(config, n_slots, 1 << 24)


def test_caches_cost_nothing_before_they_are_used():
    from fuzzing.judge import fresh_peak, peak_memory

    config = ModelConfig(
        vocab_size=8, n_positions=8, n_layer=4, n_head=4, n_kv_head=4, head_dim=64,
        d_model=256, d_ff=8, activation="gelu", attention_scale=1.0,
    )  # fmt: skip
    before = fresh_peak()
    cache = KVCache(config, 8, 8192)
    assert cache.keys.nbytes + cache.values.nbytes > 500_000_000
    assert not cache.keys[3, 7, :, -1].any()
    assert peak_memory() - before < 50_000_000


@pytest.mark.parametrize("field", ["max_batch_size", "max_input_len", "max_output_len"])
def test_limits_that_are_none(field):
    with pytest.raises(ValueError, match="less than or equal to 16777216"):
        Limits(**{"max_input_len": 1, "max_output_len": 1, field: 10**9})
