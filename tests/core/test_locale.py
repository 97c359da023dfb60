"""Locales that are not UTF-8, and names that are no text."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""What keeps Python from UTF-8, as a locale of another encoding does."""
WRITE = """
from pathlib import Path
from porttool.folder import pending_folder
with pending_folder(Path("made"), "key", manifest="manifest.json") as folder:
    folder.add_bytes("vocab.txt", b"")
    folder.finish("manifest.json", '{"prompt": "\\u4f60"}')
"""


@pytest.fixture
def run(tmp_path):
    """Run Python where nothing but ASCII is text."""

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *map(str, arguments)], capture_output=True, cwd=tmp_path,
            env={**os.environ, **ASCII}, timeout=120, check=False,
        )  # fmt: skip

    return run


def test_manifests_are_utf_8_in_every_locale(run, tmp_path):
    done = run("-c", WRITE)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made/manifest.json").read_bytes() == '{"prompt": "你"}'.encode()


def test_a_new_plugin_is_the_same_in_every_locale(run, tmp_path):
    from porttool.scaffold import write_plugin

    done = run("-m", "porttool", "plugins", "new", "some_family")
    assert done.returncode == 0, done.stderr
    found = tmp_path / "porttool-some-family"
    other = write_plugin("some_family", tmp_path / "utf-8")
    files = [f.relative_to(other) for f in other.rglob("*") if f.is_file()]
    assert [(found / f).read_bytes() for f in files] == [(other / f).read_bytes() for f in files]


@pytest.mark.parametrize("at", ["source", "output", "folder"])
def test_a_name_that_is_no_text_is_refused_before_any_work(source, tmp_path, at):
    odd = tmp_path / os.fsdecode(b"b\xfccher")
    shutil.copytree(source, odd / "source")
    arguments = {
        "source": [odd / "source", "-o", tmp_path / "out"],
        "output": [source, "-o", odd / "out"],
        "folder": ["source", "-o", "out"],
    }[at]
    done = subprocess.run(
        [sys.executable, "-m", "porttool", "convert", *arguments],
        capture_output=True, text=True, cwd=odd, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: '{tmp_path}/b\\udcfccher")
    assert "its name is no text here; rename it" in done.stderr
    assert [f.name for f in odd.iterdir()] == ["source"]
