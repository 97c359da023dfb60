"""SantaCoder and StarCoder against transformers' GPTBigCode: same weights, float64, 1e-9."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import tiny
from porttool.cli import invoke as porttool
from porttool.errors import SourceError, UsageError
from porttool.plugins import choose_converter
from porttool.text import load_tokenizer
from tiny_coder import SIZES, UNDERSCORES, bigcode, write_coder

ATOL = 1e-9
ORIGINAL = {
    "architectures": ["GPT2LMHeadCustomModel"],
    "model_type": "gpt2",
    "attention_head_type": "multiquery",
    "auto_map": {
        "AutoConfig": "configuration_gpt2_mq.GPT2CustomConfig",
        "AutoModelForCausalLM": "modeling_gpt2_mq.GPT2LMHeadCustomModel",
    },
    "activation_function": "gelu_fast",
    "n_inner": 40,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "bos_token_id": 60,
    "eos_token_id": 60,
    "torch_dtype": "float32",
    **SIZES,
}
DASHES = {"<|endoftext|>": 60, "<fim-prefix>": 61, "<fim-middle>": 62, "<fim-suffix>": 63}


def write_tokenizer(folder: Path, added: dict[str, int]) -> None:
    entries = [{"id": i, "content": t, "special": True} for t, i in added.items()]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": entries, "model": {}}))


def original(folder: Path, model: torch.nn.Module, **changes) -> Path:
    """Write a GPTBigCode the way that SantaCoder was published: Conv1D, q apart from k and v."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    values = {**ORIGINAL, **changes}
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in values.items() if v is not None})
    )
    write_tokenizer(folder, DASHES)
    d = SIZES["n_embd"]
    heads, size = SIZES["n_head"], d // SIZES["n_head"]
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        matrix = tensor.dim() == 2 and name.startswith("transformer.h.")
        value = tensor.t() if matrix else tensor
        if ".attn.c_attn." not in name:
            tensors[name] = value
        elif model.config.multi_query:
            query, rest = value.split((d, 2 * size), dim=-1)
            tensors[name.replace("c_attn", "q_attn")] = query
            tensors[name.replace("c_attn", "kv_attn")] = rest
        else:
            by_head = value.unflatten(-1, (heads, 3, size))
            tensors[name] = by_head.transpose(-3, -2).flatten(-3)
    n = SIZES["n_positions"]
    for layer in range(SIZES["n_layer"]):
        mask = torch.ones(n, n, dtype=torch.uint8).tril()[None, None]
        tensors[f"transformer.h.{layer}.attn.bias"] = mask
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    stored = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    save_file({n: t.contiguous().clone() for n, t in stored.items()}, folder / "model.safetensors")
    return folder


def assert_ported(source: Path, folder: Path, model: torch.nn.Module) -> None:
    checkpoint = tiny.converted(source, folder / "checkpoint")
    assert checkpoint.manifest.family == "santacoder"
    runner = tiny.in_float64(checkpoint, folder)
    assert runner.config.n_kv_head == model.config.num_key_value_heads
    tiny.assert_same(runner, model)


@pytest.mark.parametrize("multi_query", [True, False])
@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu"])
@pytest.mark.parametrize("n_inner", [None, 40])
def test_bigcode(tmp_path, multi_query, activation, n_inner):
    model = bigcode(multi_query=multi_query, activation_function=activation, n_inner=n_inner)
    source = tiny.write_source(tmp_path / "source", model)
    assert_ported(source, tmp_path, model)


def test_bigcode_with_the_keys_of_its_runner(tmp_path):
    """Keys that old configs carry and the model does not heed, whatever they say."""
    model = bigcode(tie_word_embeddings=False, scale_attn_weights=False)
    source = tiny.edit_config(
        tiny.write_source(tmp_path / "source", model),
        inference_runner=0, max_batch_size=4, max_sequence_length=9, pad_key_length=True,
        pre_allocate_kv_cache=False, validate_runner_input=True, runner_max_sequence_length=5,
        attention_softmax_in_fp32=False, scale_attention_softmax_in_fp32=False,
        scale_attn_by_inverse_layer_idx=True,
    )  # fmt: skip
    assert_ported(source, tmp_path, model)


def test_bigcode_before_transformers_had_it(tmp_path):
    """bigcode/santacoder-fast-inference says attention_type in place of multi_query."""
    model = bigcode()
    source = tiny.edit_config(
        tiny.write_source(tmp_path / "source", model),
        multi_query=None, num_key_value_heads=None, attention_type=2, fused_softmax=True,
    )  # fmt: skip
    assert_ported(source, tmp_path, model)
    for kind in (1, 3):
        tiny.edit_config(source, attention_type=kind)
        with pytest.raises(SourceError, match=f"'attention_type' is {kind}; porttool knows 2"):
            tiny.converted(source, tmp_path / "refused")


@pytest.mark.parametrize("model_type", ["gpt2", "santacoder"])
@pytest.mark.parametrize("head_type", ["multiquery", "multihead"])
def test_original_santacoder(tmp_path, head_type, model_type):
    multi_query = head_type == "multiquery"
    model = bigcode(multi_query=multi_query, n_inner=40)
    source = original(
        tmp_path / "source", model, attention_head_type=head_type, model_type=model_type
    )
    assert_ported(source, tmp_path, model)


