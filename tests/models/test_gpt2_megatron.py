"""Megatron-LM's checkpoints of every version, made of transformers' weights."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch

import tiny
from megatron_writer import arguments, as_saved, layer_of, model_tree, padded_rows, write_source
from porttool.cli import invoke
from porttool.converter import convert
from porttool.errors import PorttoolError
from porttool.plugins import choose_converter

ASKED = {"n_head": 3, "vocab_size": 67}
CORE = {
    "attention.query_key_value": "self_attention.linear_qkv",
    "attention.dense": "self_attention.linear_proj", "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2", "post_attention_layernorm": "pre_mlp_layernorm",
}  # fmt: skip


def converted(source, output, **options):
    registry = tiny.load_registry()
    converter = choose_converter(registry, source, None, options)
    assert converter.name == "gpt2/megatron"
    plugin = registry.record(registry.converters, converter.name)
    return convert(converter, source, output, plugin=plugin)


def assert_ported(source, tmp_path, model, **options):
    checkpoint = converted(source, tmp_path / "checkpoint", **options)
    tiny.assert_same(tiny.in_float64(checkpoint, tmp_path), model)
    return checkpoint


def refused(source, tmp_path, message, **options):
    with pytest.raises(PorttoolError, match=message):
        converted(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def model():
    """Its numbers divide by 2 and by 4, as ranks want them."""
    return tiny.gpt2(n_embd=32, n_head=4, n_layer=4)


FORMS = {
    "345M": {"version": 0, "zipped": False},
    "v0_tp2": {"version": 0, "tp": 2},
    "v1": {"version": 1, "iteration": "iter_0005000"},
    "v1_tp2": {"version": 1, "tp": 2, "zipped": False},
    "v2_tp4": {"version": 2, "tp": 4},
    "v2_tp2_pp2": {"version": 2, "tp": 2, "pp": 2, "name": "mp_rank_{:02}_{:03}"},
    "v3_pp2": {"version": 3, "pp": 2, "name": "tp_rank_{:02}_pp_rank_{:03}"},
    "v3": {"version": 3},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_version_and_division(tmp_path, model, form):
    source = write_source(tmp_path / "megatron", model, **form)
    options = {"vocab_size": 67} | ({} if form["version"] else {"n_head": 4})
    checkpoint = assert_ported(source, tmp_path, model, **options)
    assert checkpoint.config.vocab_size == 67
    assert checkpoint.manifest.source.options == options


def test_megatron_core_names(tmp_path, model):
    tree = {"decoder." + n: t for i in range(4) for n, t in (
        (f"layers.{i}.{k}", t) for k, t in layer_of(model, i, 1, 0, 3).items())}  # fmt: skip
    for old, new in CORE.items():
        tree = {n.replace(old, new): t for n, t in tree.items()}
    tree |= {f"decoder.final_layernorm.{k}": getattr(model.transformer.ln_f, k)
             for k in ("weight", "bias")}  # fmt: skip
    tree["embedding.word_embeddings.weight"] = padded_rows(model, 1, 0)
    tree["embedding.position_embeddings.weight"] = model.transformer.wpe.weight
    saved = as_saved(tree) | {"decoder.layers.0.self_attention._extra_state": None}
    file = tmp_path / "model_optim_rng.pt"
    args = arguments(model, 1, 1)
    torch.save({"model": saved, "checkpoint_version": 3.0, "args": args}, file)
    assert_ported(file, tmp_path, model, vocab_size=67)


def test_names_of_late_2023(tmp_path, model):
    """Megatron-LM's own layers, when their norms need not be LayerNorm any more."""
    late = {"input_layernorm": "input_norm", "post_attention_layernorm": "post_attention_norm",
            "final_layernorm": "final_norm"}  # fmt: skip
    tree = model_tree(model, 3, 1, 0, 1, 0)
    layers = tree["language_model"]["encoder"]
    for old, new in late.items():
        layers = {n.replace(old, new): t for n, t in layers.items()}
    tree["language_model"]["encoder"] = layers
    file = tmp_path / "model_optim_rng.pt"
    args = arguments(model, 1, 1, layernorm_epsilon=None, norm_epsilon=1e-5)
    torch.save({"model": tree, "checkpoint_version": 3.0, "args": args}, file)
    assert_ported(file, tmp_path, model, vocab_size=67)


@pytest.mark.parametrize("epsilon", ["layernorm_epsilon", "norm_epsilon"])  # of 2019, of 2023
def test_untied_and_exact_gelu(tmp_path, epsilon):
    model = tiny.gpt2(n_embd=32, n_head=4, n_layer=1, activation_function="gelu",
                      tie_word_embeddings=False, layer_norm_epsilon=0.3)  # fmt: skip
    changes = {"bias_gelu_fusion": False, "untie_embeddings_and_output_weights": True,
               "layernorm_epsilon": None, epsilon: 0.3}  # fmt: skip
    tree = model_tree(model, 3, 1, 0, 1, 0)
    tree["language_model"]["output_layer"] = {"weight": model.lm_head.weight.float().clone()}
    file = tmp_path / "model_optim_rng.pt"
    args = arguments(model, 1, 1, **changes)
    torch.save({"model": tree, "checkpoint_version": 3.0, "args": args}, file)
    assert_ported(file, tmp_path, model, vocab_size=67)


