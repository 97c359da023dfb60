"""Putting the TensorRT double, a GPU and a stream of the host's where the engine looks for them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import drawn
import tensorrt_double as double
from porttool.checkpoint import Checkpoint
from porttool.config import Limits
from porttool.engine import Engine
from porttool.engines.tensorrt.gpu import Gpu

LIMITS = Limits(max_batch_size=3, max_input_len=30, max_output_len=18, max_prompt_rows=4)
H200 = Gpu(name="NVIDIA H200", capability=(9, 0))
MODULES = ("layer_times", "log", "plan", "program", "stream")


class HostStream:
    """In place of a CUDA stream: calls run at once; what was captured is run again."""

    device = "cpu"
    handle = 7
    captured = 0

    def run(self, call):
        call()

    def capture(self, call):
        type(self).captured += 1
        return call

    def synchronize(self):
        pass


def install(monkeypatch: pytest.MonkeyPatch, version: str = "11.4.0.106") -> None:
    """Install the double as the module `tensorrt` of a version."""
    made = double.module(version)
    monkeypatch.setitem(sys.modules, "tensorrt", made)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, f"porttool.engines.tensorrt.{name}", raising=False)
    monkeypatch.setattr(Gpu, "current", classmethod(lambda cls: H200))
    import porttool.engines.tensorrt.stream as stream

    monkeypatch.setattr(stream, "DeviceStream", HostStream)
    double.Builder.built.clear()
    double.IExecutionContext.runs.clear()
    HostStream.captured = 0


def forget() -> None:
    """Let go of the engine's modules that have imported the double."""
    for name in MODULES:
        sys.modules.pop(f"porttool.engines.tensorrt.{name}", None)


def build(folder: Path, shape: str = "gpt2", **options: Any) -> tuple[Checkpoint, Engine]:
    """Write a checkpoint and build an engine of it."""
    config = drawn.shape(shape)
    checkpoint = drawn.checkpoint(folder / "checkpoint", config, drawn.weights(config))
    return checkpoint, drawn.engine(
        checkpoint, folder / "engine", kind="tensorrt", limits=LIMITS, options=options
    )
