"""A CUDA stream of torch's that TensorRT runs on, and graphs captured from it."""

from __future__ import annotations

from collections.abc import Callable

import torch


class DeviceStream:
    """Runs calls on a stream of its own, ordered after and before what torch does around them."""

    device = "cuda"

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    @property
    def handle(self) -> int:
        """The stream as TensorRT wants it."""
        return int(self._stream.cuda_stream)

    def run(self, call: Callable[[], None]) -> None:
        """Run a call: torch's work before it is seen by it, and its work by torch's after."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            call()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """Record what a call puts on the stream; return what replays it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            call()
        return graph.replay

    def synchronize(self) -> None:
        """Wait until the stream has done everything."""
        self._stream.synchronize()
