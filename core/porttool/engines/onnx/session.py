"""ONNX Runtime sessions: which provider, which options, and its errors as ours."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from porttool.device import Device
from porttool.errors import EngineError, UsageError, importing, require_extra

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
ERRORS_ONLY = 3
"""ONNX Runtime's log level; a warning for every cache that it could not reuse would drown all."""


@dataclass(frozen=True)
class SessionSettings:
    """How a session is to be made. `threads` 0: as many as `default_threads` says."""

    device: str
    optimization: str = "all"
    threads: int = 0
    tf32: bool = False
    spins: bool = True
    """Whether threads wait busily for the next run, or leave the cores to whoever runs between."""
    profile: Path | None = None
    """Where ONNX Runtime's own profile goes, as the beginning of a file's name."""


def require_onnxruntime() -> Any:
    """Import ONNX Runtime, or raise MissingExtra."""
    require_extra("onnx", "onnxruntime")
    with importing("onnx", "onnxruntime"):
        import onnxruntime
    return onnxruntime


def choose_device(wanted: Device) -> str:
    """Return cpu or cuda; auto takes the GPU where both ONNX Runtime and torch see one.

    Raises UsageError if the GPU was asked for and ONNX Runtime has no provider for it.
    """
    import torch

    offered = require_onnxruntime().get_available_providers()
    usable = PROVIDERS["cuda"] in offered and torch.cuda.is_available()
    if wanted == "auto":
        return "cuda" if usable else "cpu"
    if wanted == "cuda" and not usable:
        raise UsageError(
            f"device cuda was asked for, but this ONNX Runtime offers {', '.join(offered)} and "
            f"torch {'sees a GPU' if torch.cuda.is_available() else 'sees no GPU'}; install "
            "onnxruntime-gpu in place of onnxruntime, or use device cpu"
        )
    return wanted


def make_session(model: Path | bytes, settings: SessionSettings, folder: Path) -> Any:
    """Return an InferenceSession of a file, or of a model in memory whose weights are in `folder`.

    Raises EngineError if ONNX Runtime refuses the model or falls back to another provider.
    """
    runtime = require_onnxruntime()
    options = session_options(runtime, settings)
    if isinstance(model, bytes):
        options.add_session_config_entry(EXTERNAL_FOLDER, str(folder))
    wanted = PROVIDERS[settings.device]
    said = preload_libraries(runtime) if settings.device == "cuda" else ""
    with translated_errors(f"{folder}: ONNX Runtime cannot load the graph on {settings.device}"):
        session = runtime.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=[(wanted, provider_options(settings))],
            enable_fallback=0,  # it would print that it tries again, and run on the CPU
        )
    if session.get_providers()[0] != wanted:
        raise EngineError(
            f"ONNX Runtime could not start {wanted} and fell back to "
            f"{session.get_providers()[0]}; it was built for CUDA {runtime.cuda_version}, and that "
            "version's libraries are not all here: install torch, or NVIDIA's packages, for that "
            f"CUDA version{f' ({said})' if said else ''}"
        )
    return session


def preload_libraries(runtime: Any) -> str:
    """Load the CUDA libraries that the provider needs; return what ONNX Runtime missed.

    torch has usually loaded them: the loader then finds them by name. ONNX Runtime prints what it
    misses, which must not get into our output.
    """
    with redirect_stdout(StringIO()) as printed:
        runtime.preload_dlls()
    return "; ".join(printed.getvalue().splitlines())


def default_threads() -> int:
    """Return what OMP_NUM_THREADS asks of every library, 0 where it says nothing.

    ONNX Runtime does not read it, and would take all cores beside a torch that keeps to it.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def session_options(runtime: Any, settings: SessionSettings) -> Any:
    """Return ONNX Runtime's options for our settings."""
    levels = runtime.GraphOptimizationLevel
    options = runtime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = settings.threads or default_threads()
    if not settings.spins:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if settings.profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(settings.profile)
    options.graph_optimization_level = {
        "none": levels.ORT_DISABLE_ALL,
        "basic": levels.ORT_ENABLE_BASIC,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "all": levels.ORT_ENABLE_ALL,
    }[settings.optimization]
    return options


def provider_options(settings: SessionSettings) -> Mapping[str, str]:
    """Return a provider's options. float32 is float32 on a GPU too, unless `tf32` allows less.

    The first GPU goes without saying: from 1.26 on, ONNX Runtime's log warns of every device that
    is named (that it belongs to no plugin).
    """
    if settings.device == "cpu":
        return {}
    import torch

    device = torch.cuda.current_device()
    named = {"device_id": str(device)} if device else {}
    return {**named, "use_tf32": str(int(settings.tf32))}


@contextmanager
def translated_errors(what: str) -> Iterator[None]:
    """Turn ONNX Runtime's exceptions into EngineError; its classes share no base of their own.

    Binding and running a graph raise plain RuntimeError; a message that quotes a name which is no
    UTF-8 cannot even be made, and an allocation that fails is a MemoryError.
    """
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (
        state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf,
        state.NoSuchFile, state.NotImplemented, state.RuntimeException, state.EPFail,
        RuntimeError, UnicodeDecodeError, MemoryError,
    )  # fmt: skip
    try:
        yield
    except kinds as error:
        raise EngineError(
            f"{what}: {error!s:.2000}; build the engine again, or use another "
            "device or version of ONNX Runtime"
        ) from error


@contextmanager
def known_gap(device: str, dtype: str) -> Iterator[None]:
    """Say what to do where ONNX Runtime refuses bfloat16 on a CPU: a new build would not help."""
    try:
        yield
    except EngineError as error:
        if (device, dtype) != ("cpu", "bfloat16"):
            raise
        raise EngineError(
            "ONNX Runtime has no bfloat16 on a CPU: build the engine with --dtype float32 or "
            f"float16, use the torch engine, or run it on a GPU ({error})"
        ) from error
