"""porttool ports GPT-family language models to fast engines and proves that nothing broke.

These names are the public API; what else a plugin needs is in porttool.reading and
porttool.testing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from porttool.hookspecs import API_VERSION, hookimpl

if TYPE_CHECKING:
    from porttool.builder import Builder
    from porttool.checkpoint import Checkpoint
    from porttool.config import Activation, ModelConfig, PromptTemplate, Sampling
    from porttool.converter import Converter, Refinement, Source
    from porttool.engine import Engine
    from porttool.errors import PorttoolError
    from porttool.evaluator import Evaluator
    from porttool.huggingface import HuggingFaceConverter, SourceConfig
    from porttool.runner import Runner
    from porttool.weights import WeightMap, concat, take, transpose

_HOMES = {
    "Activation": "config",
    "Builder": "builder",
    "Checkpoint": "checkpoint",
    "Converter": "converter",
    "Engine": "engine",
    "Evaluator": "evaluator",
    "HuggingFaceConverter": "huggingface",
    "ModelConfig": "config",
    "PorttoolError": "errors",
    "PromptTemplate": "config",
    "Refinement": "converter",
    "Runner": "runner",
    "Sampling": "config",
    "Source": "converter",
    "SourceConfig": "huggingface",
    "WeightMap": "weights",
    "concat": "weights",
    "take": "weights",
    "transpose": "weights",
}

__all__ = [
    "API_VERSION", "Activation", "Builder", "Checkpoint", "Converter", "Engine", "Evaluator",
    "HuggingFaceConverter", "ModelConfig", "PorttoolError", "PromptTemplate",
    "Refinement", "Runner", "Sampling",
    "Source", "SourceConfig", "WeightMap", "concat", "hookimpl", "take", "transpose",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import porttool` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'porttool' has no attribute {name!r}")
    return getattr(import_module(f"porttool.{_HOMES[name]}"), name)
