"""The exported graph in ONNX Runtime, its inputs and outputs bound to torch's memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from porttool.config import dtype_name
from porttool.engines.onnx.cached_graph import PROJECTED, Program
from porttool.engines.onnx.element_types import ELEMENT_TYPES
from porttool.engines.onnx.session import translated_errors

NOWHERE = torch.zeros(1)
"""Stands for the address of empty tensors: ONNX Runtime refuses null."""


class SessionProgram(Program):
    """An ONNX Runtime session. Nothing is copied between it and torch.

    On a GPU it has a stream of its own and waits for it at the end of a run; it does not wait for
    torch's, so that this does.
    """

    def __init__(self, session: Any, device: str, folder: Path) -> None:
        self.session = session
        self.device = device
        self._folder = folder
        self.inputs = {value.name for value in session.get_inputs()}
        self.chooses = PROJECTED in self.inputs
        self.scatters = any(v.name.startswith("present_key") for v in session.get_outputs())

    def bind(self, tensors: Mapping[str, Tensor], *, repeats: bool) -> Callable[[], None]:
        """Bind every tensor by its address; the binding keeps them alive."""
        io = self.session.io_binding()
        for name, tensor in tensors.items():
            bind = io.bind_input if name in self.inputs else io.bind_output
            element = ELEMENT_TYPES[dtype_name(tensor.dtype)]
            index = tensor.device.index or 0
            place = tensor.data_ptr() or NOWHERE.data_ptr()
            bind(name, tensor.device.type, index, element, list(tensor.shape), place)
        return partial(self._run, io, tensors)

    def _run(self, io: Any, tensors: Mapping[str, Tensor]) -> None:
        if self.device == "cuda":
            torch.cuda.current_stream().synchronize()
        with translated_errors(f"{self._folder}: ONNX Runtime could not run the step"):
            self.session.run_with_iobinding(io)
