"""GPT-Next from NeMo's files: against transformers where it has the model, else the formulas."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import nemo_reference
import nemo_writer as nemo
import tiny
from nemo_writer import GPT_2B, PLAIN, VOCAB
from porttool.cli import invoke as porttool
from porttool.errors import PorttoolError
from porttool.plugins import choose_converter
from porttool.progress import Progress
from porttool.sources.nemo import read_nemo_config
from tiny import full_logits

ATOL = 1e-9
PROMPTS = [[5, 9, 2], [7], [1, 50, 33, 4, 8, 19, 2]]
VARIANTS = {
    "gpt_2b": {},
    "swiglu": {"activation": "swiglu"},
    "geglu": {"activation": "geglu"},
    "reglu": {"activation": "reglu"},
    "fast_reglu": {"activation": "fast-reglu"},
    "fast_geglu": {"activation": "fast-geglu"},
    "fast_geglu_fused": {"activation": "fast-geglu", "bias_activation_fusion": True},
    "squared_relu": {"activation": "squared-relu"},
    "biases_everywhere": {"bias": True},
    "swiglu_with_biases": {"activation": "swiglu", "bias": True},
    "groups": {"num_query_groups": 2},
    "one_group": {"num_query_groups": 1},
    "wide_heads": {"kv_channels": 10, "rotary_percentage": 0.4},
    "epsilon": {"layernorm_epsilon": 0.3},
    "full_rotary": {"rotary_percentage": 1.0},
    "plain_layernorm": {"normalization": "layernorm"},
    "rmsnorm": {"normalization": "rmsnorm"},
    "tied": {"share_embeddings_and_output_weights": True},
    "plain": PLAIN,
    "plain_fused": {**PLAIN, "bias_activation_fusion": True},
    "plain_openai": {**PLAIN, "openai_gelu": True},
    "plain_default": {**PLAIN, "bias_activation_fusion": None},
    "plain_old_key": {**PLAIN, "bias_activation_fusion": None, "bias_gelu_fusion": False},
    "plain_legacy": {**PLAIN, "megatron_legacy": True},
}


def made(**changes: Any) -> dict[str, Any]:
    """GPT-2B's YAML with changes; None takes a key away."""
    merged = {**GPT_2B, **changes}
    keep = ("kv_channels", "num_query_groups", "virtual_pipeline_model_parallel_size")
    return {k: v for k, v in merged.items() if v is not None or k in keep}


