"""The whole road as a user types it: convert, build, run, verify, summarize, on the demo model."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from porttool.cli import invoke

DEMO = Path(__file__).parent.parent / "examples" / "demo"
SOURCE = DEMO / "gpt2-news"
ARTICLES = DEMO / "articles.jsonl"
N_ARTICLES = "24"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A work folder with the demo model's checkpoint and engine, made by two commands."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORTTOOL_HOME", str(folder))
        assert invoke(["convert", str(SOURCE), "--model", "gpt2"]) == 0
        assert invoke(["build", "--model", "gpt2", "--max-batch-size", "4"]) == 0
    return folder


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.setenv("PORTTOOL_HOME", str(home))
    monkeypatch.setenv("COLUMNS", "200")
    return home


def summarize(*more):
    return invoke(["summarize", "--dataset", str(ARTICLES), "--max-articles", N_ARTICLES,
                   "--max-new-tokens", "40", *more])  # fmt: skip


def test_the_only_engine_needs_no_name(at_home, capsys):
    assert invoke(["run", "--input-text", "The storm", "--max-output-len", "8"]) == 0
    assert capsys.readouterr().out.strip()


def test_an_engine_of_another_checkpoint_is_told(home, tmp_path, monkeypatch, capsys):
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.setenv("PORTTOOL_HOME", str(tmp_path / "home"))
    run = ["run", "--input-text", "The storm", "--max-output-len", "2"]
    older = "was built from another checkpoint"
    assert invoke(run) == 0
    assert older not in capsys.readouterr().err
    again = ["convert", str(SOURCE), "--model", "gpt2", "--force"]
    assert invoke(again) == 0  # the same one
    assert invoke(run) == 0
    assert older not in capsys.readouterr().err
    assert invoke([*again, "--dtype", "bfloat16"]) == 0
    assert invoke([*run, "--model", "gpt2"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert older in said
    assert "`porttool build --model gpt2 --force`" in said
    assert invoke([*run, str(tmp_path / "home" / "gpt2" / "engine")]) == 0
    assert older not in capsys.readouterr().err  # whoever names an engine means that one
    assert invoke(["build", "--model", "gpt2", "--max-batch-size", "4", "--force"]) == 0
    assert invoke(run) == 0
    assert older not in capsys.readouterr().err


def test_every_form_of_output_says_the_same(at_home, tmp_path, capsys):
    ids = tmp_path / "ids.csv"
    ids.write_text("5,6,7\n8,9\n")
    out = {kind: tmp_path / f"out.{kind}" for kind in ("csv", "npy", "json")}
    logits = tmp_path / "logits.npy"
    arguments = ["run", "--input-tokens", str(ids), "--max-output-len", "6", "--ignore-eos"]
    files = [["--output-csv", out["csv"]], ["--output-npy", out["npy"]],
             ["--output-json", out["json"]], ["--output-logits-npy", logits]]  # fmt: skip
    assert invoke(arguments + [str(a) for pair in files for a in pair]) == 0
    assert capsys.readouterr().out == ""
    rows = [[int(v) for v in row] for row in csv.reader(out["csv"].read_text().splitlines())]
    assert [row[: len(row) - 6] for row in rows] == [[5, 6, 7], [8, 9]]
    padded, lengths = np.load(out["npy"]), np.load(tmp_path / "out.lengths.npy")
    assert [list(row[:n]) for row, n in zip(padded, lengths, strict=True)] == rows
    records = [json.loads(line) for line in out["json"].read_text().splitlines()]
    said = [r["prompt_tokens"] + r["completions"][0]["tokens"] for r in records]
    assert said == rows
    values = np.load(logits)  # [prompts, new tokens, vocabulary]
    assert values.dtype == np.float32
    assert values.shape == (2, 6, 2048)
    assert values.argmax(-1).tolist() == [row[-6:] for row in rows]


def test_json_lines_on_standard_output(at_home, capsys):
    prompts = ["--input-text", "The storm", "--input-text", "A strike"]
    assert (
        invoke(["run", *prompts, "--max-output-len", "4", "--output-json", "-", "--logprobs"]) == 0
    )
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == 2
    for record in records:
        [completion] = record["completions"]
        assert len(completion["logprobs"]) == len(completion["tokens"]) == 4


def test_a_stream_is_the_text_that_comes_without_one(at_home, capsys, monkeypatch):
    arguments = ["run", "--input-text", "-", "--max-output-len", "30"]
    shown = []
    for more in ([], ["--stream"]):
        article = json.loads(ARTICLES.read_text().splitlines()[0])["article"] + " TL;DR:"
        stdin = io.TextIOWrapper(io.BytesIO(article.encode()))
        monkeypatch.setattr("sys.stdin", stdin)
        assert invoke(arguments + more) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "homes" in shown[0]


def test_verify_says_yes_with_numbers(at_home, capsys):
    assert invoke(["verify", "--model", "gpt2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["verdicts"]) >= 6
    assert all(v["passed"] for v in report["verdicts"])


def test_summarize_runs_the_sides_apart_and_together(at_home, capsys):
    assert summarize("--test-hf") == 0
    assert summarize("--test-engine", "--check-accuracy") == 0
    apart = json.loads((at_home / "gpt2" / "summarize" / "report.json").read_text())
    assert summarize("--check-accuracy") == 0
    together = json.loads((at_home / "gpt2" / "summarize" / "report.json").read_text())
    verdicts = [[(v["name"], v["passed"]) for v in r["verdicts"]] for r in (apart, together)]
    assert verdicts[0] == verdicts[1]
    assert "rouge1" in capsys.readouterr().out
    for name in ("report.html", "report.png"):
        assert (at_home / "gpt2" / "summarize" / name).stat().st_size > 10_000


def test_an_untrained_model_is_not_the_trained_one(at_home, tmp_path, capsys):
    """The engine of another model fails both gates with status 1, not with a traceback."""
    source = tmp_path / "shuffled"
    shutil.copytree(SOURCE, source)
    tensors = load_file(source / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.weight"
    tensors[name] = tensors[name].flip(1).contiguous()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    space = ["--workdir", str(tmp_path / "out"), "--model", "gpt2"]
    assert invoke(["convert", str(source), *space]) == 0
    assert invoke(["build", *space]) == 0
    assert invoke(["verify", *space, "--hf-model", str(SOURCE)]) == 1
    shown = capsys.readouterr()
    assert "layers.1.mlp.up.weight" in shown.out + shown.err
    assert summarize(*space, "--hf-model", str(SOURCE), "--check-accuracy") == 1


def test_a_second_conversion_needs_force(at_home, capsys):
    assert invoke(["convert", str(SOURCE), "--model", "gpt2"]) == 2
    assert "--force" in capsys.readouterr().err
    assert invoke(["convert", str(SOURCE), "--model", "gpt2", "--force"]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--model", "gpt3", "--input-text", "x"], "gpt3"),
        (["run", "--input-text", "x", "--max-output-len", "5000"], "this one has"),
        (["run", "--input-text", ""], "empty"),
        (["run", "--input-text", "x", "--input-tokens", "y.csv"], "give one of"),
        (["run", "--input-text", "x", "--num-beams", "2", "--temperature", "1"], "beam search"),
        (["run", "--instruction", "x"], "no instruction template"),
        (["run", "--input-text", "x", "--set", "devise", "cpu"], "its options are"),
        (["build", "--model", "gpt2", "--engine", "torhc", "--force"], "did you mean 'torch'"),
        (["convert", "no/such/place"], "does not exist"),
        (["summarize", "--dataset", "none.jsonl"], "none.jsonl"),
    ],
)
def test_a_users_mistake_is_one_message(at_home, capsys, arguments, says):
    status = invoke(arguments)
    shown = capsys.readouterr()
    assert status in (1, 2)
    assert says in shown.err
    assert "Traceback" not in shown.err


def test_text_that_is_not_utf8(at_home, tmp_path, capsys):
    file = tmp_path / "latin1.txt"
    file.write_bytes("Zürich".encode("latin-1"))
    assert invoke(["run", "--input-file", str(file)]) == 2
    assert "not UTF-8" in capsys.readouterr().err
