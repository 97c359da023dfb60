"""The native engine: plain torch and packed weights on a CPU, Triton kernels on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porttool import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from porttool import Builder, Runner

api_version = 1


@hookimpl
def porttool_builders() -> Iterable[type[Builder]]:
    """Return the builder of torch engines."""
    from porttool.engines.torch.builder import TorchBuilder

    return [TorchBuilder]


@hookimpl
def porttool_runners() -> Iterable[type[Runner]]:
    """Return the runner of torch engines."""
    from porttool.engines.torch.runner import TorchRunner

    return [TorchRunner]
