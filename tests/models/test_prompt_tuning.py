"""Prompt tables from every source, and used: against PEFT's own forward, and against a formula."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import nemo_writer as nemo
import tiny
from porttool import api
from porttool.cli import invoke as run_cli
from porttool.config import Sampling
from porttool.engine import Engine
from porttool.errors import CheckpointError, PorttoolError, UsageError
from porttool.evaluators.virtual import VirtualTokens
from porttool.generate import generate
from porttool.plugins import choose_converter
from porttool.prompt_table import PromptTable, use_table
from porttool.runner import load_runner
from porttool.testing import REFERENCE, widened
from porttool.testing.reference import transformers_model
from porttool_camel5b.conformance import Camel5bConformance
from porttool_gpt_next.conformance import NemoConformance
from porttool_santacoder.conformance import SantaCoderConformance
from tiny import PROMPTS, full_logits

D = tiny.SHAPE["n_embd"]
V = tiny.SHAPE["vocab_size"]


def drawn(rows, width=D, seed=0):
    generator = torch.Generator().manual_seed(seed + rows)
    return torch.randn(rows, width, generator=generator) * 0.2


TABLES = {"email": drawn(5), "squad.v2": drawn(3), "boolq": drawn(7)}


def add_member(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_nemo(path, tree, templates=None, *, mode="w", weights="./model_weights.ckpt", **config):
    """Write a prompt-learning archive: NeMo's YAML is JSON here, which is YAML."""
    if templates is None:
        templates = [{"taskname": name, "total_virtual_tokens": len(table),
                      "prompt_template": "<|VIRTUAL_PROMPT_0|> {text}"}
                     for name, table in TABLES.items()]  # fmt: skip
    yaml = {"virtual_prompt_style": "p-tuning", "task_templates": templates, **config}
    saved = io.BytesIO()
    torch.save(tree, saved)
    with tarfile.open(path, mode) as tar:
        add_member(tar, "./model_config.yaml", json.dumps(yaml).encode())
        add_member(tar, weights, saved.getvalue())
    return path


def nested(tables, **beside):
    entries = {}
    for name, table in tables.items():
        entries[f"prompt_table.{name}.prompt_embeddings.weight"] = table
        entries[f"prompt_table.{name}.indices"] = torch.arange(len(table))
    return {"prompt_table": entries, **beside}


def flat(tables):
    return {f"prompt_table.{k}": v for k, v in nested(tables)["prompt_table"].items()}


def encoder():
    return {"embeddings": {"weight": drawn(5)},
            "tpmlp": {"first.weight": drawn(8), "first.bias": torch.ones(8),
                      "second.weight": drawn(D, 8), "second.bias": torch.ones(D)}}  # fmt: skip


def made(source, tmp_path, **options):
    table = api.convert_prompts(source, tmp_path / "table", **options)
    assert isinstance(table, PromptTable)
    return table


def refused(source, tmp_path, message, **options):
    with pytest.raises(PorttoolError, match=message):
        api.convert_prompts(source, tmp_path / "table", model="prompt_tuning", **options)
    assert not (tmp_path / "table").exists()


ARCHIVES = {
    "nested": lambda path: write_nemo(path, nested(TABLES)),
    "flat": lambda path: write_nemo(path, flat(TABLES)),
    "gzipped": lambda path: write_nemo(path, nested(TABLES), mode="w:gz"),
    "tensor_parallel": lambda path: write_nemo(
        path, nested(TABLES), weights="./mp_rank_00/model_weights.ckpt"
    ),
    "pipeline": lambda path: write_nemo(
        path, nested(TABLES), weights="./tp_rank_00_pp_rank_000/model_weights.ckpt"
    ),
    "with_encoder": lambda path: write_nemo(path, nested(TABLES, **encoder())),
}


