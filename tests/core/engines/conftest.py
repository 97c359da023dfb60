"""Fixtures of the engines' tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def library(monkeypatch):
    """The TensorRT double in place of the library."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    import tensorrt_install

    tensorrt_install.install(monkeypatch)
    yield monkeypatch
    tensorrt_install.forget()
