"""The infill evaluator: problems, measures, both sides on the same ids, and its verdicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from porttool.cli import invoke as porttool
from porttool.engines.torch.runner import TorchRunner
from porttool.errors import UsageError
from porttool.evaluator import Port, evaluate
from porttool.evaluators.infill import InfillEvaluator
from porttool.evaluators.programs import (
    answer_of,
    edit_distance,
    edit_similarity,
    exact_match,
    load_problems,
)
from porttool.text import load_tokenizer
from tiny_coder import write_coder

SOLUTION = "    total = 0\n    for x in xs:\n        total += x\n\n    return total\n"


def row(i: int, **more: str) -> dict[str, str]:
    prompt = f"def add_{i}(xs):\n    '''Add up {'all ' * (i % 4)}numbers.'''\n"
    solution = SOLUTION.replace("total", "total" + "xyzw"[i % 4] * i)
    return {"task_id": f"Test/{i}", "prompt": prompt, "canonical_solution": solution,
            "entry_point": f"add_{i}", "test": "", **more}  # fmt: skip


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def coder(tmp_path_factory) -> Path:
    return write_coder(tmp_path_factory.mktemp("coder"))


@pytest.fixture(scope="module")
def engine(coder):
    checkpoint = tiny.converted(coder, coder.parent / "checkpoint")
    return tiny.built(checkpoint, coder.parent / "engine")


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    return write_rows(file, [row(i) for i in range(12)])


def measure(output, dataset, *, engine=None, source=None, tokenizer=None, **options):
    settings = {"dataset": dataset, "max_new_tokens": 6, "resamples": 300, **options}
    port = Port(
        runner=TorchRunner(engine, {"device": "cpu"}) if engine else None,
        tokenizer=load_tokenizer(tokenizer) if tokenizer else None,
        source=source,
    )
    return evaluate(InfillEvaluator(settings), port, output)


@pytest.mark.parametrize("kind", ["infill", "completion"])
def test_the_port_is_as_good_as_its_source(tmp_path, problems, coder, engine, kind):
    report = measure(tmp_path, problems, engine=engine, source=coder, kind=kind)
    assert report.passed, report.verdicts
    names = [v.name for v in report.verdicts]
    assert names[:2] == ["exact match not inferior", "edit similarity not inferior"]
    assert {"rouge1 not inferior", "token agreement", "log-probability drift"} <= set(names)
    texts = [a["engine"] for a in report.measurements["articles"]]
    assert len(set(texts)) > 3, "the model answers all alike: nothing is tested"
    assert texts == [a["reference"] for a in report.measurements["articles"]]
    assert report.tables[0].title == f"{kind}, 12 problems"
    assert report.tables[1].title == "ROUGE F, 12 problems"
    assert "problems/s" in report.tables[2].columns


def test_another_model_fails(tmp_path, problems, engine):
    other = write_coder(tmp_path / "other", seed=1)
    report = measure(tmp_path / "out", problems, engine=engine, source=other)
    assert {v.name: v.passed for v in report.verdicts}["token agreement"] is False


def test_too_few_problems_are_told_by_their_name(tmp_path, problems, coder, engine):
    report = measure(tmp_path, problems, engine=engine, source=coder, max_problems=3)
    first = report.verdicts[0]
    assert (first.passed, first.found) == (None, "3 problems")
    assert "at least 10 different problems" in first.detail


def test_sides_may_run_apart(tmp_path, problems, coder, engine):
    alone = measure(tmp_path, problems, source=coder, kind="completion")
    assert not alone.passed and alone.verdicts == ()
    both = measure(tmp_path, problems, engine=engine, tokenizer=coder, kind="completion")
    assert both.passed


def test_the_command(tmp_path, problems, coder, engine, capsys):
    asked = ["infill", str(engine.path), "--hf-model", str(coder), "--dataset", str(problems),
             "--max-new-tokens", "4", "--set", "resamples", "200", "--check-accuracy",
             "--output", str(tmp_path / "out"), "--runner-set", "device", "cpu"]  # fmt: skip
    assert porttool(asked) == 0, capsys.readouterr().err
    assert "edit similarity" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["evaluator"] == "infill"


def test_problems_of_either_schema(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [row(0), row(1, suffix="# the end\n")])
    line, given = load_problems(file, "infill", 9)
    assert line.before == row(0)["prompt"] + "    total = 0\n    for x in xs:\n"
    assert line.wanted == "        total += x\n"
    assert line.after == "\n    return total\n"
    assert (given.wanted, given.after) == (SOLUTION.replace("total", "totaly"), "# the end\n")
    whole = load_problems(file, "completion", 1)
    assert [(p.before, p.wanted, p.after) for p in whole] == [(row(0)["prompt"], SOLUTION, "")]


def test_measures():
    assert exact_match("  x = 1\n", "x = 1") == 100
    assert exact_match("x = 2", "x = 1") == 0
    assert edit_distance("kitten", "sitting") == 3
    assert edit_similarity("kitten", " sitting\n") == pytest.approx(100 * (1 - 3 / 7))
    assert edit_similarity("", " ") == 100
    assert answer_of("    return 1\n\ndef g():", "completion") == "    return 1\n"
    assert answer_of("a\ndef g():", "infill") == "a\ndef g():"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "there are no problems in it"),
        ([{"prompt": "a"}], "problem 1: task_id, prompt, canonical_solution should be texts"),
        ([row(0, canonical_solution=" \n")], "problem 1: the canonical_solution is blank"),
        ([row(0), row(1), row(0)], "a.jsonl: 1 entries are there more than once.*: Test/0; leave"),
    ],
)
def test_problems_that_are_none(tmp_path, rows, said):
    with pytest.raises(UsageError, match=said):
        load_problems(write_rows(tmp_path / "a.jsonl", rows), "infill", 9)


def test_what_cannot_be_measured(tmp_path, problems, coder, engine, source):
    with pytest.raises(UsageError, match="there is no such file of problems"):
        measure(tmp_path / "out", tmp_path / "none.jsonl", engine=engine)
    long = write_rows(tmp_path / "long.jsonl", [row(0, prompt="x" * 400)])
    with pytest.raises(UsageError, match=r"Test/0: 4\d\d tokens, but the engine takes 300"):
        measure(tmp_path / "out", long, engine=engine, tokenizer=coder)
    empty = write_rows(tmp_path / "empty.jsonl", [row(0), row(1, prompt="")])
    for side in ({"engine": engine, "tokenizer": coder}, {"source": coder}):
        with pytest.raises(UsageError, match="Test/1: the prompt has no token; leave the problem"):
            measure(tmp_path / "out", empty, kind="completion", **side)
    plain = tiny.built(tiny.converted(source, tmp_path / "checkpoint"), tmp_path / "engine")
    with pytest.raises(UsageError, match=r"tokens for infilling: give `run`.*--kind completion"):
        measure(tmp_path / "out", problems, engine=plain, tokenizer=coder, max_new_tokens=2)
