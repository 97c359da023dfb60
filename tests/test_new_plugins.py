"""What `porttool plugins new` writes, and the size of the example.

That both install and pass as strangers' packages, test_docs.py shows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from porttool.errors import SourceError, UsageError
from porttool.scaffold import write_plugin

EXAMPLE = Path(__file__).parents[1] / "examples" / "porttool_llama"


@pytest.mark.parametrize("name", ["", "Llama", "my-family", "1st", "my__family", "../evil", "a b"])
def test_names_that_no_package_can_have(tmp_path, name):
    with pytest.raises(UsageError, match="cannot name a family"):
        write_plugin(name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["torch", "onnx"])
def test_the_name_of_an_installed_plugin_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match=f"'{name}' is taken: a plugin of this name is installed"):
        write_plugin(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


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


LLAMA = {
    "model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 8,
}  # fmt: skip


def read_llama(folder: Path, **changes: object):
    from porttool_llama.converter import LlamaConverter

    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return LlamaConverter().config(folder)


def test_llama_reads_old_and_new_configs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    assert read_llama(tmp_path).rotary_base == 10000
    assert read_llama(tmp_path, rope_theta=7.0, rope_scaling=None).rotary_base == 7
    new = {"rope_type": "default", "rope_theta": 9}
    assert read_llama(tmp_path, rope_parameters=new).rotary_base == 9


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "'rope_type' is 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling: unknown keys .*factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "unknown keys .*partial_rotary"),
        ({"rope_parameters": "default"}, "'rope_parameters' should be an object, not 'default'"),
        ({"hidden_act": "relu"}, "'hidden_act' is 'relu'"),
        ({"sliding_window": 4}, "unknown keys that could change the model: sliding_window"),
    ],
)
def test_llama_refuses_what_it_cannot_port(tmp_path, monkeypatch, change, said):
    monkeypatch.syspath_prepend(EXAMPLE)
    with pytest.raises(SourceError, match=said):
        read_llama(tmp_path, **change)
