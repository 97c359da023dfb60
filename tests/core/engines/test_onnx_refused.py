"""What ONNX engines refuse: types, packages and providers that are not there, altered files."""

from __future__ import annotations

import sys

import pytest
import torch

import drawn
from porttool.engine import Engine
from porttool.errors import CheckpointError, EngineError, MissingExtra, UsageError
from porttool.plugins import load_registry
from porttool.runner import load_runner

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def test_bfloat16_is_exported_and_refused_where_it_cannot_run(tmp_path):
    tensors = drawn.weights(drawn.shape("gpt2"))
    checkpoint = drawn.checkpoint(tmp_path / "checkpoint", drawn.shape("gpt2"), tensors)
    engine = drawn.engine(checkpoint, tmp_path / "engine", kind="onnx", dtype="bfloat16")
    said = (
        r"no bfloat16 on a CPU: build .* --dtype float32 or float16.*cannot load the graph on cpu"
    )
    with pytest.raises(EngineError, match=said):
        load_runner(engine, load_registry(), {"device": "cpu"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float64"}, "float32, float16 or bfloat16"),
        ({"world_size": 2}, "runs on one device"),
        ({"options": {"cache": "paged"}}, "bad option for 'onnx': cache"),
    ],
)
def test_builds_that_are_refused(tmp_path, checkpoint, change, message):
    with pytest.raises(UsageError, match=message):
        drawn.engine(checkpoint, tmp_path / "engine", kind="onnx", **change)
    assert not (tmp_path / "engine").exists()


def test_missing_packages(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtra, match=r"pip install 'porttool\[onnx\]'"):
        drawn.engine(checkpoint, tmp_path / "engine", kind="onnx")
    monkeypatch.undo()
    engine = drawn.engine(checkpoint, tmp_path / "whole", kind="onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match="onnxruntime"):
        load_runner(engine, load_registry())


def test_missing_provider(tmp_path, checkpoint, monkeypatch):
    import onnxruntime

    engine = drawn.engine(checkpoint, tmp_path / "engine", kind="onnx")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match="offers CPUExecutionProvider and torch sees"):
        load_runner(engine, load_registry(), {"device": "cuda"})


@pytest.mark.parametrize(
    ("said", "given", "threads"),
    [(None, 0, 0), ("3", 0, 3), ("3,2", 0, 3), ("3", 1, 1), ("many", 0, 0), ("", 0, 0)],
)
def test_as_many_threads_as_every_library_is_asked_for(monkeypatch, said, given, threads):
    import onnxruntime

    from porttool.engines.onnx.session import SessionSettings, session_options

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    options = session_options(onnxruntime, SessionSettings("cpu", threads=given))
    assert options.intra_op_num_threads == threads


def test_provider_that_is_replaced_silently(tmp_path, checkpoint, monkeypatch):
    """What ONNX Runtime prints of missing libraries is in the error, not in our output."""
    import onnxruntime

    from porttool.engines.onnx.session import SessionSettings, make_session, provider_options

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert provider_options(SessionSettings("cuda")) == {"use_tf32": "0"}  # the first needs no name
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: sys.stdout.write("no libcublas"))
    options = [provider_options(SessionSettings("cuda", tf32=tf32)) for tf32 in (False, True)]
    assert options == [{"device_id": "1", "use_tf32": flag} for flag in "01"]
    folder = drawn.engine(checkpoint, tmp_path / "engine", kind="onnx").rank_path()
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(EngineError, match=r"fell back to CPUExecutionProvider.*\(no libcublas\)"),
    ):
        make_session(folder / "model.onnx", SessionSettings("cuda"), folder)


def test_altered_weights_are_found(tmp_path, checkpoint):
    engine = drawn.engine(checkpoint, tmp_path / "engine", kind="onnx")
    with (engine.rank_path() / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    with pytest.raises(CheckpointError, match="SHA-256"):
        Engine.open(engine.path, load_registry())
