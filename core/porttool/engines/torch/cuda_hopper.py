"""The CUDA C++ kernels for Hopper GPUs, compiled for one model and loaded: `hopper/`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from porttool.engines.torch.cuda_compile import (
    CompiledKernel,
    CompilerUnavailable,
    compile_cubin,
)
from porttool.errors import EngineError

ARCH = "sm_90a"

_SOURCES = Path(__file__).parent / "hopper"
_PARTS = {
    "decode_row": (
        "machine.cuh", "activation.cuh", "stream.cuh", "product.cuh", "attention.cuh", "step.cu",
    ),
    "cluster_linear": (
        "machine.cuh", "activation.cuh", "overlap.cuh", "cluster.cuh", "warpgroup.cuh", "linear.cu",
    ),
    "balanced_attention": ("machine.cuh", "overlap.cuh", "heads.cuh", "attend.cu"),
    "cluster_attention": (
        "machine.cuh", "overlap.cuh", "cluster.cuh", "heads.cuh", "attend_group.cu",
    ),
    "prompt_attention": ("machine.cuh", "overlap.cuh", "warpgroup.cuh", "attend_prompt.cu"),
}  # fmt: skip


def unsuited(dtype: torch.dtype, device: str) -> str | None:
    """Say why none of these kernels runs on a device, or None."""
    if dtype not in (torch.float16, torch.bfloat16):
        return "16-bit weights are needed"
    if not device.startswith("cuda") or torch.cuda.get_device_capability(device) != (9, 0):
        return "a Hopper GPU is needed"
    return None


def programs_of(device: str | torch.device) -> int:
    """Return the multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def sources(name: str) -> list[Path]:
    """Return the files that a kernel's source is made of, in order."""
    return [_SOURCES / part for part in _PARTS[name]]


def compile_kernel(name: str, defined: Mapping[str, object]) -> bytes:
    """Compile a kernel; CompilerUnavailable says why that cannot be."""
    source = "\n".join(path.read_text() for path in sources(name))
    return compile_cubin(source, name=name, arch=ARCH, macros=defined)


def load(
    name: str, defined: Mapping[str, object], *, threads: int, device: str | torch.device
) -> CompiledKernel:
    """Return a kernel ready for a device; SHARED is among what its source finds defined.

    Raises EngineError where it does not run: `refusal` tries it beforehand.
    """
    try:
        return _loaded(name, tuple(defined.items()), threads, torch.empty(0, device=device).device)
    except CompilerUnavailable as error:
        raise EngineError(
            f"{name} does not run here: {error}; build the engine again with --set tune true, or "
            "with --set tune false to do without"
        ) from error


def refusal(
    name: str, defined: Mapping[str, object], *, threads: int, device: str | torch.device
) -> str | None:
    """Say why a kernel cannot be made ready for a device, or None."""
    try:
        _loaded(name, tuple(defined.items()), threads, torch.empty(0, device=device).device)
    except CompilerUnavailable as error:
        return str(error)
    return None


@cache
def _loaded(
    name: str, defined: tuple[tuple[str, object], ...], threads: int, device: torch.device
) -> CompiledKernel:
    given: dict[str, Any] = dict(defined)
    with torch.cuda.device(device):
        torch.zeros(1, device=device)  # makes the context this thread's: the guard alone does not
        return CompiledKernel(
            compile_kernel(name, given), name, threads=threads, shared=given["SHARED"]
        )
