"""Where only the base dependencies are installed: what needs none of the extras works without."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

EXTRAS = (
    "triton", "cuda", "onnx", "onnxruntime", "tensorrt", "huggingface_hub", "rouge_score",
    "datasets", "pandas", "pyarrow", "matplotlib", "yaml", "sentencepiece", "transformers",
)  # fmt: skip
"""Packages that an extra brings."""

SESSION = """
import json, sys
sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))
from porttool.cli import invoke
for arguments in json.loads(sys.argv[2]):
    print("exit status", invoke(arguments), file=sys.stderr)
"""


@pytest.fixture
def session(tmp_path):
    """Run commands in one process that has no extra; give back what it said of each."""

    def run(*commands):
        words = [list(map(str, command)) for command in commands]
        done = subprocess.run(
            [sys.executable, "-c", SESSION, json.dumps(EXTRAS), json.dumps(words)],
            capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return run


def test_a_shell_completes_commands_and_options(tmp_path):
    """As docs/cli.md says; the answer comes while somebody waits for it."""
    asked = {"_PORTTOOL_COMPLETE": "bash_complete", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "porttool"], capture_output=True, text=True, check=True,
        env={**os.environ, **asked, "COMP_WORDS": "porttool build --max-b"}, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.split() == ["plain,--max-batch-size", "plain,--max-beam-width"]


def test_the_way_from_a_source_to_tokens_needs_no_extra(session, source, tmp_path):
    (tmp_path / "ids.csv").write_text("5,9,2\n")
    out, said = session(
        ["convert", source, "-o", "checkpoint"],
        ["build", "checkpoint", "-o", "engine"],
        ["run", "engine", "--input-tokens", "ids.csv", "--max-output-len", 3],
        ["inspect", "engine"],
    )
    assert said.count("exit status 0") == 4, said
    assert "of gpt2, float32" in out


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["build", "CHECKPOINT", "-o", "engine", "--engine", "onnx"], "onnx"),
        (["build", "CHECKPOINT", "-o", "engine", "--engine", "tensorrt"], "tensorrt"),
        (["verify", "ENGINE", "--hf-model", "SOURCE"], "reference"),
        (
            ["bench", "ENGINE", "--hf-model", "SOURCE", "--input-len", 4, "--output-len", 4],
            "reference",
        ),
        (["bench", "ENGINE", "--input-len", 4, "--output-len", 4, "--picture", "p.png"], "eval"),
        (["infill", "ENGINE", "--hf-model", "SOURCE", "--dataset", "later.jsonl"], "eval"),
        (["plugins", "check", "gpt2"], "reference"),
    ],
)
def test_what_needs_an_extra_names_it_at_once(
    session, source, checkpoint, engine_folder, command, extra
):
    places = {"CHECKPOINT": checkpoint.path, "ENGINE": engine_folder, "SOURCE": source}
    out, said = session([places.get(word, word) for word in command])
    assert f"pip install 'porttool[{extra}]'" in said
    assert "Traceback" not in said
    assert said.endswith("exit status 1\n")
    assert out == ""
