"""TensorRT's own profile: how long every layer of a plan took in every run."""

from __future__ import annotations

from typing import SupportsFloat

import tensorrt as trt

from porttool.runner import TimedNode


class LayerTimes(trt.IProfiler):
    """Takes the times that contexts report; one list for each run."""

    def __init__(self) -> None:
        trt.IProfiler.__init__(self)
        self.runs: list[list[tuple[str, float]]] = []

    def report_layer_time(self, layer_name: str, ms: SupportsFloat) -> None:
        """Take one layer's milliseconds from the library."""
        self.runs[-1].append((layer_name, float(ms)))

    def nodes(self) -> list[TimedNode]:
        """Return the layers one after the other: TensorRT reports how long, not when."""
        found = []
        for run, layers in enumerate(self.runs):
            begin = 0.0
            for name, milliseconds in layers:
                found.append(TimedNode(name, "layer", run, begin, 1e3 * milliseconds))
                begin += 1e3 * milliseconds
        return found