def loaded(source: Path, folder: Path):
    return tiny.in_float64(tiny.converted(source, folder / "checkpoint"), folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_variant(tmp_path, changes):
    values = made(**changes)
    tensors = nemo.draw(values)
    runner = loaded(nemo.write(tmp_path / "a.nemo", values, tensors), tmp_path)
    for prompt in PROMPTS:
        expected = nemo.forward(values, tensors, prompt)
        torch.testing.assert_close(full_logits(runner, prompt), expected, atol=ATOL, rtol=0)


def test_the_gelus_differ():
    """Else the variants above would prove nothing about which one is taken."""
    exact, fused = made(**PLAIN), made(**PLAIN, bias_activation_fusion=True)
    tensors = nemo.draw(exact)
    moved = nemo.forward(exact, tensors, PROMPTS[2]) - nemo.forward(fused, tensors, PROMPTS[2])
    assert moved.abs().max() > 1e-6


def assert_same_as(model: torch.nn.Module, source: Path, folder: Path) -> None:
    tiny.assert_same(loaded(source, folder), model, PROMPTS)


WRITTEN = {
    "enable_megatron_timers": False, "megatron_timer_kwargs": {"log_mode": "minmax"},
    "pipeline_model_parallel_split_rank": 0, "use_distributed_optimizer": True,
    "num_moe_experts": None, "moe_router_topk": 2, "moe_grouped_gemm": False,
    "dpo": {"ref_policy_kl_penalty": 0.2}, "context_parallel_size": 1, "sharp": False,
}  # fmt: skip
"""Keys of YAMLs that NeMo up to 1.23 wrote, which change nothing in a model without experts."""


def test_keys_of_later_versions(tmp_path):
    values = made(**WRITTEN) | {"num_moe_experts": None}
    source = nemo.write(tmp_path / "a.nemo", values, nemo.draw(values))
    tiny.converted(source, tmp_path / "checkpoint")
    values["num_moe_experts"] = 8
    source = nemo.write(tmp_path / "b.nemo", values, nemo.draw(values))
    with pytest.raises(PorttoolError, match="'num_moe_experts' is 8, which porttool cannot port"):
        tiny.converted(source, tmp_path / "refused")


@pytest.mark.parametrize("groups", [None, 2])
def test_gpt_2b_against_stablelm(tmp_path, groups):
    values = made(num_query_groups=groups)
    tensors = nemo.draw(values)
    source = nemo.write(tmp_path / "a.nemo", values, tensors)
    assert_same_as(nemo_reference.stablelm(values, tensors), source, tmp_path)


def test_squared_relu_against_nemotron(tmp_path):
    values = made(activation="squared-relu")
    tensors = nemo.draw(values)
    source = nemo.write(tmp_path / "a.nemo", values, tensors)
    assert_same_as(nemo_reference.nemotron(values, tensors), source, tmp_path)


@pytest.mark.parametrize("fused", [True, False])
def test_plain_nemo_against_gpt2(tmp_path, fused):
    from transformers import GPT2Config, GPT2LMHeadModel

    values = made(**PLAIN, bias_activation_fusion=fused)
    tensors = nemo.draw(values)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=40, n_embd=32, n_layer=4, n_head=4, n_inner=40,
        activation_function="gelu_new" if fused else "gelu", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    names = {"self_attention.dense": "attn.c_proj", "mlp.dense_h_to_4h": "mlp.c_fc",
             "mlp.dense_4h_to_h": "mlp.c_proj", "input_layernorm": "ln_1",
             "post_attention_layernorm": "ln_2"}  # fmt: skip
    theirs = {
        "transformer.wte.weight": tensors["embedding.word_embeddings.weight"],
        "transformer.wpe.weight": tensors["embedding.position_embeddings.weight"],
    }
    for part in ("weight", "bias"):
        theirs[f"transformer.ln_f.{part}"] = tensors[f"final_layernorm.{part}"]
        for i in range(4):
            qkv = tensors[f"layers.{i}.self_attention.query_key_value.{part}"]
            by_kind = qkv.view(4, 3, 8, -1).transpose(0, 1).reshape(96, -1)
            theirs[f"transformer.h.{i}.attn.c_attn.{part}"] = by_kind.t().squeeze(0)
            for old, new in names.items():
                tensor = tensors[f"layers.{i}.{old}.{part}"]
                matrix = tensor.t() if tensor.dim() == 2 else tensor
                theirs[f"transformer.h.{i}.{new}.{part}"] = matrix
    model = nemo_reference.filled(GPT2LMHeadModel(config), theirs)
    assert_same_as(model, nemo.write(tmp_path / "a.nemo", values, tensors), tmp_path)


FORMS = [
    ("legacy", 1, 1, "folder"),
    ("legacy_o2", 1, 1, "gz"),
    ("core", 1, 1, "tar"),
    ("core_local", 2, 1, "tar"),
    ("legacy", 2, 1, "folder"),
    ("legacy", 4, 1, "tar"),
    ("core", 1, 2, "tar"),
    ("legacy", 2, 2, "gz"),
    ("core", 2, 4, "folder"),
]


@pytest.mark.parametrize("changes", [{}, {**PLAIN, "num_query_groups": 4}], ids=["gpt_2b", "plain"])
@pytest.mark.parametrize(("style", "tp", "pp", "form"), FORMS)
def test_every_form_gives_the_same_checkpoint(tmp_path, style, tp, pp, form, changes):
    whole = made(**changes)
    tensors = nemo.draw(whole)
    tiny.converted(nemo.write(tmp_path / "a.nemo", whole, tensors), tmp_path / "whole")
    values = made(**changes, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    source = nemo.write(tmp_path / "b.nemo", values, tensors, style=style, form=form)
    tiny.converted(source, tmp_path / "parts")
    expected = weights(tmp_path / "whole")
    found = weights(tmp_path / "parts")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    assert not list(tmp_path.glob(".*"))


def test_legacy_order_of_ranks(tmp_path):
    whole = made(**PLAIN, megatron_legacy=True)
    tensors = nemo.draw(whole)
    tiny.converted(nemo.write(tmp_path / "a.nemo", whole, tensors), tmp_path / "whole")
    values = {**whole, "tensor_model_parallel_size": 2}
    tiny.converted(nemo.write(tmp_path / "b.nemo", values, tensors), tmp_path / "parts")
    expected = weights(tmp_path / "whole")
    assert all(t.equal(expected[n]) for n, t in weights(tmp_path / "parts").items())


@pytest.mark.parametrize("form", ["tar", "gz"])
def test_a_fetched_repository_is_its_archive(tmp_path, form):
    values = made()
    tensors = nemo.draw(values)
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    nemo.write(folder / "GPT-2B-001_bf16_tp1.nemo", values, tensors, form=form)
    found = weights(tiny.converted(folder, tmp_path / "checkpoint").path)
    assert found["head.weight"].equal(tensors["output_layer.weight"])


class Notes(Progress):
    def __init__(self):
        self.notes: list[str] = []

    def note(self, text):
        self.notes.append(text)


def test_a_compressed_archive_is_said_to_cost_a_pass(tmp_path):
    values = made()
    tensors = nemo.draw(values)
    for form, n_notes in (("gz", 1), ("tar", 0)):
        source = nemo.write(tmp_path / f"{form}.nemo", values, tensors, form=form)
        progress = Notes()
        tiny.converted(source, tmp_path / form, progress=progress)
        said = [n for n in progress.notes if "one pass unpacks it to a temporary file" in n]
        assert len(said) == n_notes


def test_a_compressed_archive_is_inspected_as_a_plain_one(tmp_path, monkeypatch, capsys):
    values = made()
    tensors = nemo.draw(values)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    shown = []
    for form in ("tar", "gz"):
        source = nemo.write(tmp_path / f"{form}.nemo", values, tensors, form=form)
        assert porttool(["inspect", str(source), "--json"]) == 0
        shown.append(capsys.readouterr())
    assert shown[0].out == shown[1].out and json.loads(shown[1].out)["tensors"] == len(tensors)
    assert shown[0].err == ""
    assert (
        f"gz.nemo is compressed: one pass unpacks it to a temporary file in {scratch}"
        in " ".join(shown[1].err.split())
    )
    source.write_bytes(source.read_bytes()[:-9])
    assert porttool(["inspect", str(source)]) == 1
    assert f"error: {source}: truncated or damaged" in " ".join(capsys.readouterr().err.split())
    assert not list(scratch.iterdir())


def test_recognising_an_archive_asks_each_family_once(tmp_path, registry, monkeypatch):
    """A compressed archive whose YAML is its last file is unpacked by every look into it."""
    values = made()
    source = nemo.write(tmp_path / "a.nemo", values, nemo.draw(values), form="gz")
    asked = []
    monkeypatch.setattr("porttool_gpt_next.converter.read_nemo_config",
                        lambda path: asked.append(path) or values)  # fmt: skip
    assert choose_converter(registry, source).name == "gpt_next"
    assert asked == [source]


def test_the_disk_is_asked_before_an_archive_is_unpacked(tmp_path, monkeypatch):
    values = made()
    source = nemo.write(tmp_path / "a.nemo", values, nemo.draw(values), form="gz")
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 1000))
    said = refusal(source, tmp_path)
    assert "are needed" in said and "another --output, or TMPDIR for `porttool inspect`" in said
    assert [f.name for f in tmp_path.iterdir()] == ["a.nemo"]


