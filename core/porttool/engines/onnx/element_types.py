"""ONNX's numbers for element types, for those who bind a graph and import no onnx."""

from __future__ import annotations

ELEMENT_TYPES: dict[str, int] = {
    "float32": 1, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16,
}  # fmt: skip
"""onnx.TensorProto.DataType (onnx.proto3)."""
