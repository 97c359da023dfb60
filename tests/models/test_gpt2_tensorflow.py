"""OpenAI's TensorFlow checkpoints: synthetic ones, and against TensorFlow itself where it is."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest

import tiny
from openai_writer import variables, write_source
from porttool.cli import invoke as run_cli
from porttool.errors import PorttoolError, SourceError, UsageError
from porttool.plugins import choose_converter
from porttool.sources.crc32c import crc32c
from porttool.sources.tf_bundle import TensorBundle
from tf_bundle_writer import write_bundle


@pytest.fixture(scope="module")
def openai(tmp_path_factory, reference):
    return write_source(tmp_path_factory.mktemp("tf") / "117M", reference)


@pytest.fixture
def damaged(tmp_path, openai):
    return shutil.copytree(openai, tmp_path / "117M")


def refused(source, tmp_path, message):
    with pytest.raises(PorttoolError, match=message):
        tiny.converted(source, tmp_path / "out", "gpt2/tensorflow")
    assert not (tmp_path / "out").exists()


def bundle_names(folder):
    return sorted(TensorBundle(folder / "model.ckpt").infos())


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43),
     (bytes(range(32)), 0x46DD794E), (bytes(range(31, -1, -1)), 0x113FDB5C)],
)  # fmt: skip
def test_crc32c_of_rfc_3720(data, expected):
    assert crc32c(data) == expected


@pytest.mark.parametrize("size", [1, 3, 4, 7, 255, 4099, 300_001])
def test_crc32c_of_every_length(size):
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    assert crc32c(data) == register ^ 0xFFFFFFFF


def test_logits_equal_transformers(tmp_path, reference, openai, registry):
    assert choose_converter(registry, openai).name == "gpt2/tensorflow"
    with pytest.raises(UsageError, match=r"looks like gpt2/tensorflow$"):
        choose_converter(registry, openai, "gpt2/megatron")
    checkpoint = tiny.converted(openai, tmp_path / "checkpoint")
    assert checkpoint.manifest.tokens.eos == (66,)
    assert sorted(f.name for f in checkpoint.tokenizer.iterdir()) == ["merges.txt", "vocab.json"]
    tiny.assert_same(tiny.in_float64(checkpoint, tmp_path), reference)


def test_what_training_left_is_passed_over(tmp_path, reference, openai):
    extra = {"global_step": np.array(7), "model/wte/Adam_1": np.ones((67, 24), np.float32),
             "beta1_power": np.array(0.9, np.float32)}  # fmt: skip
    source = write_source(tmp_path / "tuned", reference, extra)
    (source / "checkpoint").unlink()
    plain = tiny.converted(openai, tmp_path / "a").manifest
    tuned = tiny.converted(source / "model.ckpt.index", tmp_path / "b").manifest
    assert tuned.files == plain.files


def test_the_prefix_of_the_files_names_them(tmp_path, monkeypatch, openai):
    """As TensorFlow has it, although no file is called that, and a hub id looks alike."""
    monkeypatch.chdir(openai.parent)
    asked = ["convert", f"{openai.name}/model.ckpt", "--output", str(tmp_path / "checkpoint")]
    assert run_cli(asked) == 0
    made = tiny.Checkpoint.open(tmp_path / "checkpoint").manifest
    assert made.source.path == str(openai / "model.ckpt.index")
    assert made.files == tiny.converted(openai, tmp_path / "folder").manifest.files


def test_a_variable_too_many_or_too_few_is_refused(tmp_path, reference):
    extra = write_source(tmp_path / "extra", reference, {"model/h0/attn/rel/w": np.ones(3)})
    refused(extra, tmp_path, "nothing accounts for.*h.0.attn.rel.weight")
    found = variables(reference)
    del found["model/h2/mlp/c_fc/b"]
    write_bundle(extra / "model.ckpt", found)
    refused(extra, tmp_path, r"missing from the source: h\.2\.mlp\.c_fc\.bias")


@pytest.mark.parametrize(
    ("file", "message"),
    [("hparams.json", "hparams.json: the file is missing"), ("encoder.json", "encoder.json"),
     ("vocab.bpe", "vocab.bpe"), ("model.ckpt.index", "names no checkpoint that is in this"),
     ("model.ckpt.data-00000-of-00001", "data-00000-of-00001: the file is missing")],
)  # fmt: skip
def test_a_missing_file_is_named(tmp_path, damaged, registry, file, message):
    (damaged / file).unlink()
    refused(damaged, tmp_path, message)
    assert choose_converter(registry, damaged).name == "gpt2/tensorflow"  # nobody says which


def test_another_page_in_the_place_of_hparams(tmp_path, damaged):
    (damaged / "hparams.json").write_text("<html>404</html>")
    refused(damaged, tmp_path, r"hparams\.json: damaged JSON")


def test_a_folder_of_hugging_face_may_hold_hparams(tmp_path, damaged, source, registry):
    """As one that was made of OpenAI's files may."""
    folder = shutil.copytree(source, tmp_path / "theirs")
    shutil.copy(damaged / "hparams.json", folder)
    assert choose_converter(registry, folder).name == "gpt2"
    shutil.copytree(damaged, folder, dirs_exist_ok=True)
    (folder / "hparams.json").unlink()
    assert choose_converter(registry, folder).name == "gpt2"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"n_head": 5}, "not a multiple"), ({"n_layer": 4}, r"missing.*h\.3"),
     ({"n_layer": 2}, r"nothing accounts for.*h\.2"), ({"n_vocab": 70}, "config and the weights"),
     ({"n_ctx": -1}, "positive integer"), ({"window": 9}, "unknown keys.*window")],
)  # fmt: skip
def test_a_wrong_hparams_is_refused(tmp_path, damaged, change, message):
    file = damaged / "hparams.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    refused(damaged, tmp_path, message)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, damaged):
    vocabulary = {f"t{i}": i for i in range(70)} | {"<|endoftext|>": 66}
    (damaged / "encoder.json").write_text(json.dumps(vocabulary))
    refused(damaged, tmp_path, r"vocab\.json: the tokenizer has the id 69.*only 67 rows")
    (damaged / "encoder.json").write_text('{"a": [1]}')
    refused(damaged, tmp_path, r"vocab\.json: the tokenizer's file is damaged")