@pytest.mark.parametrize("declared", [50256, None, 60])
def test_wrong_end_ids_come_from_the_tokenizer(tmp_path, declared):
    source = original(
        tmp_path / "source", bigcode(n_inner=40), bos_token_id=declared, eos_token_id=declared
    )
    tokens = tiny.converted(source, tmp_path / "checkpoint").manifest.tokens
    assert (tokens.bos, tokens.eos) == (60, (60,))


def test_a_valid_end_id_stays(tmp_path):
    source = original(tmp_path / "source", bigcode(n_inner=40), eos_token_id=5)
    assert tiny.converted(source, tmp_path / "checkpoint").manifest.tokens.eos == (5,)


def test_wrong_end_ids_without_a_tokenizer_are_refused(tmp_path):
    source = original(tmp_path / "source", bigcode(n_inner=40), eos_token_id=50256)
    (source / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match="50256 is outside the vocabulary of 67"):
        tiny.converted(source, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("added", "prompt"),
    [
        (DASHES, "<fim-prefix>a = <fim-suffix>\n<fim-middle>"),
        (UNDERSCORES, "<fim_prefix>a = <fim_suffix>\n<fim_middle>"),
        ({"<|endoftext|>": 0, "<fim_prefix>": 1}, None),
    ],
)
def test_infill_tokens_are_the_tokenizers(tmp_path, added, prompt):
    source = tiny.write_source(tmp_path / "source", bigcode())
    write_tokenizer(source, added)
    checkpoint = tiny.converted(source, tmp_path / "checkpoint")
    engine = tiny.built(checkpoint, tmp_path / "engine")
    infill = engine.manifest.infill
    assert (infill.prompt("a = ", "\n") if infill else None) == prompt


def test_gpt2_stays_gpt2(registry, source):
    assert choose_converter(registry, source).name == "gpt2"
    with pytest.raises(UsageError, match="it looks like gpt2"):
        choose_converter(registry, source, "santacoder")


def test_foreign_code_is_refused_by_name(tmp_path):
    source = original(
        tmp_path / "source", bigcode(n_inner=40), auto_map={"AutoConfig": "other--evil.Config"}
    )
    with pytest.raises(SourceError, match=r"runs code of its own \(evil.Config\)"):
        tiny.converted(source, tmp_path / "checkpoint")
    source = original(tmp_path / "again", bigcode(n_inner=40))
    with pytest.raises(UsageError, match="not a source of 'gpt2'; it looks like santacoder"):
        tiny.converted(source, tmp_path / "checkpoint", model="gpt2")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention_head_type": "sparse"}, "porttool knows: multihead, multiquery"),
        ({"attention_head_type": "multihead"}, "attn.c_attn.bias"),
        ({"rotary_dim": 4}, "unknown keys that could change the model: rotary_dim"),
        ({"n_head": 4}, r"comes out as \[40, 24\]"),
    ],
)
def test_configs_that_cannot_be_ported(tmp_path, change, said):
    source = original(tmp_path / "source", bigcode(n_inner=40), **change)
    with pytest.raises(SourceError, match=said):
        tiny.converted(source, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def coder(tmp_path_factory) -> Path:
    return write_coder(tmp_path_factory.mktemp("coder"))


def test_the_commands_verify(tmp_path, coder, capsys):
    checkpoint, engine = str(tmp_path / "checkpoint"), str(tmp_path / "engine")
    assert porttool(["convert", str(coder), "--output", checkpoint]) == 0
    assert porttool(["build", checkpoint, "--output", engine]) == 0
    verify = ["verify", engine, "--hf-model", str(coder), "--output", str(tmp_path / "report")]
    assert porttool([*verify, "--runner-set", "device", "cpu"]) == 0, capsys.readouterr().err


def test_run_fills_in_the_middle(tmp_path, coder):
    engine = tiny.built(tiny.converted(coder, tmp_path / "checkpoint"), tmp_path / "engine")
    asked = ["run", str(engine.path), "--prefix", "def f(", "--suffix", "):\n", "--set", "device",
             "cpu", "--max-output-len", "5", "--output-csv", str(tmp_path / "out.csv")]  # fmt: skip
    assert porttool(asked) == 0
    row = [int(i) for i in (tmp_path / "out.csv").read_text().split(",")]
    tokenizer = load_tokenizer(coder)
    wanted = tokenizer.encode("<fim_prefix>def f(<fim_suffix>):\n<fim_middle>")
    assert row[: len(wanted)] == wanted
    assert wanted[0] == 257 and len(wanted) == 3 + len("def f():\n")


def test_run_refuses_to_fill_in_without_the_tokens(tmp_path, coder, capsys):
    source = shutil.copytree(coder, tmp_path / "source")
    text = (source / "tokenizer.json").read_text().replace("fim_middle", "other")
    (source / "tokenizer.json").write_text(text)
    engine = tiny.built(tiny.converted(source, tmp_path / "checkpoint"), tmp_path / "engine")
    asked = ["run", str(engine.path), "--prefix", "a", "--set", "device", "cpu"]
    assert porttool(asked) == 2
    assert "not converted with tokens for infilling" in capsys.readouterr().err
    assert porttool([*asked, "--input-text", "b"]) == 2
    assert "give one of" in capsys.readouterr().err
