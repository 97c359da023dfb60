"""The commands as functions: paths, work folder, and whatever is missing or of another version."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from porttool import api
from porttool.cli import invoke
from porttool.errors import (
    CheckpointError,
    MissingExtra,
    PluginError,
    SourceError,
    UsageError,
    least_version,
)
from porttool.hub import resolve_source
from porttool.text import SentencePieceTokenizer
from porttool.workspace import Workspace


def test_the_steps_chain_without_paths(tmp_path, source, registry):
    space = Workspace(tmp_path)
    api.convert(source, workspace=space, registry=registry)
    api.build(model="gpt2", workspace=space, registry=registry)
    loaded = api.load(workspace=space, registry=registry)
    assert loaded.engine.path == tmp_path / "gpt2" / "engine"
    assert loaded.tokenizer is None


def test_the_work_folder_is_chosen(monkeypatch, tmp_path):
    monkeypatch.delenv("PORTTOOL_HOME", raising=False)
    assert Workspace.choose(None).root == Path("porttool-out")
    monkeypatch.setenv("PORTTOOL_HOME", str(tmp_path))
    assert Workspace.choose(None).root == tmp_path
    assert Workspace.choose(Path("here")).root == Path("here")


def test_which_engine_is_meant(tmp_path):
    with pytest.raises(UsageError, match=r"name a model with --model or give a path; .*: none"):
        Workspace(tmp_path).find_model(None)
    for model in ("one", "two"):
        (tmp_path / model / "engine").mkdir(parents=True)
        (tmp_path / model / "engine" / "engine.json").write_text("{}")
    with pytest.raises(UsageError, match=r": one, two$"):
        Workspace(tmp_path).find_model(None)


@pytest.mark.parametrize(
    "command",
    ["run {engine} --input-text x", "verify {engine}", "summarize {engine}", "bench {engine}",
     "infill {engine} --dataset x", "profile {engine}", "build {checkpoint} -o out"],
)  # fmt: skip
def test_a_path_and_another_family(
    tmp_path, checkpoint, engine_folder, monkeypatch, capsys, command
):
    monkeypatch.chdir(tmp_path)
    path = checkpoint.path if "checkpoint" in command else engine_folder
    words = command.format(engine=path, checkpoint=path).split()
    assert invoke([*words, "--model", "santacoder"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{path} is of the family gpt2, not santacoder: take --model away" in said
    assert not list(tmp_path.iterdir())


def test_another_family_is_refused_before_anything_is_hashed(tmp_path, checkpoint):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint.path, folder)
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(UsageError, match="is of the family gpt2, not santacoder"):
        api.build(folder, tmp_path / "out", model="santacoder")
    with pytest.raises(UsageError, match="is of the family gpt2, not santacoder"):
        api.build(checkpoint, tmp_path / "out", model="santacoder")
    with pytest.raises(CheckpointError, match=weights.name):
        api.build(folder, tmp_path / "out", model="gpt2")


@pytest.mark.parametrize("model", [None, "gpt2", "gpt2/megatron"])
def test_a_path_and_its_own_family(tmp_path, engine_folder, model):
    assert Workspace(tmp_path).find_engine(engine_folder, model) == engine_folder


def test_a_checkpoint_of_another_plugin_version(tmp_path, checkpoint, registry):
    folder = shutil.copytree(checkpoint.path, tmp_path / "checkpoint")
    file = folder / "checkpoint.json"
    values = json.loads(file.read_text())
    values["plugin"]["version"] = "0.0.9"
    tiny.edit_manifest(file, **values)
    with pytest.raises(PluginError) as caught:
        api.build(folder, tmp_path / "engine", registry=registry)
    said = str(caught.value)
    assert "was converted by 'gpt2' of porttool 0.0.9, installed is porttool " in said
    assert "make it again, or install that version" in said
    values["plugin"].update(component="gone", distribution="porttool-gone")
    tiny.edit_manifest(file, **values)
    with pytest.raises(PluginError, match=r"not installed; install porttool-gone==0\.0\.9"):
        api.build(folder, tmp_path / "engine", registry=registry)
    assert not (tmp_path / "engine").exists()


def test_a_tokenizer_of_another_model(engine_folder, tokenizer_folder, registry):
    with pytest.raises(UsageError, match="the tokenizer has 320 ids, the model only 67; it belon"):
        api.load(engine_folder, tokenizer=tokenizer_folder, registry=registry)


@pytest.mark.parametrize("missing", ["./gone", "/gone/away", "gone", "a/b/c", "~/gone"])
def test_a_source_that_is_not_there(missing):
    with pytest.raises(UsageError, match="does not exist"):
        resolve_source(missing, None)


def test_the_hub_out_of_reach():
    """The tests run with HF_HUB_OFFLINE: what a machine without a network sees."""
    with pytest.raises(SourceError) as caught:
        resolve_source(None, "porttool-tests/no-such-model")
    said = str(caught.value)
    assert "porttool-tests/no-such-model: not a local path, and the hub does not give it" in said
    assert "pass the folder's path" in said


def test_a_family_without_a_source_of_its_own():
    with pytest.raises(UsageError, match="this family has no source of its own; give the path"):
        resolve_source(None, None)


@pytest.mark.parametrize(
    ("package", "extra", "use"),
    [
        ("huggingface_hub", "hub", lambda: resolve_source("owner/name", None)),
        ("sentencepiece", "gpt-next", lambda: SentencePieceTokenizer(Path("tokenizer.model"))),
    ],
)
def test_a_missing_extra(monkeypatch, package, extra, use):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra) as caught:
        use()
    assert str(caught.value) == (
        f"the package {package!r} is not installed; install it with pip install 'porttool[{extra}]'"
    )


def test_every_extra_that_is_named_exists():
    import tomllib

    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    sources = [file.read_text() for file in (root / "core").rglob("*.py")]
    named = {
        name
        for text in sources
        for name in re.findall(r'(?:MissingExtra|require_extra)\("(.+?)"', text)
    }
    assert {"hub", "reference"} <= named
    assert named <= project["optional-dependencies"].keys()
    for text in sources:
        for extra, package in re.findall(r'require_extra\("(.+?)", "(.+?)"', text):
            assert least_version(extra, package), f"{package} has no bound in [{extra}]"


RACE = """
import sys
from pathlib import Path
import tiny
from porttool.errors import PorttoolError
from porttool.progress import Progress

class Meeting(Progress):
    met = False
    def advance(self, n_bytes):
        if not self.met:
            self.met = True
            print("here", flush=True)
            sys.stdin.readline()

tiny.converted(Path(sys.argv[1]), Path(sys.argv[2]), progress=Meeting())
"""


def test_two_conversions_into_one_folder(tmp_path, source):
    """One is in the middle of it; the other refuses; the first one finishes what it began."""
    pipe = subprocess.PIPE
    first = subprocess.Popen(
        [sys.executable, "-c", RACE, str(source), str(tmp_path / "out")],
        stdin=pipe, stdout=pipe, env={**os.environ, "PYTHONPATH": str(Path(tiny.__file__).parent)},
    )  # fmt: skip
    assert first.stdout.readline() == b"here\n"
    with pytest.raises(Exception, match="out is being written by another process"):
        tiny.converted(source, tmp_path / "out")
    first.communicate(b"go on\n", timeout=60)
    assert first.returncode == 0
    assert api.open_checkpoint(tmp_path / "out", tiny.load_registry()).manifest.family == "gpt2"
