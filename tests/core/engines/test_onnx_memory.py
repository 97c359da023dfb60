"""Peak resident memory of an export, mapped pages included, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import drawn
from porttool.config import ModelConfig

pytest.importorskip("onnx")

SHAPE = {"d_model": 1024, "d_ff": 4096, "n_layer": 6, "n_head": 8, "n_kv_head": 8, "head_dim": 128,
         "vocab_size": 4096}  # fmt: skip
CHILD = """
import os, sys
from pathlib import Path
import onnx, torch
import drawn
from porttool.checkpoint import Checkpoint
from porttool.config import Limits

def peak():
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent, too
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

os.fsync = lambda descriptor: None  # what is measured is memory, not the disk
before = peak()
limits = Limits(max_batch_size=1, max_input_len=8, max_output_len=8)
checkpoint = Checkpoint.open(Path(sys.argv[1]))
drawn.engine(checkpoint, Path(sys.argv[2]), kind="onnx", dtype=sys.argv[3], limits=limits)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint several times larger than the bound."""
    config = ModelConfig(**{**drawn.BASE, **SHAPE})
    return drawn.checkpoint(tmp_path_factory.mktemp("large") / "checkpoint", config,
                            drawn.weights(config))  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_stream_through_an_export(tmp_path, checkpoint, dtype):
    """Twice the largest tensor and 64 MB for code and graph, whatever the model's size."""
    bound = 2 * 4 * SHAPE["d_ff"] * SHAPE["d_model"] + 64_000_000
    size = sum(f.stat().st_size for f in checkpoint.path.iterdir())
    assert size > 3 * bound
    tests = str(Path(drawn.__file__).parent)
    grown = subprocess.run(
        [sys.executable, "-c", CHILD, str(checkpoint.path), str(tmp_path / "engine"), dtype],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((tests, *sys.path))}, check=True,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert int(grown.stdout) < bound
