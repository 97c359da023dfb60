"""FasterTransformer's folders in and out, against files laid by hand from transformers' weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import nemo_writer as nemo
import tiny
from fastertransformer_writer import arrays, write_folder, write_ini
from porttool.cli import invoke as run_cli
from porttool.config import ModelConfig
from porttool.converter import Source
from porttool.errors import CheckpointError, PorttoolError, SourceError, UsageError
from porttool.fastertransformer import export, open_folder, writing
from porttool.plugins import choose_converter


@pytest.fixture(scope="module")
def mha():
    return tiny.gpt2(n_embd=32, n_head=4, n_layer=2, activation_function="gelu")


@pytest.fixture(scope="module")
def mqa():
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    config = GPTBigCodeConfig(
        vocab_size=67, n_positions=48, n_embd=32, n_layer=2, n_head=4, multi_query=True,
        activation_function="gelu_pytorch_tanh", bos_token_id=0, eos_token_id=0,
        attn_implementation="sdpa",  # the eager softmax rounds to float32
    )  # fmt: skip
    model = GPTBigCodeForCausalLM(config).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.copy_(drawn.double())
    return model


@pytest.fixture(params=["mha", "mqa"])
def model(request):
    return request.getfixturevalue(request.param)


def refused(source, tmp_path, message):
    with pytest.raises(PorttoolError, match=message):
        tiny.converted(source, tmp_path / "out", "gpt2/fastertransformer")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_logits_equal_transformers(tmp_path, model, tp, registry):
    source = write_folder(tmp_path / "c-model" / f"{tp}-gpu", model, tp).parent
    assert choose_converter(registry, source).name == "gpt2/fastertransformer"
    checkpoint = tiny.converted(source, tmp_path / "checkpoint")
    tiny.assert_same(tiny.in_float64(checkpoint, tmp_path), model)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_what_is_exported_is_what_the_old_tools_wrote(tmp_path, model, tp):
    first = tiny.converted(write_folder(tmp_path / "1-gpu", model, 1), tmp_path / "first")
    folder = export(first, tmp_path / "exported", tp=tp)
    expected = arrays(model, tp)
    assert {f.name for f in folder.glob("*.bin")} == expected.keys()
    for name, array in expected.items():
        assert (folder / name).read_bytes() == array.tobytes(), name
    second = tiny.converted(folder, tmp_path / "second")
    assert second.manifest.files == first.manifest.files
    assert second.config == first.config
    assert second.manifest.tokens == first.manifest.tokens


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_types_and_configs_make_the_round_trip(tmp_path, dtype, tokenizer_folder):
    model = tiny.gpt2(n_inner=24, layer_norm_epsilon=0.3, tie_word_embeddings=False,
                      scale_attn_by_inverse_layer_idx=True, activation_function="quick_gelu",
                      vocab_size=320, eos_token_id=0, bos_token_id=0)  # fmt: skip
    source = tiny.write_source(tmp_path / "source", model)
    shutil.copytree(tokenizer_folder, source, dirs_exist_ok=True)
    first = tiny.converted(source, tmp_path / "first", dtype=dtype)
    folder = export(first, tmp_path / "exported", tp=3)
    assert (folder / "model.lm_head.weight.bin").is_file()
    second = tiny.converted(folder, tmp_path / "second")
    assert (second.config, second.manifest.dtype) == (first.config, dtype)
    assert second.manifest.files == first.manifest.files
    assert (second.tokenizer / "tokenizer.json").is_file()


def test_the_tokenizer_that_is_exported_is_the_checkpoints(tmp_path, tokenizer_folder):
    source = tiny.write_source(tmp_path / "source", tiny.gpt2(vocab_size=320))
    shutil.copytree(tokenizer_folder, source, dirs_exist_ok=True)
    checkpoint = tiny.converted(source, tmp_path / "checkpoint")
    (checkpoint.tokenizer / "notes.txt").write_text("of nobody's manifest")
    folder = export(checkpoint, tmp_path / "exported")
    assert (folder / "tokenizer.json").is_file()
    assert not (folder / "notes.txt").exists()
    with (checkpoint.tokenizer / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: has \d+ bytes, the manifest says"):
        export(checkpoint, tmp_path / "again")
    assert not (tmp_path / "again" / "1-gpu").exists()


def test_a_gate_goes_into_a_file_of_its_own(tmp_path):
    """Gate rows in the plain file, linear rows in the second, bit for bit there and back."""
    from porttool.fastertransformer.config_file import FolderConfig, format_config
    from porttool.fastertransformer.layout import bin_files

    config = ModelConfig(
        vocab_size=11, n_positions=8, n_layer=1, n_head=2, n_kv_head=2, head_dim=4, d_model=8,
        d_ff=6, activation="silu", gated=True, position="rotary", rotary_fraction=0.5,
        attention_scale=0.5, qkv_bias=False, out_bias=False, mlp_bias=False, tied_head=False,
    )  # fmt: skip
    up = torch.randn(12, 8)
    first, second = bin_files("layers.0.mlp.up.weight", config)
    assert first.name(1) == "model.layers.0.mlp.dense_h_to_4h.weight.1.bin"
    assert second.name(1) == "model.layers.0.mlp.dense_h_to_4h.gate.weight.1.bin"
    assert [(r.local, r.canonical) for r in second.regions(1, 2)] == [(slice(0, 3), slice(9, 12))]
    assert up[9:12].equal(torch.cat([up[r.canonical] for r in second.regions(1, 2)]))
    own = FolderConfig(config=config, tokens={}, dtype="float32", tensor_parallel=1)
    assert "activation_function = swiglu" in format_config(own)
    assert "rotary_pct = 0.5" in format_config(own)


def test_fastertransformer_keys_are_understood(tmp_path, mha):
    folder = write_folder(tmp_path / "2-gpu", mha, 2)
    write_ini(folder, {
        "model_name": "gpt2", "head_num": 4, "size_per_head": 8, "inter_size": 128,
        "max_pos_seq_len": 48, "num_layer": 2, "vocab_size": 67, "start_id": 66, "end_id": 66,
        "weight_data_type": "fp32", "tensor_para_size": 2, "activation_function": "gelu",
        "has_adapters": False, "adapter_inter_size": 0, "layernorm_eps": 1e-5,
    })  # fmt: skip
    source = open_folder(folder)
    assert isinstance(source, Source)
    assert (source.config.n_head, source.config.d_ff, source.tokens.eos) == (4, 128, (66,))


CONVERTER = {"saved_dir": "/out", "in_file": "gpt2", "trained_gpu_num": 1, "infer_gpu_num": 2,
             "processes": 4, "weight_data_type": "fp32"}  # fmt: skip
"""Arguments that FasterTransformer's converter of Hugging Face's folders writes down."""


def test_keys_of_the_converter_of_hugging_faces_folders(tmp_path, mha):
    """It writes every attribute of the config beside them, as transformers has it in memory."""
    folder = write_folder(tmp_path / "2-gpu", mha, 2)
    write_ini(folder, {**mha.config.to_dict(), **CONVERTER, "xla_device": None, "n_ctx": 48,
                       "gradient_checkpointing": False})  # fmt: skip
    other = write_folder(tmp_path / "other" / "2-gpu", mha, 2)
    assert open_folder(folder).config == open_folder(other).config


FIRST = "model.layers.0.attention.query_key_value.weight.0.bin"


@pytest.mark.parametrize(
    ("name", "message"),
    [("model.wpe.bin", r"model\.wpe\.bin: the file is missing"),
     ("model.layers.1.mlp.dense_4h_to_h.bias.bin", "dense_4h_to_h.bias.bin: the file is missing"),
     (FIRST, "1 ranks by its .*2 ranks by its name"),
     ("config.ini", "no config.ini here.*write a section")],
)  # fmt: skip
def test_a_missing_file_is_an_error(tmp_path, mha, name, message):
    folder = write_folder(tmp_path / "2-gpu", mha, 2)
    (folder / name).unlink()
    refused(folder, tmp_path, message)


def test_a_file_too_many_or_of_another_size_is_an_error(tmp_path, mha, mqa):
    folder = write_folder(tmp_path / "1-gpu", mha, 1)
    stale = folder / "model.layers.2.input_layernorm.bias.bin"
    stale.write_bytes(bytes(128))
    refused(folder, tmp_path, r"does not account for: model\.layers\.2")
    stale.unlink()
    (folder / "model.layers.0.attention.query_key_value.scale_y_quant_orig.bin").write_bytes(b"1")
    tiny.converted(folder, tmp_path / "scales")
    with (folder / "model.wte.bin").open("ab") as file:
        file.write(b"12")
    refused(folder, tmp_path, r"wte\.bin: has 8578 bytes, but \[67, 32\] in float32 needs 8576")
    folder = write_folder(tmp_path / "2-gpu", mqa, 2)
    array = np.fromfile(folder / FIRST, np.float32)
    array[-1] += 1
    array.tofile(folder / FIRST)
    refused(folder, tmp_path, "keys and values are not those of rank 0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"n_layer": 3}, r"layers\.2.*missing"), ({"storage_dtype": "float16"}, "needs"),
     ({"storage_dtype": "int4"}, "porttool knows: bf16"), ({"n_head": 5}, "not a multiple"),
     ({"tensor_parallelism": 2}, "2 ranks by config.ini"), ({"n_embd": "wide"}, "positive int"),
     ({"vocab_size": "absent"}, "'vocab_size' is missing"), ({"novelty": 1}, "unknown.*novelty"),
     ({"tie_word_embeddings": False}, "lm_head.weight.bin: the file is missing"),
     ({"do_layer_norm_before": False}, "norms after"), ({"eos_token_id": 67}, "outside the vocab"),
     ({"multi_query_mode": True}, "needs"), ({"num_layer": 3}, "n_layer and num_layer disagree"),
     ({"weight_data_type": "fp16"}, "storage_dtype and weight_data_type disagree"),
     ({"has_adapters": True}, "has no adapters")],
)  # fmt: skip
def test_a_wrong_config_is_refused(tmp_path, mha, changes, message):
    refused(write_folder(tmp_path / "1-gpu", mha, 1, **changes), tmp_path, message)


def test_an_edited_export_is_noticed(tmp_path, mha):
    first = tiny.converted(write_folder(tmp_path / "1-gpu", mha, 1), tmp_path / "first")
    folder = export(first, tmp_path / "exported")
    ini = folder / "config.ini"
    text = ini.read_text()
    ini.write_text(text.replace("layer_norm_epsilon = 1e-05", "layer_norm_epsilon = 1e-06"))
    refused(folder, tmp_path, "disagree about layer_norm_epsilon")
    ini.write_text(text.replace("tensor_parallel = 1", "tensor_parallel = one"))
    refused(folder, tmp_path, "is damaged")
    ini.write_text(text.replace("[gpt]", "[opt]"))
    refused(folder, tmp_path, r"no section \[gpt\]")


def test_an_export_without_our_section(tmp_path, mha):
    """What is left says everything twice, in FasterTransformer's words and in Hugging Face's."""
    first = tiny.converted(write_folder(tmp_path / "1-gpu", mha, 1), tmp_path / "first")
    ini = export(first, tmp_path / "exported") / "config.ini"
    ini.write_text(ini.read_text().partition("[porttool]")[0])
    assert open_folder(ini.parent).config == first.config
    ini.write_text(
        ini.read_text().replace("\nlayer_norm_epsilon = 1e-05", "\nlayer_norm_epsilon = 1")
    )
    refused(ini.parent, tmp_path, "layer_norm_epsilon and layernorm_eps disagree")


def test_a_wider_export_adds_up_in_float32_and_asks_for_its_room(tmp_path, monkeypatch):
    values = nemo.GPT_2B | nemo.PLAIN | {"normalization": "layernorm1p"}
    tensors = nemo.draw(values)
    source = nemo.write(tmp_path / "a.nemo", values, tensors)
    made = tiny.converted(source, tmp_path / "checkpoint", dtype="bfloat16")
    asked = []
    monkeypatch.setattr(writing, "require_space", lambda target, n_bytes: asked.append(n_bytes))
    folder = export(made, tmp_path / "exported", dtype="float32")
    assert asked == [sum(file.stat().st_size for file in folder.glob("*.bin"))]
    found = np.fromfile(folder / "model.final_layernorm.weight.bin", np.float32)
    stored = tensors["final_layernorm.weight"].bfloat16().float()
    assert found.tolist() == (stored + 1).tolist()


def test_several_folders_and_none(tmp_path, mha):
    write_folder(tmp_path / "both" / "1-gpu", mha, 1)
    write_folder(tmp_path / "both" / "2-gpu", mha, 2)
    refused(tmp_path / "both", tmp_path, "1-gpu, 2-gpu; give the path of one")
    with pytest.raises(PorttoolError, match=r"no config\.ini here.*FasterTransformer 4"):
        open_folder(tmp_path / "both" / "2-gpu" / "x")


@pytest.mark.parametrize("place", ["", "1-gpu"])
def test_a_folder_of_fastertransformer_4_is_told_what_to_add(tmp_path, mha, registry, place):
    """It holds arrays alone, as its converter of OpenAI's files writes them."""
    (write_folder(tmp_path / "c-model" / "1-gpu", mha, 1) / "config.ini").unlink()
    source = tmp_path / "c-model" / place
    converter = choose_converter(registry, source)
    assert converter.name == "gpt2/fastertransformer"
    with pytest.raises(SourceError, match=r"FasterTransformer 4 wrote none: write a section \[gpt"):
        converter.open(source)


