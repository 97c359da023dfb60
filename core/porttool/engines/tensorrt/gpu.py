"""The GPU that a plan is built for, and whether the one at hand is it."""

from __future__ import annotations

from typing import Any

from porttool.config import Closed
from porttool.engines.tensorrt.library import parse_version
from porttool.engines.tensorrt.options import Hardware
from porttool.errors import EngineError


class Gpu(Closed):
    """Name and compute capability."""

    name: str
    capability: tuple[int, int]

    @classmethod
    def current(cls) -> Gpu:
        """Return torch's current device; EngineError if there is none."""
        import torch

        if not torch.cuda.is_available():
            raise EngineError("TensorRT engines need an NVIDIA GPU, and torch sees none here")
        return cls(name=torch.cuda.get_device_name(), capability=torch.cuda.get_device_capability())


class PlanOrigin(Closed):
    """What a plan was built with and for: all of it is checked before the plan is read."""

    tensorrt: str
    gpu: Gpu
    hardware: Hardware
    version_compatible: bool


def require_same(origin: PlanOrigin, *, version: str, gpu: Gpu, where: str) -> None:
    """Refuse a plan of another TensorRT version or for another GPU, with both named."""
    same_version = version == origin.tensorrt or (
        origin.version_compatible and parse_version(version) >= parse_version(origin.tensorrt)
    )
    if not same_version:
        raise EngineError(
            f"{where} was built with TensorRT {origin.tensorrt}, installed is {version}; build it "
            "again here, or with --set version_compatible true for later versions"
        )
    if not runs_on(origin, gpu):
        raise EngineError(
            f"{where} was built for {describe(origin.gpu)} ({origin.hardware}), here is "
            f"{describe(gpu)}; build it again on this GPU, or with --set hardware ampere_plus"
        )


def runs_on(origin: PlanOrigin, gpu: Gpu) -> bool:
    """Return whether a plan's hardware compatibility covers a GPU."""
    covers: dict[Hardware, Any] = {
        "same_gpu": gpu == origin.gpu,
        "same_compute_capability": gpu.capability == origin.gpu.capability,
        "ampere_plus": gpu.capability >= (8, 0),
    }
    return bool(covers[origin.hardware])


def describe(gpu: Gpu) -> str:
    """Return a GPU's name and capability."""
    return f"{gpu.name} (compute capability {gpu.capability[0]}.{gpu.capability[1]})"
