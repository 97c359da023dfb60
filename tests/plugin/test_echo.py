"""An installable stranger, installed and used as a stranger is: in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny

PACKAGE = Path(__file__).parent / "porttool_echo"
PORTTOOL = "import sys; from porttool.cli import main; main(sys.argv[1:])"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that the stranger was installed into, without touching this environment."""
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
         "--no-build-isolation", "--disable-pip-version-check", "--root-user-action=ignore",
         "--target", str(target), str(PACKAGE)],
        check=True, timeout=120,
    )  # fmt: skip
    return target


@pytest.fixture(scope="module")
def porttool(installed, tmp_path_factory):
    """Run the command line where the stranger is installed."""
    home = tmp_path_factory.mktemp("home")

    def run(*arguments, status=0, **environment):
        found = subprocess.run(
            [sys.executable, "-c", PORTTOOL, *map(str, arguments)],
            capture_output=True, text=True, cwd=home, timeout=120,
            env={**os.environ, "PYTHONPATH": str(installed), **environment},
        )  # fmt: skip
        assert found.returncode == status, found.stdout + found.stderr
        return found.stdout + found.stderr

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A GPT-2 of the stranger's kind."""
    model = tiny.gpt2(n_layer=1, n_head=1)
    return tiny.write_source(tmp_path_factory.mktemp("echo") / "source", model)