def test_an_unfused_folder_is_known_by_its_name(tmp_path, mha, monkeypatch):
    """Its files have the bytes of a fused one; one that is named `.` has a name, too."""
    folder = write_folder(tmp_path / "1-gpu", mha, 1).rename(tmp_path / "unfusedQKV-1-gpu")
    refused(folder, tmp_path, "queries, keys and values apart, by its name")
    monkeypatch.chdir(folder)
    refused(Path(), tmp_path, "queries, keys and values apart, by its name")


def test_what_the_layout_cannot_express_is_refused(tmp_path, checkpoint):
    with pytest.raises(UsageError, match=r"3 heads .* over 2 ranks: choose another --tp"):
        export(checkpoint, tmp_path / "out", tp=2)
    checkpoint = tiny.Checkpoint.open(checkpoint.path)
    checkpoint.config = checkpoint.config.model_copy(update={"norm": "rmsnorm", "n_kv_head": 2})
    with pytest.raises(UsageError, match="cannot express grouped key heads and RMSNorm"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, checkpoint, capsys, monkeypatch):
    arguments = ["export", str(checkpoint.path), "--format", "fastertransformer", "--tp", "3",
                 "--output", str(tmp_path / "out")]  # fmt: skip
    assert run_cli(arguments) == 0
    assert "3-gpu" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr("porttool.api.open_checkpoint", None)  # it hashes every file
        assert run_cli(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    for disabled, status in (("gpt2", 1), ("santacoder", 0)):
        monkeypatch.setenv("PORTTOOL_DISABLE_PLUGINS", disabled)
        assert run_cli([*arguments[:-1], str(tmp_path / "again")]) == status
        assert (tmp_path / "again").exists() is (status == 0)
        assert ("was converted by 'gpt2'" in capsys.readouterr().err) is (status == 1)
    assert open_folder(tmp_path / "out").config == checkpoint.config
