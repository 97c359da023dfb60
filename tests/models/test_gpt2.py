"""GPT-2 against transformers: same weights, float64, 1e-9."""

from __future__ import annotations

import json

import pytest
import torch

import tiny
from porttool.errors import SourceError
from porttool.plugins import choose_converter, load_registry
from tiny import PROMPTS, Form, assert_same, full_logits, reference_logits

VARIANTS = {
    "plain": {},
    "n_inner": {"n_inner": 56},
    "one_head": {"n_head": 1},
    "epsilon": {"layer_norm_epsilon": 0.3},
    "unscaled": {"scale_attn_weights": False},
    "inverse_layer": {"scale_attn_by_inverse_layer_idx": True},
    "inverse_layer_unscaled": {
        "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False,
    },
    "untied": {"tie_word_embeddings": False},
    "gelu_new": {"activation_function": "gelu_new"},
    "gelu_fast": {"activation_function": "gelu_fast"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "gelu": {"activation_function": "gelu"},
    "gelu_python": {"activation_function": "gelu_python"},
    "quick_gelu": {"activation_function": "quick_gelu"},
    "relu": {"activation_function": "relu"},
    "relu2": {"activation_function": "relu2"},
    "silu": {"activation_function": "silu"},
    "swish": {"activation_function": "swish"},
}  # fmt: skip
FORMS = {
    "no_prefix": Form(prefix=""),
    "masks": Form(masks=True),
    "masks_no_prefix_bin": Form(file="pytorch_model.bin", prefix="", masks=True),
    "head_copy": Form(head_copy=True),
    "head_copy_bin": Form(file="pytorch_model.bin", head_copy=True),
    "bin": Form(file="pytorch_model.bin"),
    "sharded": Form(shards=3),
    "sharded_bin": Form(file="pytorch_model.bin", shards=3, masks=True),
    "float16": Form(dtype=torch.float16),
    "bfloat16": Form(dtype=torch.bfloat16),
    "bfloat16_bin": Form(file="pytorch_model.bin", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_config_key_is_honoured(tmp_path, changes):
    model = tiny.gpt2(**changes)
    assert_same(tiny.ported(tmp_path, model), model)


@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in ("plain", "gelu_new")])
def test_every_variant_differs_from_the_plain_model(name, reference):
    """A variant that changes nothing would prove nothing: the logits must move."""
    other = tiny.gpt2(**VARIANTS[name])
    moved = reference_logits(other, PROMPTS[2]) - reference_logits(reference, PROMPTS[2])
    near = name in ("gelu_fast", "gelu_pytorch_tanh")  # the same function in other words
    assert (moved.abs().max() < 1e-6) == near


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_source(tmp_path, form):
    model = tiny.gpt2(dtype=form.dtype)
    assert_same(tiny.ported(tmp_path, model, form), model)


def test_upcast_attention(tmp_path, reference):
    """transformers computes these scores in float32; at float64 they must only be as good."""
    model = tiny.gpt2(reorder_and_upcast_attn=True)
    runner = tiny.ported(tmp_path, model)
    assert runner.config.upcast_attention
    assert_same(runner, reference)
    expected = reference_logits(model.float(), PROMPTS[2]).double()
    torch.testing.assert_close(full_logits(runner, PROMPTS[2]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("safe", [True, False])
def test_save_pretrained_in_shards(tmp_path, reference, safe):
    reference.float().save_pretrained(tmp_path / "source", max_shard_size="40KB")
    reference.double()
    assert (tmp_path / "source" / "model.safetensors.index.json").is_file()
    checkpoint = tiny.converted(tmp_path / "source", tmp_path / "checkpoint")
    assert_same(tiny.in_float64(checkpoint, tmp_path), reference)


def test_special_ids_and_generation_config(tmp_path, reference):
    source = tiny.write_source(tmp_path / "source", reference)
    found = tiny.converted(source, tmp_path / "a").manifest.tokens
    assert (found.bos, found.eos, found.pad) == (66, (66,), 65)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 66]}))
    assert tiny.converted(source, tmp_path / "b").manifest.tokens.eos == (3, 66)