def test_every_damaged_byte_is_noticed(tmp_path, damaged):
    data = damaged / "model.ckpt.data-00000-of-00001"
    whole = data.read_bytes()
    for at in (0, len(whole) // 2, len(whole) - 1):
        data.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused(damaged, tmp_path, "the checksum of model/.* is wrong")
    data.write_bytes(whole[:-4])
    refused(damaged, tmp_path, "it is truncated")


def test_a_damaged_index_is_an_error_at_every_byte(damaged):
    index = damaged / "model.ckpt.index"
    whole = index.read_bytes()
    for at in [*range(0, len(whole), 7), *range(len(whole) - 48, len(whole))]:
        index.write_bytes(whole[:at] + bytes([whole[at] ^ 0x11]) + whole[at + 1 :])
        with pytest.raises(SourceError, match=r"model\.ckpt"):
            bundle_names(damaged)
    for size in (0, 40, len(whole) // 2, len(whole) - 1):
        index.write_bytes(whole[:size])
        with pytest.raises(SourceError, match="index"):
            bundle_names(damaged)


def test_two_checkpoints_without_a_note_are_ambiguous(damaged, registry):
    (damaged / "checkpoint").unlink()
    shutil.copy(damaged / "model.ckpt.index", damaged / "model-9.index")
    with pytest.raises(SourceError, match=r"2 TensorFlow checkpoints .* give the path of one"):
        choose_converter(registry, damaged).open(damaged)


WRITE = """
import sys, numpy, tensorflow as tf
arrays = dict(numpy.load(sys.argv[1]))
tf.compat.v1.disable_eager_execution()
make = tf.compat.v1.get_variable
variables = [make(k.replace("|", "/"), initializer=v) for k, v in arrays.items()]
with tf.compat.v1.Session() as session:
    session.run(tf.compat.v1.global_variables_initializer())
    tf.compat.v1.train.Saver(variables).save(session, sys.argv[2], write_meta_graph=False)
"""
READ = """
import sys, numpy, tensorflow as tf
reader = tf.train.load_checkpoint(sys.argv[1])
names = reader.get_variable_to_shape_map()
numpy.savez(sys.argv[2], **{n.replace("/", "|"): reader.get_tensor(n) for n in names})
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("tensorflow"), reason="needs tensorflow-cpu")
def test_both_ways_against_tensorflow(tmp_path, reference, openai):
    """Slow for TensorFlow's import alone; in its own process, for its warnings and its memory."""
    arrays = variables(reference)
    np.savez(tmp_path / "arrays.npz", **{k.replace("/", "|"): v for k, v in arrays.items()})

    def tensorflow(script, *arguments):
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", script, *map(str, arguments)]
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)

    tensorflow(WRITE, tmp_path / "arrays.npz", tmp_path / "model.ckpt")
    bundle = TensorBundle(tmp_path / "model.ckpt")
    assert bundle.infos().keys() == arrays.keys()
    for name, array in arrays.items():
        assert bundle.load(name).numpy().tobytes() == array.tobytes()
    tensorflow(READ, openai / "model.ckpt", tmp_path / "read.npz")
    read = np.load(tmp_path / "read.npz")
    assert {n.replace("|", "/") for n in read.files} == arrays.keys()
    for name, array in arrays.items():
        assert read[name.replace("/", "|")].tobytes() == array.tobytes()


def test_slices_and_other_byte_orders_are_refused(tmp_path):
    from tf_bundle_writer import field, table

    for entries, message in (
        ([(b"", field(1, 1) + field(2, 1))], "big-endian"),
        ([(b"", field(1, 1)), (b"a", field(1, 1) + field(7, b"x"))], "slices"),
        ([(b"a", b"")], "damaged"),
    ):
        (tmp_path / "model.ckpt.index").write_bytes(table(entries, 5))
        with pytest.raises(SourceError, match=message):
            TensorBundle(tmp_path / "model.ckpt")
    (tmp_path / "model.ckpt.index").write_bytes(struct.pack("<Q", 1) * 9)
    with pytest.raises(SourceError, match="not the index of a TensorFlow checkpoint"):
        TensorBundle(tmp_path / "model.ckpt")


def test_two_variables_of_one_name(tmp_path, reference):
    """With and without the outer scope: one of them was taken, and the other left out."""
    source = write_source(tmp_path / "117M", reference, {"h0/ln_1/g": np.ones(32, np.float32)})
    refused(source, tmp_path, r"h0/ln_1/g and model/h0/ln_1/g are both h\.0\.ln_1\.weight")


def test_files_of_terabytes_are_not_read(tmp_path, damaged):
    with (damaged / "checkpoint").open("ab") as file:
        file.truncate(1 << 40)
    assert tiny.converted(damaged, tmp_path / "found").config.n_layer == 3
    with (damaged / "encoder.json").open("ab") as file:
        file.truncate(1 << 40)
    refused(damaged, tmp_path, "encoder.json: 1099511627776 bytes is no tokenizer's file")
