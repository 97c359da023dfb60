"""TensorRT's presence and version, asked before any module that imports it is imported."""

from __future__ import annotations

from porttool.errors import EngineError, importing

OLDEST = (10, 13)
SCATTER = (10, 15)
"""First version with TensorScatter and Attention from ONNX (TensorRT's change log)."""


def require_tensorrt() -> str:
    """Return TensorRT's version; MissingExtra if it is not there, EngineError if too old."""
    with importing("tensorrt", "tensorrt"):
        import tensorrt
    found = str(tensorrt.__version__)
    if parse_version(found) < OLDEST:
        raise EngineError(f"TensorRT {found} is installed; porttool needs 10.13 or later")
    return found


def parse_version(text: str) -> tuple[int, int]:
    """Return major and minor of a version such as 11.4.0.106."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