@pytest.mark.parametrize("write", ARCHIVES.values(), ids=ARCHIVES)
def test_nemo_archives_of_every_layout(tmp_path, write):
    table = made(write(tmp_path / "prompts.nemo"), tmp_path)
    assert table.config.tasks == tuple(TABLES)
    assert table.config.lengths == (5, 3, 7)
    assert table.tensor().equal(torch.cat(list(TABLES.values())))
    assert (table.rows("squad.v2"), table.rows("2")) == (range(5, 8), range(8, 15))


def test_nemo_since_1_17_keeps_one_task(tmp_path):
    tree = nested({"boolq": TABLES["boolq"].half()}, **encoder())
    table = made(write_nemo(tmp_path / "p.nemo", tree), tmp_path, model="prompt_tuning")
    assert (table.config.tasks, table.config.dtype) == (("boolq",), "float16")
    wide = api.convert_prompts(tmp_path / "p.nemo", tmp_path / "wide", dtype="float32")
    assert wide.tensor().equal(TABLES["boolq"].half().float())


def test_nemo_adapters_and_unpacked_folders(tmp_path):
    key = "model.embedding.adapter_layer.ptuning_adapter.inference_table"
    archive = write_nemo(tmp_path / "p.nemo", {key: TABLES["email"]})
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "folder", filter="data")
    table = made(tmp_path / "folder", tmp_path)
    assert (table.config.tasks, table.config.lengths) == (("email",), (5,))


def test_nemo_since_1_19_says_it_in_the_models_yaml(tmp_path):
    section = {"virtual_tokens": 5, "bottleneck_dim": 1024, "embedding_dim": 1024, "init_std": 0.02}
    values = {
        **nemo.GPT_2B,
        "nemo_version": "1.20.0",
        "restore_from_path": "/base.nemo",
        "peft": {"peft_scheme": "ptuning", "restore_from_path": None, "p_tuning": section},
    }
    adapter = "model.language_model.adapter_layer.ptuning_adapter"
    tree = {f"{adapter}.inference_table": TABLES["email"], f"{adapter}.mlp_head.0.bias": drawn(2)}
    members = {"model_config.yaml": json.dumps(values).encode(),
               "model_weights.ckpt": nemo.saved(tree)}  # fmt: skip
    source = nemo.pack(tmp_path / "p.nemo", members, "tar")
    table = made(source, tmp_path)
    assert (table.config.tasks, table.config.lengths) == (("prompt",), (5,))
    section["virtual_tokens"] = 6
    members["model_config.yaml"] = json.dumps(values).encode()
    refused(nemo.pack(tmp_path / "q.nemo", members, "tar"), tmp_path / "q", "says 6 virtual tokens")


@pytest.mark.parametrize(
    ("tree", "config", "message"),
    [(nested({**TABLES, "boolq": torch.zeros(7, D)}), {}, "'boolq' is all zeros"),
     (nested({**TABLES, "boolq": drawn(7, 8)}), {}, "differ in width"),
     (nested({**TABLES, "boolq": drawn(6)}), {}, "says 7 virtual tokens for 'boolq'.*has 6"),
     (nested({**TABLES, "other": drawn(6)}), {}, "no task_templates for other"),
     (nested({**TABLES, "boolq": drawn(7) / 0}), {}, "'boolq'.*NaN or infinity"),
     (nested(TABLES, layers=torch.ones(3)), {}, "holds layers; only archives"),
     ({**nested(TABLES), **nested(TABLES)["prompt_table"]}, {}, "two tables for one task"),
     ({f"{part}.adapter_layer.ptuning_adapter.inference_table": drawn(5) for part in "ab"}, {},
      "two tables for one task: a.adapter.*, b.adapter"),
     ({"model": torch.ones(3)}, {}, "holds no prompt table"),
     (encoder(), {}, "holds no prompt table"), ([1], {}, "holds list"),
     (nested(TABLES), {"templates": "x"}, "should be a list")],
)  # fmt: skip
def test_bad_archives_are_refused(tmp_path, tree, config, message):
    refused(write_nemo(tmp_path / "p.nemo", tree, **config), tmp_path, message)


