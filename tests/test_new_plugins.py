"""What `porttool plugins new` writes, and the size of the example.

That both install and pass as strangers' packages, test_docs.py shows.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from porttool.errors import UsageError
from porttool.scaffold import write_plugin

EXAMPLE = Path(__file__).parents[1] / "examples" / "porttool_llama"


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
