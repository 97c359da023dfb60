from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from porttool.errors import SourceError
from porttool.huggingface import SourceConfig, open_tensors, read_config
from porttool.sources.json_file import MAX_JSON, read_json
from porttool.sources.ranks import Renamed, ShardedTensors
from porttool.sources.torch_file import TensorTree

FILE = Path("model") / "config.json"


def tree(**tensors):
    return TensorTree(tensors, "part", mapped=False)


def test_every_key_must_be_read():
    config = SourceConfig({"n_layer": 2, "alpha": 1, "beta": 2, "use_cache": True}, FILE)
    assert config.integer("n_layer") == 2
    with pytest.raises(
        SourceError,
        match=r"config\.json: unknown keys .*: alpha, beta; if they do.*read_config `ignore` them",
    ):
        config.finish()
    config.ignore("alpha", "beta")
    config.finish()


def test_keys_that_must_have_one_value():
    SourceConfig({"quantization_config": None, "pruned_heads": {}}, FILE).finish()
    with pytest.raises(SourceError, match=r"port; convert the model that was quantised$"):
        SourceConfig({"quantization_config": {"bits": 4}}, FILE).finish()
    for key, value in [
        ("pruned_heads", {"0": [1]}), ("torchscript", True), ("normalize_attention_scores", False),
    ]:  # fmt: skip
        with pytest.raises(
            SourceError, match=rf"'{key}' is .*, which porttool cannot port; it needs"
        ):
            SourceConfig({key: value}, FILE).finish()


PUBLISHED = {
    "gpt2-medium": {"n_special": 0, "predict_special_tokens": True},
    "distilgpt2": {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
    "of 2019": {"n_special": 0, "num_labels": 2, "torchscript": False, "use_bfloat16": False,
                "pruned_heads": {}, "output_past": True, "finetuning_task": None},
    "of 2020": {"bad_words_ids": None, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
                "num_return_sequences": 1, "decoder_start_token_id": None, "sep_token_id": 5,
                "early_stopping": False, "unk_token_id": 1, "cls_token_id": 4},
    "of early 2020": {"eos_token_ids": 0, "xla_device": None, "torchscript": False},
    "of 2023": {"_flash_attn_2_enabled": True, "unsloth_version": "2024.8"},
    "GPT-SW3": {"apply_query_key_layer_scaling": True, "normalize_attention_scores": True},
    "KoGPT-2": {"author": "A", "created_date": "2021-04-28", "license": "CC-BY-NC-SA 4.0"},
    "of 2025": {"_attn_implementation_autoset": True, "typical_p": 1.0},
}  # fmt: skip
"""Keys of published files of type gpt2 that change nothing, beside those that every one has."""


@pytest.mark.parametrize("keys", PUBLISHED.values(), ids=PUBLISHED)
def test_keys_of_published_files(keys):
    SourceConfig(keys, FILE).finish()
    with pytest.raises(SourceError, match="'n_special' is 3, which porttool cannot port"):
        SourceConfig({**keys, "n_special": 3}, FILE).finish()


def test_null_is_absent():
    config = SourceConfig({"n_inner": None}, FILE)
    assert config.integer("n_inner", 12) == 12
    with pytest.raises(SourceError, match="the key 'n_inner' is missing"):
        config.integer("n_inner")


@pytest.mark.parametrize("value", [True, 1.5, "2", 0, -1, [2]])
def test_integers(value):
    with pytest.raises(SourceError, match="'n' should be a positive integer, not"):
        SourceConfig({"n": value}, FILE).integer("n")


@pytest.mark.parametrize("value", [True, "1e-5", [1], float("nan"), float("inf")])
def test_numbers(value):
    with pytest.raises(SourceError, match="'eps' should be a number, not"):
        SourceConfig({"eps": value}, FILE).number("eps", 1e-5)


def unprefixed(name):
    return name.removeprefix("t.")


def test_a_prefix_that_only_some_carry():
    source = Renamed.by(tree(**{"t.a": torch.ones(1), "b": torch.zeros(2)}), unprefixed)
    assert source.infos().keys() == {"a", "b"}
    assert source.load("a").equal(torch.ones(1))
    with pytest.raises(SourceError, match=r"part: t\.a and a are both a"):
        Renamed.by(tree(**{"t.a": torch.ones(1), "a": torch.ones(1)}), unprefixed)


def test_a_name_in_two_shards():
    with pytest.raises(SourceError, match="a is in part and again in two"):
        ShardedTensors({"one": tree(a=torch.ones(1)), "two": tree(a=torch.ones(1))})


FORMS = [
    tiny.Form(),
    tiny.Form(shards=2),
    tiny.Form(file="pytorch_model.bin"),
    tiny.Form(file="pytorch_model.bin", shards=2),
]
"""From what transformers loads first to what it loads last."""


@pytest.mark.parametrize("first", range(len(FORMS)))
def test_of_several_sets_of_weights_the_one_that_transformers_loads(tmp_path, first):
    """A model saved as one file beside older shards is not the shards'."""
    from transformers import GPT2LMHeadModel

    for seed, form in enumerate(FORMS[first:], first):
        model = tiny.gpt2(seed=seed)
        tiny.write_weights(tmp_path, tiny.weights(model, form), form)
    model.config.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).state_dict()["transformer.wte.weight"]
    assert theirs.equal(tiny.gpt2(seed=first).transformer.wte.weight.float())
    assert open_tensors(tmp_path).load("transformer.wte.weight").equal(theirs)