def test_hostile_and_foreign_archives_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("never shown",)

    refused(write_nemo(tmp_path / "p.nemo", Evil()), tmp_path, "wants more than tensors")
    path = write_nemo(tmp_path / "q.nemo", nested(TABLES), weights="../model_weights.ckpt")
    refused(path, tmp_path, "leads outside")
    path = write_nemo(tmp_path / "r.nemo", nested(TABLES), weights="./other.ckpt")
    refused(path, tmp_path, r"no model_weights\.ckpt")
    with tarfile.open(tmp_path / "s.nemo", "w") as tar:
        add_member(tar, "model_config.yaml", b"num_layers: 2\n")
    refused(tmp_path / "s.nemo", tmp_path, "not a source of 'prompt_tuning'")


def test_the_wrong_family_names_the_right_one(tmp_path, source, registry):
    archive = write_nemo(tmp_path / "p.nemo", nested(TABLES))
    with pytest.raises(UsageError, match=r"not a source of 'gpt_next'.*looks like prompt_tuning"):
        choose_converter(registry, archive, "gpt_next")
    refused(source, tmp_path, r"not a source of 'prompt_tuning'.*looks like gpt2")


def write_adapter(folder, table, *, file="adapter_model.safetensors", **changes):
    folder.mkdir(parents=True)
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 5,
              "token_dim": D, "num_transformer_submodules": 1, "num_layers": 3,
              "prompt_tuning_init": "RANDOM", **changes}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"prompt_embeddings": table}
    if file.endswith(".safetensors"):
        save_file(tensors, folder / file)
    else:
        torch.save(tensors, folder / file)
    return folder


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_peft_adapters(tmp_path, file):
    table = made(write_adapter(tmp_path / "mood", TABLES["email"], file=file), tmp_path)
    assert (table.config.tasks, table.tensor().equal(TABLES["email"])) == (("mood",), True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"peft_type": "PREFIX_TUNING"}, "'PREFIX_TUNING' is another kind of adapter"),
     ({"peft_type": "LORA"}, r"'LORA' is .*merge_and_unload\(\)"),
     ({"token_dim": 8}, r"says \[5, 8\].*\[5, 24\]"),
     ({"num_virtual_tokens": 4}, r"says \[4, 24\]"), ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
     ({"num_transformer_submodules": 2}, "two models")],
)  # fmt: skip
def test_other_adapters_are_refused(tmp_path, changes, message):
    refused(write_adapter(tmp_path / "a", TABLES["email"], **changes), tmp_path, message)


def test_an_adapter_on_the_hub(tmp_path, monkeypatch, capsys):
    """Its folder in the hub's cache is called by a commit."""
    folder = tmp_path / "models--owner--mood" / "snapshots" / "0123abc"
    write_adapter(folder, TABLES["email"])
    monkeypatch.setattr("porttool.hub.fetch", lambda name: folder if name == "owner/mood" else None)
    for i, told in enumerate(([], ["--model", "prompt_tuning"])):
        assert run_cli(["convert", "owner/mood", "-o", str(tmp_path / str(i)), *told]) == 0
        assert "task 0: mood, " in capsys.readouterr().out


