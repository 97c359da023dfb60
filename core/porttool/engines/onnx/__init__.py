"""One strongly typed ONNX graph of the canonical decoder, and ONNX Runtime to run it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porttool import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from porttool import Builder, Runner

api_version = 1


@hookimpl
def porttool_builders() -> Iterable[type[Builder]]:
    """Return the builder of ONNX engines."""
    from porttool.engines.onnx.builder import OnnxBuilder

    return [OnnxBuilder]


@hookimpl
def porttool_runners() -> Iterable[type[Runner]]:
    """Return the runner of ONNX engines."""
    from porttool.engines.onnx.runner import OnnxRunner

    return [OnnxRunner]