@pytest.mark.parametrize("prefix", ["", "gpt2-"])
def test_the_tokenizer_gives_the_ids(tmp_path, monkeypatch, model, prefix):
    """Megatron-LM has its files fetched as gpt2-vocab.json and gpt2-merges.txt."""
    source = write_source(tmp_path / "megatron", model, version=2)
    (tmp_path / "bpe").mkdir()
    vocabulary = ", ".join(f'"t{i}": {i}' for i in range(66)) + ', "<|endoftext|>": 66'
    (tmp_path / "bpe" / f"{prefix}vocab.json").write_text("{" + vocabulary + "}")
    (tmp_path / "bpe" / f"{prefix}merges.txt").write_text("#version: 0.2\n")
    monkeypatch.chdir(tmp_path)
    made = converted(source, tmp_path / "checkpoint", tokenizer="bpe")
    assert made.manifest.source.options == {"tokenizer": str(tmp_path / "bpe")}
    assert (made.config.vocab_size, made.manifest.tokens.eos) == (67, (66,))
    assert (made.tokenizer / "merges.txt").is_file()


def test_what_a_file_cannot_tell_is_asked_for(tmp_path, model):
    source = write_source(tmp_path / "megatron", model)
    refused(source, tmp_path, "say how many heads.*--n-head.*; nor how many ids .*--vocab-size")
    output = str(tmp_path / "made")
    assert invoke(["convert", str(source), "--model", "gpt2/megatron", "-o", output]) == 2
    refused(source, tmp_path, r"model_optim_rng\.pt: does not say how many heads", vocab_size=67)
    refused(source, tmp_path, "72 rows.*--vocab-size.*tokenizer", n_head=4)
    refused(source, tmp_path, "72 rows, fewer than the 80 ids", n_head=4, vocab_size=80)
    refused(source, tmp_path, "72 rows, fewer than the 80 ids", vocab_size=80)
    refused(source, tmp_path, "32 is not a multiple of 5", n_head=5, vocab_size=67)
    refused(source, tmp_path, "32 is not a multiple of 5", n_head=5)
    refused(source, tmp_path, "options are: n_head, vocab_size", n_heads=4)
    known = write_source(tmp_path / "known", model, version=2)
    refused(known, tmp_path, "has 4 heads, not the 8 of --n-head", n_head=8, vocab_size=67)


def test_what_a_file_cannot_tell_is_inspected_all_the_same(tmp_path, model, capsys):
    def inspected(source, *told):
        assert invoke(["inspect", str(source), "--json", *told]) == 0
        return json.loads(capsys.readouterr().out)

    old, new = (write_source(tmp_path / f"v{v}", model, version=v) for v in (0, 3))
    whole = inspected(old, "--n-head", "4", "--vocab-size", "67")
    assert (whole["config"]["n_head"], whole["config"]["vocab_size"]) == (4, 67)
    assert whole["config"] == inspected(new, "--set", "vocab_size", "67")["config"]
    for source, told, missing in (
        (old, (), ("n_head", "vocab_size")), (old, ("--vocab-size", "67"), ("n_head",)),
        (old, ("--n-head", "4"), ("vocab_size",)), (new, (), ("vocab_size",)),
    ):  # fmt: skip
        found = inspected(source, *told)
        assert found["is"] == "source of gpt2/megatron: Megatron-LM checkpoint"
        assert {k: found[k] for k in ("tensors", "bytes", "types")}.items() <= whole.items()
        assert found["config"].items() <= whole["config"].items()
        assert found["config"].keys() >= {"n_layer", "d_model", "n_positions", "activation"}
        assert not {*missing} & found["config"].keys()
        flags = ("--n-head", "--vocab-size")
        wanted = ["--" + name.replace("_", "-") for name in missing]
        assert [f for f in flags if f in found["missing"]] == wanted
    assert invoke(["inspect", str(old)]) == 0
    assert "does not say how many heads" in " ".join(capsys.readouterr().out.split())
    assert invoke(["inspect", str(new), "--set", "n_heads", "4"]) == 2
    assert "n_heads is unknown" in capsys.readouterr().err
    for told, why in (("--n-head", "5"), "not a multiple of 5"), (("--vocab-size", "80"), "80 ids"):
        assert invoke(["inspect", str(old), *told]) == 1
        assert why in " ".join(capsys.readouterr().err.split())
    made = converted(new, tmp_path / "made", vocab_size=67)
    assert invoke(["inspect", str(made.path), "--n-head", "4"]) == 2
    assert "is a checkpoint: --n-head would change nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_layers": 5}, "say 5 layers, the files hold 4"),
     ({"tensor_model_parallel_size": 2}, "2 tensor-parallel ranks.*tensor rank 1 of stage 0"),
     ({"pipeline_model_parallel_size": 2}, "in 2 pipeline stages.*tensor rank 0 of stage 1"),
     ({"normalization": "RMSNorm"}, "not of GPT-2's shape.*RMSNorm"),
     ({"num_experts": 8}, "not of GPT-2's shape.*num_experts"),
     ({"swiglu": True}, "not of GPT-2's shape.*swiglu")],
)  # fmt: skip
def test_arguments_that_disagree_are_refused(tmp_path, model, changes, message):
    args = arguments(model, 1, 1, **changes)
    source = write_source(tmp_path / "megatron", model, version=2, args=args)
    refused(source, tmp_path, message, vocab_size=67)