@pytest.fixture(scope="module")
def checkpoint(porttool, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("echo") / "checkpoint"
    porttool("convert", model, "--output", path)
    return path


@pytest.fixture(scope="module")
def engine(porttool, checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("echo") / "engine"
    porttool("build", checkpoint, "--engine", "echo", "--output", path)
    return path


def test_the_package_that_is_installed_is_the_one_here(installed):
    for file in (PACKAGE / "porttool_echo").glob("*.py"):
        assert (installed / "porttool_echo" / file.name).read_bytes() == file.read_bytes()
    entries = (installed / "porttool_echo-3.1.4.dist-info" / "entry_points.txt").read_text()
    assert entries.split() == ["[porttool]", "echo", "=", "porttool_echo"]


def test_it_is_listed_with_all_that_it_brings(porttool):
    listed = json.loads(porttool("plugins", "list", "--json"))
    assert listed["broken"] == []
    brought = {(c["kind"], c["name"]) for c in listed["components"] if "porttool-echo 3.1.4" in
               c["plugin"]}  # fmt: skip
    kinds = ("converter", "builder", "runner", "evaluator")
    assert brought == {(kind, "echo") for kind in kinds}


def test_its_family_goes_before_the_one_it_refines(checkpoint):
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    assert manifest["family"] == "echo"
    assert manifest["plugin"] == {
        "component": "echo", "distribution": "porttool-echo", "version": "3.1.4", "api_version": 1,
    }  # fmt: skip
    assert manifest["prompt"]["plain"] == "Say: {instruction}"


def test_others_models_stay_theirs(porttool, source, tmp_path):
    porttool("convert", source, "--output", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "checkpoint.json").read_text())["family"] == "gpt2"


def test_its_engine_runs(porttool, engine, tmp_path):
    (tmp_path / "ids.csv").write_text("5,6\n63\n")
    porttool(
        "run", engine, "--input-tokens", tmp_path / "ids.csv", "--max-output-len", 3,
        "--output-csv", tmp_path / "out.csv", "--ignore-eos",
    )  # fmt: skip
    assert (tmp_path / "out.csv").read_text().split() == ["5,6,7,8,9", "63,64,65,66"]


def test_its_options_are_set_and_checked(porttool, checkpoint, tmp_path):
    build = ("build", checkpoint, "--engine", "echo", "--output", tmp_path / "engine")
    said = porttool(*build, "--set", "shfit", "2", status=2)
    assert "bad option for 'echo': shfit" in said
    assert "its options are: shift" in said
    porttool(*build, "--set", "shift", "2")
    manifest = json.loads((tmp_path / "engine" / "engine.json").read_text())
    assert (manifest["kind"], manifest["built"]) == ("echo", [{"shift": 2}])


def test_its_command_and_its_evaluator(porttool, engine, checkpoint, tmp_path):
    assert "echo" in porttool("--help")
    assert "echo: (2, 3, 4, 5)" in porttool("echo", engine, tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (report["evaluator"], report["verdicts"][0]["passed"]) == ("echo", True)
    other = tmp_path / "other"
    porttool("build", checkpoint, "--engine", "echo", "--output", other, "--set", "shift", "2")
    said = porttool("echo", other, tmp_path / "second", status=1)
    assert "count: (3, 5, 7, 9), bound (2, 3, 4, 5)" in said.replace("\n", " ")


def test_without_it_its_engine_says_what_is_missing(porttool, engine, tmp_path):
    ids = tmp_path / "ids.csv"
    ids.write_text("5,6\n")
    said = porttool("run", engine, "--input-tokens", ids, status=2,
                    PORTTOOL_DISABLE_PLUGINS="echo")  # fmt: skip
    assert "built by porttool-echo 3.1.4: there is no runner named 'echo'" in said


@pytest.fixture
def later(installed):
    """The stranger's next release in place of the one that made its folders."""
    metadata = installed / "porttool_echo-3.1.4.dist-info" / "METADATA"
    kept = metadata.read_text()
    metadata.write_text(kept.replace("Version: 3.1.4", "Version: 3.2.0"))
    yield
    metadata.write_text(kept)


def test_another_version_of_it_is_told(porttool, engine, later, tmp_path):
    ids = tmp_path / "ids.csv"
    ids.write_text("5,6\n")
    said = porttool("run", engine, "--input-tokens", ids, status=1)
    assert "built by 'echo' of porttool-echo 3.1.4, installed is porttool-echo 3.2.0" in said


@pytest.fixture(scope="module")
def port(porttool, checkpoint, tmp_path_factory):
    """Its family's model as an engine of porttool's."""
    path = tmp_path_factory.mktemp("echo") / "torch"
    porttool("build", checkpoint, "--output", path)
    return path


def test_without_it_its_models_still_run(porttool, port, tmp_path):
    (tmp_path / "ids.csv").write_text("5,6\n")
    run = ("run", port, "--input-tokens", tmp_path / "ids.csv", "--output-csv", tmp_path / "out")
    porttool(*run, PORTTOOL_DISABLE_PLUGINS="echo")


@pytest.mark.parametrize("command", ["verify", "summarize"])
def test_without_it_nothing_proves_its_models(porttool, port, command):
    said = porttool(command, port, status=1, PORTTOOL_DISABLE_PLUGINS="echo")
    made = f"{port} is of a checkpoint that was converted by 'echo' of porttool-echo 3.1.4"
    assert f"{made}, which is not installed; install porttool-echo==3.1.4" in said


def test_its_next_release_proves_none_of_its_older_models(porttool, port, later):
    said = porttool("verify", port, status=1)
    assert "converted by 'echo' of porttool-echo 3.1.4, installed is porttool-echo 3.2.0" in said


def test_broken_it_is_set_aside_and_named(porttool, installed, source, port, tmp_path):
    module = installed / "porttool_echo" / "__init__.py"
    kept = module.read_text()
    try:
        module.write_text(kept + "\nimport there_is_no_such_module\n")
        listed = json.loads(porttool("plugins", "list", "--json"))
        porttool("convert", source, "--output", tmp_path / "out")
        said = porttool("verify", port, status=1)
    finally:
        module.write_text(kept)
    (broken,) = listed["broken"]
    assert (broken["name"], broken["distribution"]) == ("echo", "porttool-echo")
    assert "there_is_no_such_module" in broken["error"]
    assert "porttool-echo 3.1.4, which is not in use; plugins set aside: echo of " in said
