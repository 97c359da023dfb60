"""A scaffolded family and the Llama example: installed as strangers' packages, then proven."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from porttool.errors import UsageError
from porttool.scaffold import write_plugin

EXAMPLE = Path(__file__).parents[1] / "examples" / "porttool_llama"


def install(package: Path, site: Path) -> dict[str, str]:
    """Install a package beside the environment; return the variables under which it is seen."""
    sources = site.with_name("package")
    shutil.copytree(package, sources, ignore=shutil.ignore_patterns("build", "__pycache__", ".*"))
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--target", str(site))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(sources)], check=True)
    return {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def porttool(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from porttool.cli import main; main()", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_a_new_family_is_installed_and_passes(tmp_path):
    package = write_plugin("my_family", tmp_path)
    assert (package / "README.md").is_file()
    env = install(package, tmp_path / "site")
    listed = porttool("plugins", "list", "--json", env=env)
    names = {c["name"]: c["plugin"] for c in json.loads(listed.stdout)["components"]}
    assert names["my_family"] == "porttool-my-family 0.1.0"
    checked = porttool("plugins", "check", "my_family", "--json", env=env)
    assert checked.returncode == 0, checked.stderr
    checks = json.loads(checked.stdout)["checks"]
    assert len(checks) == 14
    assert all(c["passed"] for c in checks)


@pytest.mark.parametrize("name", ["", "Llama", "my-family", "1st", "my__family", "../evil", "a b"])
def test_names_that_no_package_can_have(tmp_path, name):
    with pytest.raises(UsageError, match="cannot name a family"):
        write_plugin(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    write_plugin("my_family", tmp_path)
    with pytest.raises(UsageError, match="is there already"):
        write_plugin("my_family", tmp_path)


@pytest.mark.parametrize("tool", [("ruff", "check", "--select", "E,F,W,I,UP,B,ANN,D1", "--ignore",
                                   "D107"), ("ruff", "format", "--check")])  # fmt: skip
def test_what_is_written_is_clean(tmp_path, tool):
    package = write_plugin("my_family", tmp_path)
    options = (*tool, "--line-length", "100", "--isolated", ".")
    subprocess.run([sys.executable, "-m", *options], cwd=package, check=True)


def test_the_llama_example_passes_as_an_installed_package(tmp_path):
    env = install(EXAMPLE, tmp_path / "site")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "tests"],
        cwd=tmp_path / "package", env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    assert "28 passed" in run.stdout


def test_the_llama_example_is_small_and_uses_the_public_api_only():
    files = sorted(EXAMPLE.rglob("*.py"))
    lines = [line for file in files for line in file.read_text().splitlines() if line.strip()]
    assert len(lines) <= 120
    imports = [line.split() for line in lines if line.lstrip().startswith(("from", "import"))]
    used = {words[1] for words in imports if not words[1].startswith("porttool_llama")}
    assert {name for name in used if name.startswith("porttool")} == {
        "porttool",
        "porttool.testing",
    }
