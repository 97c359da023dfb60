"""The exported ONNX graph in TensorRT 10.13 to 11: a thin builder and a thin runner.

Type-checked against the real bindings and driven against a recording double; never executed with
TensorRT itself by its authors: docs/tensorrt.md says what that leaves open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from porttool import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from porttool import Builder, Runner

api_version = 1


@hookimpl
def porttool_builders() -> Iterable[type[Builder]]:
    """Return the builder of TensorRT engines."""
    from porttool.engines.tensorrt.builder import TensorrtBuilder

    return [TensorrtBuilder]


@hookimpl
def porttool_runners() -> Iterable[type[Runner]]:
    """Return the runner of TensorRT engines."""
    from porttool.engines.tensorrt.runner import TensorrtRunner

    return [TensorrtRunner]
