"""TensorRT's messages, kept so that an error can say what the library said."""

from __future__ import annotations

import tensorrt as trt

KEPT = 8


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