def test_adapters_below_a_folder_are_named(tmp_path, capsys):
    write_adapter(tmp_path / "run" / "checkpoint-500", TABLES["email"])
    assert run_cli(["convert", str(tmp_path / "run"), "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"name one that lies in it, {tmp_path}/run/checkpoint-500 (prompt_tuning/peft)" in said


def test_arrays_of_the_ancestor(tmp_path):
    stacked = np.zeros((3, 7, D), np.float32)
    for row, table in zip(stacked, TABLES.values(), strict=True):
        row[: len(table)] = table.numpy()
    np.save(tmp_path / "email_composition.npy", stacked)
    source = tmp_path / "email_composition.npy"
    table = made(source, tmp_path)
    assert (table.config.tasks, table.config.lengths) == (("0", "1", "2"), (5, 3, 7))
    assert table.tensor().equal(torch.cat(list(TABLES.values())))
    named = api.convert_prompts(source, tmp_path / "named", options={"tasks": list(TABLES)})
    assert named.config.tasks == tuple(TABLES)
    shutil.rmtree(tmp_path / "table")
    refused(source, tmp_path, "3 tasks, but the names", options={"tasks": ["a"]})
    np.save(source, np.array([{"a": 1}]), allow_pickle=True)
    refused(source, tmp_path, "not an array of numbers.*objects are never read")
    np.save(source, np.zeros((2, 3, D), np.float32))
    refused(source, tmp_path, "'0' is all zeros")
    np.save(source, np.zeros((2, 3, D), np.int64))
    refused(source, tmp_path, "should be numbers")
    np.save(source, stacked)
    source.write_bytes(source.read_bytes()[:-9])
    refused(source, tmp_path, "not an array of numbers")


# ---- using a table --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    source = write_nemo(folder / "p.nemo", nested({k: t.double() for k, t in TABLES.items()}))
    return api.convert_prompts(source, folder / "table")


@pytest.fixture(scope="module")
def roomy(tmp_path_factory, checkpoint):
    """The tiny GPT-2 as a float64 engine with room for a table."""
    limits = tiny.choose_limits(checkpoint.config, max_batch_size=4, max_prompt_rows=15)
    output = tmp_path_factory.mktemp("engine") / "gpt2"
    return tiny.built(checkpoint, output, dtype="float64", limits=limits).path


def by_formula(model, rows, ids):
    """The model on [rows; wte(ids)]: what virtual tokens are."""
    embedded = torch.cat([rows.double(), model.transformer.wte.weight[ids]])
    with torch.inference_mode():
        return model(inputs_embeds=embedded[None]).logits[0]


def test_several_tasks_in_one_batch_equal_the_formula(reference, roomy, table, registry):
    runner = tiny.loaded(roomy, registry)
    tasks = ["email", "2", "squad.v2", "boolq"]
    rows = [TABLES[t] for t in ("email", "boolq", "squad.v2", "boolq")]
    prompts = use_table(table, runner, PROMPTS, tasks)
    for prompt, own, ids in zip(prompts, rows, PROMPTS, strict=True):
        expected = by_formula(reference, own, ids)
        torch.testing.assert_close(full_logits(runner, prompt), expected, atol=1e-9, rtol=0)
    sampling = Sampling(max_new_tokens=4, ignore_eos=True)
    batch = [c[0].tokens for c in generate(runner, prompts, sampling, eos=())]
    alone = [generate(runner, [p], sampling, eos=())[0][0].tokens for p in prompts]
    assert batch == alone
    first = [int(by_formula(reference, own, ids)[-1].argmax())
             for own, ids in zip(rows, PROMPTS, strict=True)]  # fmt: skip
    assert [tokens[0] for tokens in batch] == first


@pytest.mark.parametrize("case", [Camel5bConformance, SantaCoderConformance, NemoConformance])
def test_other_families_take_virtual_tokens(tmp_path, registry, case):
    """Other positions, heads, norms: transformers gets [rows; embeddings] of the same weights."""
    case().write_source(tmp_path / "source", 0)
    checkpoint = tiny.converted(tmp_path / "source", tmp_path / "checkpoint")
    limits = tiny.choose_limits(checkpoint.config, max_prompt_rows=5)
    engine = tiny.built(checkpoint, tmp_path / "engine", dtype="float64", limits=limits)
    runner = tiny.loaded(engine.path, registry)
    rows = drawn(5, checkpoint.config.d_model)
    table = made(write_adapter(tmp_path / "a", rows, token_dim=rows.shape[1]), tmp_path)
    prompts = use_table(table, runner, PROMPTS[:2], ["0"])
    model = transformers_model(tmp_path / REFERENCE)
    for ids, prompt in zip(PROMPTS, prompts, strict=False):
        with widened(), torch.inference_mode():
            embedded = torch.cat([rows.double(), model.get_input_embeddings().weight[ids]])
            expected = model(inputs_embeds=embedded[None]).logits[0]
        torch.testing.assert_close(full_logits(runner, prompt), expected, atol=1e-9, rtol=0)


def test_virtual_ids_by_hand(table):
    by_task = [V + row for row in table.rows("squad.v2")]
    assert table.prompt([4, 5], "squad.v2", V) == [*by_task, 4, 5]
    assert table.prompt([V, 4, V + 2], "squad.v2", V) == [by_task[0], 4, by_task[2]]
    assert table.prompt([V + 14, 4], None, V) == [V + 14, 4]
    with pytest.raises(UsageError, match=r"token 3, but the task .squad.v2. has 3"):
        table.prompt([V + 3], "squad.v2", V)
    with pytest.raises(UsageError, match="virtual token 15, but the table has 15"):
        table.prompt([V + 15], None, V)
    for task in ("3", "-1", "Email", ""):
        with pytest.raises(UsageError, match=r"no task.*0: email, 1: squad.v2, 2: boolq"):
            table.prompt([4], task, V)


@pytest.fixture(scope="module")
def onnx_roomy(tmp_path_factory, checkpoint):
    pytest.importorskip("onnxruntime")
    limits = tiny.choose_limits(checkpoint.config, max_batch_size=4, max_prompt_rows=15)
    output = tmp_path_factory.mktemp("engine") / "onnx"
    options = {"kind": "onnx", "dtype": "float32", "limits": limits}
    return tiny.built(checkpoint, output, **options).path


def test_an_onnx_engine_takes_the_same_table(reference, onnx_roomy, table, registry):
    runner = load_runner(Engine.open(onnx_roomy, registry), registry)
    prompts = use_table(table, runner, PROMPTS, ["email"])
    for prompt, ids in zip(prompts, PROMPTS, strict=True):
        expected = by_formula(reference, TABLES["email"], ids).float()
        torch.testing.assert_close(full_logits(runner, prompt), expected, atol=2e-4, rtol=0)
    with pytest.raises(UsageError, match=f"holds the id {V + 15}"):
        generate(runner, [[V + 15]], Sampling(max_new_tokens=1), eos=())


def test_an_id_without_a_row_is_never_run(roomy, table, registry):
    runner = tiny.loaded(roomy, registry)
    sampling = Sampling(max_new_tokens=1)
    with pytest.raises(UsageError, match=f"holds the id {V}"):
        generate(runner, [[V]], sampling, eos=())
    runner.load_prompt_table(table.tensor()[:4])
    generate(runner, [[V + 3]], sampling, eos=())
    with pytest.raises(UsageError, match=f"holds the id {V + 4}"):
        generate(runner, [[V + 4]], sampling, eos=())


def test_a_table_that_does_not_fit_is_refused(tmp_path, roomy, engine_folder, table, registry):
    other = made(write_adapter(tmp_path / "a", drawn(5, 32), token_dim=32), tmp_path)
    with pytest.raises(UsageError, match="are 32 wide, the model's tokens 24"):
        use_table(other, tiny.loaded(roomy, registry), PROMPTS, ["0"])
    with pytest.raises(UsageError, match="15 rows, the engine has room for 0"):
        use_table(table, tiny.loaded(engine_folder, registry), PROMPTS, ["0"])
    with pytest.raises(UsageError, match="2 tasks for 4 prompts"):
        use_table(table, tiny.loaded(roomy, registry), PROMPTS, ["0", "1"])


def test_an_altered_table_is_not_opened(tmp_path, table):
    copy = shutil.copytree(table.path, tmp_path / "copy")
    weights = copy / "prompt_table.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256"):
        PromptTable.open(copy)
    weights.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        PromptTable.open(copy)
    with pytest.raises(UsageError, match=r"no prompt_table\.json here.*copy is: name that"):
        PromptTable.open(tmp_path)
    (copy / "prompt_table.json").unlink()
    with pytest.raises(CheckpointError, match=r"no prompt_table\.json"):
        PromptTable.open(tmp_path)


def test_the_commands(tmp_path, roomy, capsys):
    source = write_nemo(tmp_path / "p.nemo", nested(TABLES))
    folder = str(tmp_path / "table")
    convert = ["convert", str(source), "--model", "prompt_tuning"]
    assert run_cli(convert) == 2
    assert run_cli([*convert, "--output", folder]) == 0
    assert "task 1: squad.v2, 3 tokens" in capsys.readouterr().out
    assert run_cli(["inspect", folder]) == run_cli(["inspect", str(source)]) == 0
    shown = capsys.readouterr().out
    assert "porttool prompt table" in shown
    assert "prompt_tuning/nemo" in shown
    (tmp_path / "ids.csv").write_text("5,9,2\n7\n")
    (tmp_path / "virtual.csv").write_text(f"{V},{V + 1},{V + 2},{V + 3},{V + 4},5,9,2\n")

    def run(file, *arguments):
        code = run_cli(["run", str(roomy), "--input-tokens", str(tmp_path / file), *arguments,
                        "--max-output-len", "3", "--ignore-eos", "--set", "device", "cpu",
                        "--output-csv", str(tmp_path / "out.csv")])  # fmt: skip
        if code:
            return capsys.readouterr().err
        lines = (tmp_path / "out.csv").read_text().split()
        return [[int(i) for i in line.split(",")] for line in lines]

    both = run("ids.csv", "--prompt-table", folder, "--task", "email", "--task", "boolq")
    assert both == run("ids.csv", "--prompt-table", folder, "--tasks", "0,2")
    assert both[0][:5] == [V, V + 1, V + 2, V + 3, V + 4]
    assert both[:1] == run("virtual.csv", "--prompt-table", folder)
    assert both[:1] == run("virtual.csv", "--prompt-table", folder, "--tasks", "0")
    assert "need --prompt-table" in run("virtual.csv")
    assert "need --prompt-table" in run("ids.csv", "--task", "email")
    assert "nothing: no prompt holds one of its virtual tokens" in run(
        "ids.csv", "--prompt-table", folder
    )
    assert "no task 'mail'" in run("ids.csv", "--prompt-table", folder, "--task", "mail")


def test_a_table_of_no_numbers_is_converted_where_that_is_allowed(tmp_path, capsys):
    tables = {**TABLES, "boolq": drawn(7) / 0}
    source = write_nemo(tmp_path / "p.nemo", nested(tables))
    convert = ["convert", str(source), "--output", str(tmp_path / "table")]
    assert run_cli(convert) == 1
    assert "--allow-nonfinite` takes it all the same" in " ".join(capsys.readouterr().err.split())
    assert run_cli([*convert, "--allow-nonfinite"]) == 0
    found = PromptTable.open(tmp_path / "table").tensor()
    assert found.equal(torch.cat(list(tables.values())))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_compressed_archive_says_what_it_costs(tmp_path, roomy, source, capsys, mode):
    archive = write_nemo(tmp_path / "p.nemo", nested(TABLES), mode=mode)
    convert = ["convert", str(archive), "--output", str(tmp_path / "table")]
    verify = ["verify", str(roomy), "--hf-model", str(source), "--set", "prompt_len", "6",
              "--set", "new_tokens", "2", "--prompt-table", str(tmp_path / "table")]  # fmt: skip
    for command in (["inspect", str(archive)], convert, verify):
        assert run_cli(command) == 0
        said = capsys.readouterr().err.count("p.nemo is compressed: one pass finds its tables")
        assert said == (mode == "w:gz")
    assert run_cli(convert) == 2
    said = capsys.readouterr().err
    assert "table exists already (a finished prompt table of " in said
    assert "is compressed" not in said


needs_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs peft")


def tuned(reference, kind="prompt"):
    """PEFT's model of six virtual tokens around the reference, its encoder redrawn, in float64."""
    import copy

    from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model

    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 6}
    config = PromptTuningConfig(**common)
    if kind != "prompt":
        config = PromptEncoderConfig(
            **common, encoder_reparameterization_type=kind, encoder_hidden_size=12
        )
    model = get_peft_model(copy.deepcopy(reference), config).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def test_the_proof_knows_tasks_by_their_names(tmp_path):
    rows = {"a": torch.ones(2, 4), "b": torch.zeros(2, 4) + 2}
    templates = [{"taskname": task, "total_virtual_tokens": 2} for task in rows]
    table = made(write_nemo(tmp_path / "p.nemo", nested(rows), templates), tmp_path)
    for taught, passed in ((rows, True), (dict(zip("ba", rows.values(), strict=True)), False)):
        verdict = VirtualTokens(table, taught, 10).judge()
        assert (verdict.passed, verdict.detail) == (
            passed,
            "tasks a, b, should be b, a" * (not passed),
        )