def test_sentencepiece_travels_and_trims(tmp_path):
    from porttool.text import load_tokenizer

    data = nemo.sentencepiece_model(50)
    name = "0123456789abcdef0123456789abcdef_x.model"
    values = made(tokenizer={"library": "sentencepiece", "model": f"nemo:{name}",
                             "tokenizer_model": f"nemo:{name}"})  # fmt: skip
    tensors = nemo.draw(values)
    source = nemo.write(tmp_path / "a.nemo", values, tensors, files={name: data})
    checkpoint = tiny.converted(source, tmp_path / "checkpoint")
    tokens = checkpoint.manifest.tokens
    assert (tokens.bos, tokens.eos, tokens.pad) == (1, (2,), None)
    assert checkpoint.config.vocab_size == 50 < VOCAB
    table = tensors["output_layer.weight"][:50]
    assert weights(checkpoint.path)["head.weight"].equal(table)
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    assert (checkpoint.tokenizer / "tokenizer.model").read_bytes() == data
    assert tokenizer.decode(tokenizer.encode("the cat sat")) == "the cat sat"


def test_gpt2_vocabulary_travels_and_trims(tmp_path):
    files = nemo.bpe_files(53)
    values = made(tokenizer={"library": "megatron", "vocab_file": "nemo:aa_vocab.json",
                             "merge_file": "nemo:bb_merges.txt"})  # fmt: skip
    source = nemo.write(tmp_path / "a.nemo", values, nemo.draw(values), files=files)
    checkpoint = tiny.converted(source, tmp_path / "checkpoint")
    assert checkpoint.config.vocab_size == 53
    assert checkpoint.manifest.tokens.eos == (52,)
    assert sorted(f.name for f in checkpoint.tokenizer.iterdir()) == ["merges.txt", "vocab.json"]