@pytest.mark.parametrize(
    "name",
    ["flax_model.msgpack", "tf_model.h5", "pytorch_model.fp16.bin", "gptq_model-4bit.safetensors",
     "model-00001-of-00002.safetensors", "ggml-model-q4_0.bin", "gpt2.Q4.gguf"],
)  # fmt: skip
def test_weights_that_nobody_reads_are_named(tmp_path, name):
    with pytest.raises(SourceError, match=r"and no index of them; fetch them, or"):
        open_tensors(tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(SourceError, match=rf"of {name} porttool reads none: .*save_pretrained"):
        open_tensors(tmp_path)


def test_json_that_is_none(tmp_path):
    file = tmp_path / "config.json"
    for content, said in [
        (b"", "damaged JSON"), (b"[1]", "should hold a JSON object"), (b"\xff{}", "damaged JSON"),
        (b'{"a":' * 5000, "damaged JSON"), (b'{"a": 1, "a": 2}', "twice"),
    ]:  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(SourceError, match=said):
            read_json(file)
    with file.open("wb") as handle:
        handle.truncate(MAX_JSON + 1)
    with pytest.raises(SourceError, match="64000001 bytes is no config"):
        read_json(file)
    file.unlink()
    with pytest.raises(SourceError, match=r"config\.json: the file is missing"):
        read_json(file)


def test_a_config_without_a_model_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"n_embd": 4}))
    assert read_config(tmp_path)["model_type"] == "gpt2"
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4}))
    assert "model_type" not in read_config(tmp_path)


def test_an_index_that_still_names_the_tied_head(tmp_path):
    """A conversion of shards to safetensors leaves the copy out and keeps the index's line."""
    form = tiny.Form(shards=2)
    for name, tied in (("tied", True), ("untied", False)):
        model = tiny.gpt2(tie_word_embeddings=tied)
        source = tiny.write_source(tmp_path / name, model, form)
        file = source / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        if not tied:
            shard = source / index["weight_map"]["lm_head.weight"]
            tensors = load_file(shard)
            tiny.write_file(shard, {n: t for n, t in tensors.items() if n != "lm_head.weight"})
        index["weight_map"].setdefault(
            "lm_head.weight", index["weight_map"]["transformer.wte.weight"]
        )
        index["metadata"] = {"total_size": 123456.0, "total_parameters": 7}
        file.write_text(json.dumps(index))
    assert tiny.converted(tmp_path / "tied", tmp_path / "out").config.tied_head
    with pytest.raises(SourceError, match=r"lm_head\.weight"):
        tiny.converted(tmp_path / "untied", tmp_path / "refused")