def test_config_of_2019(tmp_path, reference):
    """The first configs name no model type, no activation and none of the newer flags."""
    source = tiny.write_source(tmp_path / "source", reference, Form(prefix="", masks=True))
    keep = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon")
    values = json.loads((source / "config.json").read_text())
    old = {**{k: values[k] for k in keep}, "n_ctx": 48, "initializer_range": 0.02}
    (source / "config.json").write_text(json.dumps(old))
    checkpoint = tiny.converted(source, tmp_path / "checkpoint")
    assert_same(tiny.in_float64(checkpoint, tmp_path), reference)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_head": 5}, "'n_embd' 24 is not a multiple of 'n_head' 5"),
        ({"activation_function": "mish"}, "'activation_function' is 'mish'; porttool knows: gelu,"),
        ({"activation_function": 3}, "'activation_function' is 3"),
        ({"n_layer": "3"}, "'n_layer' should be a positive integer, not '3'"),
        ({"n_layer": 0}, "'n_layer' should be a positive integer, not 0"),
        ({"n_inner": -8}, "'n_inner' should be a positive integer, not -8"),
        ({"layer_norm_epsilon": "small"}, "'layer_norm_epsilon' should be a number, not 'small'"),
        ({"layer_norm_epsilon": -1.0}, "an impossible config: norm_eps"),
        ({"scale_attn_weights": 1}, "'scale_attn_weights' should be true or false, not 1"),
        ({"add_cross_attention": True}, "'add_cross_attention' is True, which porttool cannot"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config' is {'bits': 4}"),
        ({"rope_scaling": 2}, "unknown keys that could change the model: rope_scaling"),
        ({"vocab_size": None}, "the key 'vocab_size' is missing"),
        ({"vocab_size": 1 << 40}, "an impossible config: vocab_size"),
        ({"eos_token_id": 67}, "the special token id 67 is outside the vocabulary of 67"),
        ({"auto_map": {"AutoConfig": "x.py"}}, "code of its own"),
    ],
)
def test_configs_that_cannot_be_ported(tmp_path, reference, change, said):
    source = tiny.edit_config(tiny.write_source(tmp_path / "source", reference), **change)
    with pytest.raises(SourceError) as caught:
        tiny.converted(source, tmp_path / "checkpoint")
    assert said in str(caught.value)
    assert "config" in str(caught.value)
    assert not (tmp_path / "checkpoint").exists()


def test_a_config_without_special_ids_has_those_that_transformers_gives(tmp_path):
    """Configs of 2019 have no such keys; a model that never ends would be another one."""
    from transformers import GPT2Config

    converter = choose_converter(load_registry(), tiny.write_source(tmp_path / "a", tiny.gpt2()))
    shape = converter.config(tmp_path / "a")
    full = shape.model_copy(update={"vocab_size": 50257})
    for keys in ({}, {"eos_token_id": None}, {"bos_token_id": 3, "eos_token_id": 4}):
        values = {"n_embd": 24, "n_special": 0, "vocab_size": 50257, **keys}
        (tmp_path / "a" / "config.json").write_text(json.dumps(values))
        (tmp_path / "a" / "generation_config.json").unlink(missing_ok=True)
        tokens, theirs = converter.special_tokens(tmp_path / "a", full), GPT2Config(**values)
        eos = () if theirs.eos_token_id is None else (theirs.eos_token_id,)
        assert (tokens.bos, tokens.eos) == (theirs.bos_token_id, eos)
    for keys in (
        {},
        {"bos_token_id": 50256, "eos_token_id": 50256},
    ):  # as save_pretrained writes it
        (tmp_path / "a" / "config.json").write_text(json.dumps({"n_embd": 24, **keys}))
        tokens = converter.special_tokens(tmp_path / "a", shape)
        assert (tokens.bos, tokens.eos) == (None, ())
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert converter.special_tokens(tmp_path / "a", shape).eos == (3,)