def test_without_a_tokenizer_the_padded_rows_stay(tmp_path):
    values = made()
    source = nemo.write(tmp_path / "a.nemo", values, nemo.draw(values))
    assert tiny.converted(source, tmp_path / "checkpoint").config.vocab_size == VOCAB


def test_numbers_without_a_point_are_numbers(tmp_path):
    values = made(layernorm_epsilon="1e-5")
    source = nemo.write(tmp_path / "a.nemo", values, nemo.draw(made()))
    assert b"layernorm_epsilon: 1e-5" in source.read_bytes()
    assert tiny.converted(source, tmp_path / "checkpoint").config.norm_eps == 1e-5


class Stopped(Progress):
    """Interrupts when so many bytes are done."""

    def __init__(self, label: str, after: int):
        self._label, self._left, self._counts = label, after, False

    def start(self, label, total, *, unit="B"):
        self._counts = label.startswith(self._label)

    def advance(self, amount):
        self._left -= amount if self._counts else 0
        if self._left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("form", ["tar", "gz"])
def test_an_interrupted_conversion_goes_on(tmp_path, form):
    values = made(num_layers=8)
    source = nemo.write(tmp_path / "a.nemo", values, nemo.draw(values), form=form)
    with pytest.raises(KeyboardInterrupt):
        tiny.converted(source, tmp_path / "checkpoint", max_shard_bytes=40_000,
                       progress=Stopped("convert", 150_000))  # fmt: skip
    partial = tmp_path / ".checkpoint.partial"
    kept = {f.name: f.stat().st_ino for f in partial.glob("*.safetensors")}
    assert [f.name for f in tmp_path.glob(".*")] == [partial.name]
    checkpoint = tiny.converted(source, tmp_path / "checkpoint", max_shard_bytes=40_000)
    now = {f.name: f.stat().st_ino for f in checkpoint.path.glob("*.safetensors")}
    assert sum(now[name] == kept[name] for name in kept) >= 3
    tiny.converted(source, tmp_path / "again", max_shard_bytes=40_000)
    expected = weights(tmp_path / "again")
    assert all(t.equal(expected[n]) for n, t in weights(checkpoint.path).items())