def test_a_missing_rank_is_named(tmp_path, model):
    source = write_source(tmp_path / "megatron", model, tp=4)
    shutil.rmtree(source / "release" / "mp_rank_02")
    refused(source, tmp_path, "tensor rank 2 of stage 0 are missing", **ASKED)
    refused(source / "release", tmp_path, "tensor rank 2 of stage 0 are missing", **ASKED)


def test_the_last_rank_is_missed_where_nothing_counts_them(tmp_path, model):
    asked = {"n_head": 4, "vocab_size": 30}
    source = write_source(tmp_path / "tensor", model, tp=2)
    shutil.rmtree(source / "release" / "mp_rank_01")
    refused(source, tmp_path, "hold 16 of the 32 columns.*tensor-parallel rank is miss", **asked)
    source = write_source(tmp_path / "stage", model, pp=2, name="mp_rank_{:02}_{:03}")
    shutil.rmtree(source / "release" / "mp_rank_00_001")
    refused(source, tmp_path, "the last pipeline stage is missing", **asked)


def test_a_distributed_checkpoint_is_refused_by_name(tmp_path):
    folder = tmp_path / "megatron" / "iter_0000009"
    folder.mkdir(parents=True)
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("9")
    for name in (".metadata", "metadata.json", "common.pt", "__0_0.distcp"):
        (folder / name).write_bytes(b"{}")
    refused(folder.parent, tmp_path, "metadata.json: of a distributed.*-convert-format torch")


def test_a_tracker_of_terabytes_is_not_read(tmp_path, model):
    tracker = write_source(tmp_path / "s", model) / "latest_checkpointed_iteration.txt"
    with tracker.open("ab") as file:
        file.truncate(1 << 40)
    refused(tracker.parent, tmp_path, "names no iteration")


def test_a_tracker_that_is_no_number(tmp_path, model):
    """A superscript is a digit to Python, and no number."""
    tracker = write_source(tmp_path / "s", model) / "latest_checkpointed_iteration.txt"
    tracker.write_text("²", encoding="utf-8")
    refused(tracker.parent, tmp_path, "names no iteration: '²'")


def test_files_of_other_kinds_are_refused(tmp_path, model):
    def save(tree, **options):
        torch.save(tree, tmp_path / "model.pt", **options)
        return tmp_path / "model.pt"

    refused(save([1]), tmp_path, "there is no 'model' in it", **ASKED)
    refused(save({"model": {"a": torch.ones(3)}}), tmp_path, "no embedding.weight in it", **ASKED)
    refused(save({"model0": {}, "model1": {}}), tmp_path, "interleaved", **ASKED)
    for zipped in (True, False):
        hostile = save({"model": Evil()}, _use_new_zipfile_serialization=zipped)
        refused(hostile, tmp_path, "its pickle wants more than tensors", **ASKED)
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"model": 1})[:-3])
    refused(tmp_path / "model.pt", tmp_path, "truncated or damaged|damaged or its pickle", **ASKED)
    tree = model_tree(model, 0, 1, 0, 1, 0)
    del tree["language_model"]["transformer"]["layers.2.mlp.dense_4h_to_h.bias"]
    options = {"n_head": 4, "vocab_size": 67}
    refused(save({"model": tree}), tmp_path, r"missing.*layers\.2\.mlp\.down\.bias", **options)
    tree["language_model"]["transformer"]["layers.2.mlp.extra.bias"] = torch.ones(3)
    tree["language_model"]["transformer"]["layers.2.mlp.dense_4h_to_h.bias"] = torch.ones(32)
    refused(save({"model": tree}), tmp_path, r"nothing accounts for.*mlp\.extra\.bias", **options)


class Evil:
    def __reduce__(self):
        return print, ("never shown",)


def test_enums_of_megatron_are_passed_over(tmp_path, model, monkeypatch):
    import enum
    import sys
    import types

    module = types.ModuleType("megatron.core.enums")
    monkeypatch.setitem(sys.modules, "megatron", types.ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.core", types.ModuleType("megatron.core"))
    monkeypatch.setitem(sys.modules, "megatron.core.enums", module)
    module.ModelType = enum.Enum("ModelType", "encoder_or_decoder", module="megatron.core.enums")
    args = arguments(model, 1, 1, model_type=module.ModelType.encoder_or_decoder)
    source = write_source(tmp_path / "megatron", model, version=3, args=args)
    monkeypatch.undo()
    assert_ported(source, tmp_path, model, vocab_size=67)