def test_tasks_that_were_named_at_conversion_are_proved(tmp_path, roomy, source):
    """An array has no names: the table's manifest keeps those that it was told."""
    np.save(tmp_path / "p.npy", drawn(4).reshape(2, 2, D).numpy())
    table = str(tmp_path / "table")
    named = ["--set", "tasks", '["news", "mail"]']
    assert run_cli(["convert", str(tmp_path / "p.npy"), "--output", table, *named]) == 0
    verify = ["verify", str(roomy), "--hf-model", str(source), "--prompt-table", table]
    assert run_cli([*verify, "--set", "prompt_len", "6", "--set", "new_tokens", "2"]) == 0


def peft_logits(model, ids):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0]


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["prompt", "MLP", "LSTM"])
def test_logits_equal_pefts_own_forward(tmp_path, reference, roomy, registry, kind):
    model = tuned(reference, kind)
    model.save_pretrained(tmp_path / "adapter")
    runner = tiny.loaded(roomy, registry)
    table = made(tmp_path / "adapter", tmp_path)
    assert table.config.dtype == "float64"
    for ids, prompt in zip(PROMPTS, use_table(table, runner, PROMPTS, ["adapter"]), strict=True):
        expected = peft_logits(model, ids)
        torch.testing.assert_close(full_logits(runner, prompt), expected, atol=1e-9, rtol=0)