def test_interrupting_the_unpacking_leaves_nothing(tmp_path):
    values = made()
    source = nemo.write(tmp_path / "a.nemo", values, nemo.draw(values), form="gz")
    with pytest.raises(KeyboardInterrupt):
        tiny.converted(source, tmp_path / "checkpoint", progress=Stopped("unpack", 10))
    assert [f.name for f in tmp_path.iterdir()] == ["a.nemo"]


def test_the_commands(tmp_path, capsys):
    """From an archive to text, as a user does it; the reference is the same weights elsewhere."""
    name = "0123_x.model"
    values = made(tokenizer={"library": "sentencepiece", "model": f"nemo:{name}"})
    files = {name: nemo.sentencepiece_model(50)}
    source = nemo.write(tmp_path / "a.nemo", values, nemo.draw(values), files=files)
    checkpoint, engine = str(tmp_path / "checkpoint"), str(tmp_path / "engine")
    assert porttool(["convert", str(source), "--output", checkpoint]) == 0
    assert porttool(["build", checkpoint, "--output", engine]) == 0
    capsys.readouterr()
    run = ["run", engine, "--set", "device", "cpu", "--input-text", "the cat", "--output-json", "-"]
    assert porttool([*run, "--max-output-len", "4", "--ignore-eos"]) == 0
    assert len(json.loads(capsys.readouterr().out)["completions"][0]["tokens"]) == 4


def refusal(source: Path, folder: Path, model: str | None = None) -> str:
    with pytest.raises(PorttoolError) as caught:
        tiny.converted(source, folder / "checkpoint", model)
    assert not (folder / "checkpoint").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ffn_hidden_size": 48}, "layers.0.mlp.up.weight should be [96, 32] but comes out as "
                                  "[80, 32] of layers.0.mlp.up.weight [80, 32] in a.nemo: model_"),
        ({"num_layers": 5}, "tensors missing from the source: layers.4.attention.out.weight"),
        ({"num_layers": 3}, "tensors that nothing accounts for in a.nemo: model_weights.ckpt: "),
        ({"bias": True}, "tensors missing from the source: layers.0.attention.out.bias"),
        ({"num_query_groups": 3}, "n_head 4 is not a multiple of n_kv_head 3"),
        ({"num_query_groups": 2}, "layers.0.attention.qkv.weight should be [64, 32]"),
        ({"share_embeddings_and_output_weights": True}, "differs from embedding.weight"),
        ({"activation": "gelu"}, "layers.0.mlp.up.weight should be [40, 32]"),
        ({"activation": "swish"}, "'activation' is 'swish'; porttool knows: fast-geglu,"),
        ({"openai_gelu": True}, "'openai_gelu' contradicts the activation"),
        ({"normalization": "rmsnorm", "layernorm_zero_centered_gamma": True}, "zero-centred"),
        ({"position_embedding_type": "alibi"}, "porttool knows: learned_absolute, rope"),
        ({"rotary_percentage": 0.4}, "rotary dimension 3 is odd"),
        ({"normalize_attention_scores": None}, "'normalize_attention_scores' is None, which"),
        ({"transformer_block_type": "post_ln"}, "'transformer_block_type' is 'post_ln', which"),
        ({"seq_len_interpolation_factor": 4}, "'seq_len_interpolation_factor' is 4"),
        ({"mcore_customization_config": {"parallel_attention": True}}, "which porttool cannot"),
        ({"router_topk": 2}, "unknown keys that could change the model: router_topk"),
        ({"max_position_embeddings": "${.nothing}"}, "refers to ${.nothing}, which is not there"),
        ({"max_position_embeddings": "${.max_position_embeddings}"}, "refers to itself"),
        ({"hidden_size": "${multiply:4,8}"}, "'hidden_size' should be a positive integer"),
        ({"tensor_model_parallel_size": 2}, "tensor rank 0 of stage 0, tensor rank 1 of stage 0"),
        ({"tokenizer": {"library": "sentencepiece", "model": "nemo:x.model"}},
         "model_config.yaml names 'nemo:x.model', which is not there"),
    ],
)  # fmt: skip
def test_yaml_that_disagrees_or_cannot_be_ported(tmp_path, change, said):
    values = made()
    members = {
        "model_config.yaml": yaml.safe_dump({**values, **change}).encode(),
        "model_weights.ckpt": nemo.saved(nemo.rank_state(values, nemo.draw(values), "core", 0, 0)),
    }
    source = nemo.pack(tmp_path / "a.nemo", members, "tar")
    message = refusal(source, tmp_path)
    assert said in message
    assert "a.nemo" in message


