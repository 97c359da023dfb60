"""Fixtures of the engines' tests.

Without a GPU the Triton kernels run under Triton's interpreter, chosen when it is imported.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def library(monkeypatch):
    """The TensorRT double in place of the library."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    import tensorrt_install

    tensorrt_install.install(monkeypatch)
    yield monkeypatch
    tensorrt_install.forget()


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """CUDA's run-time compiler, with an empty cache in the folder that this returns."""
    pytest.importorskip("cuda.bindings")
    from porttool.engines.torch import cuda_compile

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        cuda_compile._nvrtc()
    except cuda_compile.CompilerUnavailable as error:
        pytest.skip(str(error))
    return tmp_path