def save_as_nemo(folder, rows):
    template = {"taskname": "adapter", "total_virtual_tokens": len(rows)}
    return write_nemo(folder / "p.nemo", nested({"adapter": rows}), [template])


def save_as_array(folder, rows):
    np.save(folder / "p.npy", rows.numpy()[None])
    return folder / "p.npy"


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("save", [None, save_as_nemo, save_as_array], ids=["peft", "nemo", "npy"])
def test_every_source_by_the_commands_equals_peft(tmp_path, monkeypatch, reference, source, save):
    """The model and the table converted, built and run: every logit of every step is PEFT's."""
    model = tuned(reference, "MLP")
    model.save_pretrained(tmp_path / "adapter")
    rows = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]
    prompts = save(tmp_path, rows) if save else tmp_path / "adapter"
    (tmp_path / "ids.csv").write_text("5,9,2\n7\n")

    monkeypatch.chdir(tmp_path)
    for command in (
        f"convert {source} --output checkpoint",
        "build checkpoint --output engine --dtype float64 --max-prompt-embedding-table-size 6",
        f"convert {prompts} --model prompt_tuning --output table",
        "run engine --input-tokens ids.csv --prompt-table table --task 0 --max-output-len 4 "
        "--ignore-eos --set device cpu --output-csv out.csv --output-logits-npy logits.npy",
    ):
        assert run_cli(command.split()) == 0
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))  # [prompts, new tokens, vocab_size]
    for line, logits in zip((tmp_path / "out.csv").read_text().split(), found, strict=True):
        ids = [int(i) for i in line.split(",")][6:]
        expected = peft_logits(model, ids)[-5:-1].float()
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)
        assert ids[-4:] == expected.argmax(-1).tolist()