def test_keys_of_published_archives_that_change_nothing(tmp_path):
    """Of NeMo 1.23, and of what RLHF and SteerLM made of GPT-2B-001."""
    values = made(
        gc_interval=0, sampling_params={"top_k": 0}, length_params={"min_length": 1},
        pretrained_checkpoint={"checkpoint_dir": None}, memory_profile={"enabled": False},
        mcore_customization_config={"new_decoder_architecture": False, "parallel_attention": False},
        steerlm=None, steerable_attributes={"quality": 4}, spin={"num_rollouts": 1}, ppo={},
        kd_teacher_restore_from_path="gone.nemo", reset_lr=False, reset_lr_steps=False,
    )  # fmt: skip
    source = nemo.write(tmp_path / "a.nemo", values, nemo.draw(values))
    assert tiny.converted(source, tmp_path / "checkpoint").config.vocab_size == 56


def test_an_adapter_is_no_model(tmp_path):
    """As gpt2b_lora-900.nemo is published: the model's YAML, and weights of the adapter alone."""
    part = "model.language_model.encoder.layers.{}.self_attention.adapter_layer.lora_kqv_adapter"
    weights = {f"{part.format(i)}.linear_{end}.weight": torch.ones(8, 32)
               for i in range(4) for end in ("in", "out")}  # fmt: skip
    config = yaml.safe_dump(made(peft={"peft_scheme": "lora", "restore_from_path": None}))
    members = {"model_config.yaml": config.encode(), "model_weights.ckpt": nemo.saved(weights)}
    source = nemo.pack(tmp_path / "a.nemo", members, "tar")
    assert "a.nemo: holds an adapter (LoRA or the like) and no model; merge" in refusal(
        source, tmp_path
    )


def test_tokenizer_with_more_ids_than_rows(tmp_path):
    values = made(tokenizer={"vocab_file": "nemo:aa_vocab.json"})
    source = nemo.write(tmp_path / "a.nemo", values, nemo.draw(values), files=nemo.bpe_files(60))
    said = "the tokenizer has 60 ids, but the embedding in a.nemo: model_weights.ckpt only 56 rows"
    assert said in refusal(source, tmp_path)


@pytest.mark.parametrize("form", ["tar", "folder"])
def test_missing_ranks_are_named(tmp_path, form):
    values = made(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    tensors = nemo.draw(values)
    whole = nemo.write(tmp_path / "whole", values, tensors, form="folder")
    files = {f.relative_to(whole).as_posix(): f.read_bytes()
             for f in whole.rglob("*") if f.is_file()}  # fmt: skip
    files.pop("tp_rank_01_pp_rank_001/model_weights.ckpt")
    source = nemo.pack(tmp_path / "a.nemo", files, form)
    assert "the files of tensor rank 1 of stage 1 are missing" in refusal(source, tmp_path)


def test_ranks_of_different_checkpoints(tmp_path):
    values = made(tensor_model_parallel_size=2)
    source = nemo.write(tmp_path / "a.nemo", values, nemo.draw(values), form="folder")
    other = nemo.write(tmp_path / "other", values, nemo.draw(values, seed=1), form="folder")
    rank = "mp_rank_01/model_weights.ckpt"
    (source / rank).write_bytes((other / rank).read_bytes())
    assert "should be the same on every rank" in refusal(source, tmp_path)


def test_distributed_checkpoints_are_refused_by_name(tmp_path):
    members = {
        "model_config.yaml": yaml.safe_dump(made()).encode(),
        "model_weights/metadata.json": b'{"sharded_backend": "torch_dist"}',
        "model_weights/common.pt": b"",
        "model_weights/__0_0.distcp": b"",
    }
    source = nemo.pack(tmp_path / "a.nemo", members, "tar")
    message = refusal(source, tmp_path)
    assert "model_weights/metadata.json is of a distributed checkpoint" in message


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"num_layers: [", "model_config.yaml is damaged"),
        (b"num_layers: !!python/object/apply:os.system ['true']", "model_config.yaml is damaged"),
        (b"- num_layers", "should hold a mapping"),
    ],
)
def test_damaged_yaml(tmp_path, data, said):
    source = nemo.pack(tmp_path / "a.nemo", {"model_config.yaml": data}, "tar")
    with pytest.raises(PorttoolError, match=said):
        read_nemo_config(source)


