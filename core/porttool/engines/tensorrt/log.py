"""TensorRT's messages, kept so that an error can say what the library said."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import tensorrt as trt

from porttool.errors import EngineError

KEPT = 8
Made = TypeVar("Made")


class MessageLog(trt.ILogger):
    """Keeps the last errors and warnings. It must outlive every object that was given it."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.messages: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Take a message from the library."""
        serious = (
            trt.ILogger.Severity.INTERNAL_ERROR,
            trt.ILogger.Severity.ERROR,
            trt.ILogger.Severity.WARNING,
        )
        if severity in serious:
            self.messages = [*self.messages, msg][-KEPT:]

    @property
    def summary(self) -> str:
        """The kept messages as one line."""
        return "; ".join(self.messages) or "TensorRT gave no reason"


def started(kind: Callable[[MessageLog], Made], log: MessageLog) -> Made:
    """Return TensorRT's builder or runtime; EngineError where the library gives none.

    That is so with a driver older than its CUDA, and the bindings call it a TypeError.
    """
    try:
        return kind(log)
    except TypeError as error:
        raise EngineError(
            f"TensorRT does not start: {log.summary}; see whether the GPU's driver is new enough "
            "for this version's CUDA"
        ) from error
