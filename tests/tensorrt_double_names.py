"""What both halves of the TensorRT double stand on: real names only."""

from __future__ import annotations

import json
from enum import Enum, auto
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "core" / "engines" / "tensorrt_signatures.json"
SIGNATURES: dict[str, dict[str, dict[str, Any]]] = json.loads(FILE.read_text())


def enum(name: str, *values: str) -> Any:
    return Enum(name, {v: auto() for v in values})


TensorIOMode = enum("TensorIOMode", "INPUT", "OUTPUT")
LayerType = enum("LayerType", "ATTENTION_INPUT", "MATRIX_MULTIPLY")
BuilderFlag = enum(
    "BuilderFlag", "TF32", "VERSION_COMPATIBLE", "WEIGHT_STREAMING", "REFIT", "STRIP_PLAN"
)
ProfilingVerbosity = enum("ProfilingVerbosity", "NONE", "LAYER_NAMES_ONLY", "DETAILED")
HardwareCompatibilityLevel = enum(
    "HardwareCompatibilityLevel", "NONE", "SAME_COMPUTE_CAPABILITY", "AMPERE_PLUS"
)
LayerInformationFormat = enum("LayerInformationFormat", "ONELINE", "JSON")
MemoryPoolType = enum("MemoryPoolType", "WORKSPACE")
ExecutionContextAllocationStrategy = enum("ExecutionContextAllocationStrategy", "USER_MANAGED")


class NetworkDefinitionCreationFlag(Enum):
    STRONGLY_TYPED = 1

    def __int__(self) -> int:
        return 1


class Real:
    """Has only what the real class has."""

    version = "11.4"

    def __setattr__(self, name: str, value: Any) -> None:
        known = SIGNATURES[self.version][type(self).__name__]
        if not name.startswith("_") and name not in known:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        object.__setattr__(self, name, value)


class ILogger(Real):
    Severity = enum("Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


class Dims(Real):
    def __init__(self, shape: Any = ()) -> None:
        self._values = tuple(shape)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> int:
        return self._values[index]