def test_the_right_family_is_named(tmp_path, source):
    values = made()
    archive = nemo.write(tmp_path / "a.nemo", values, nemo.draw(values))
    assert "it looks like gpt_next" in refusal(archive, tmp_path, "gpt2")
    assert "it looks like gpt2" in refusal(source, tmp_path, "gpt_next")


def test_prompt_tables_are_not_models(tmp_path, registry):
    prompts = yaml.safe_dump({**made(), "virtual_prompt_style": "p-tuning"}).encode()
    source = nemo.pack(tmp_path / "a.nemo", {"model_config.yaml": prompts}, "tar")
    assert not registry.converter("gpt_next").matches(source)


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_truncated_compressed_archive(tmp_path, keep):
    values = made()
    source = nemo.write(tmp_path / "a.nemo", values, nemo.draw(values), form="gz")
    data = source.read_bytes()
    source.write_bytes(data[: int(len(data) * keep)])
    assert "truncated or damaged" in refusal(source, tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_compressed_trap_is_not_unpacked(tmp_path, monkeypatch):
    values = made()
    monkeypatch.setattr("porttool.sources.archive.SMALL", 10_000)
    members = {"model_config.yaml": yaml.safe_dump(values).encode(), "zeros": bytes(60_000_000)}
    source = nemo.pack(tmp_path / "a.nemo", members, "gz")
    assert "it is a trap" in refusal(source, tmp_path)


@pytest.mark.parametrize("package", ["yaml", "sentencepiece"])
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, package):
    values = made(tokenizer={"model": "nemo:x.model"})
    files = {"x.model": nemo.sentencepiece_model(50)}
    source = nemo.write(tmp_path / "a.nemo", values, nemo.draw(values), files=files)
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install 'porttool[gpt-next]'" in refusal(source, tmp_path)


CONVERT = """
import re, sys
from pathlib import Path
from porttool.converter import convert
from porttool.plugins import choose_converter, load_registry
registry = load_registry()
source, output = Path(sys.argv[1]), Path(sys.argv[2])
converter = choose_converter(registry, source)
plugin = registry.record(registry.converters, converter.name)
convert(converter, source, output, plugin=plugin, dtype="bfloat16")
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_stays_bounded(tmp_path, ranks):
    """The archive is three times the bound: twice the largest tensor and 300 MB."""
    values = made(
        hidden_size=1024, ffn_hidden_size=2048, num_layers=24, tensor_model_parallel_size=ranks
    )
    tensors = nemo.draw(values)
    largest = max(t.nbytes for t in tensors.values())
    source = nemo.write(tmp_path / "a.nemo", values, tensors)
    bound = 2 * largest + 300_000_000
    assert source.stat().st_size > 3 * bound
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, source, tmp_path / "checkpoint"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    peak = int(done.stdout) * 1024
    assert peak < bound, f"peak {peak / 1e6:.0f} MB, allowed {bound / 1e6:.0f} MB"
