"""What is refused leaves no folder, neither its own nor those above it that it made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tiny
from porttool.cli import invoke
from porttool.standing import made_folder

ARTICLE = {"id": "a", "article": "x", "highlights": "y"}
PROBLEM = {"task_id": "a", "prompt": "x", "entry_point": "x", "test": "",
           "canonical_solution": "y"}  # fmt: skip


@pytest.fixture
def orphan(tmp_path, source, engine_folder, monkeypatch):
    """An engine, by its path, whose source and tokenizer are gone, and an empty folder to be in."""
    engine = shutil.copytree(engine_folder, tmp_path / "engine")
    manifest = json.loads((engine / "engine.json").read_text())
    tiny.edit_manifest(engine / "engine.json", source={**manifest["source"], "path": "/gone"})
    (tmp_path / "articles.jsonl").write_text(json.dumps(ARTICLE))
    (tmp_path / "problems.jsonl").write_text(json.dumps(PROBLEM))
    (tmp_path / "broken").mkdir()
    shutil.copy(source / "config.json", tmp_path / "broken")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PATH", "")
    return engine


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("verify {}", 2),
        ("summarize {} --dataset ../articles.jsonl", 2),
        ("summarize {} --dataset ../articles.jsonl --test-engine", 2),
        ("infill {} --dataset ../problems.jsonl", 2),
        ("infill {} --dataset ../problems.jsonl --test-engine", 2),
        ("profile {} --prompt-len 4000", 2),
        ("profile {} --under nsys", 2),
        ("convert ../broken", 1),
    ],
)
def test_what_is_refused_leaves_no_folder(orphan, monkeypatch, capsys, command, status):
    arguments = [*command.format(orphan).split(), "--output", "deep/out"]
    monkeypatch.setattr("sys.argv", ["porttool", *arguments])
    assert invoke(arguments) == status, capsys.readouterr().err
    assert not list(Path().iterdir())
    assert not list(orphan.parent.glob("engine-reports"))


@pytest.mark.parametrize("command", ["build {checkpoint}", "profile {engine} --prompt-len 4"])
def test_a_place_that_cannot_be_made_leaves_none_above_it(
    checkpoint, engine_folder, tmp_path, monkeypatch, capsys, command
):
    monkeypatch.chdir(tmp_path)
    asked = command.format(checkpoint=checkpoint.path, engine=engine_folder).split()
    status = invoke([*asked, "--output", f"new/deep/{'x' * 300}"])
    assert (status, "File name too long" in capsys.readouterr().err) == (1, True)
    assert not list(tmp_path.iterdir())


def test_only_what_is_new_and_empty_is_taken_away(tmp_path):
    for place, content, left in (
        ("a/b", None, []), ("a/b", "one", ["a", "a/b", "a/b/one"]), ("a/b", None, ["a", "a/b"]),
        ("a/c/d", None, ["a", "a/b"]),
    ):  # fmt: skip
        with pytest.raises(RuntimeError), made_folder(tmp_path / place) as folder:
            if content:
                (folder / content).touch()
            raise RuntimeError
        assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == left
        (tmp_path / "a/b/one").unlink(missing_ok=True)


DEMO = Path(__file__).parent.parent.parent / "examples" / "demo"


@pytest.fixture
def stopped_demo(tmp_path, monkeypatch, capsys):
    """A demo that is stopped in its first build, in a work folder with a `demo` of somebody's."""

    def stop(*_, **__):
        stopped = KeyboardInterrupt()
        stopped.add_note("the same command with --test-engine goes on")
        raise stopped

    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine.txt").write_text("mine")
    monkeypatch.setattr("porttool.api.build", stop)
    return ["demo", "--data", str(DEMO), "--workdir", str(tmp_path)]


def test_a_demo_takes_nothing_away_that_it_did_not_make(stopped_demo, tmp_path, capsys):
    for _ in range(2):
        assert invoke(stopped_demo) == 130
        made = tmp_path / "demo" / "gpt2" / "checkpoint" / "checkpoint.json"
        assert made.is_file()
        assert (tmp_path / "demo" / "mine.txt").read_text() == "mine"


def test_a_demo_that_is_stopped_promises_nothing(stopped_demo, capsys):
    assert invoke(stopped_demo) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: interrupted"


def test_a_stopped_check_names_no_folder_that_is_gone(monkeypatch, capsys):
    def stop(*_, **__):
        stopped = KeyboardInterrupt()
        stopped.add_note("somewhere keeps what was written")
        raise stopped

    monkeypatch.setattr("porttool.testing.run_checks", stop)
    assert invoke(["plugins", "check", "gpt2"]) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: interrupted"
