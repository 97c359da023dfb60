"""The contract of a builder, which turns a checkpoint into an engine."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porttool.component import Component
from porttool.config import Dtype, Limits, ModelConfig

if TYPE_CHECKING:
    from porttool.checkpoint import Checkpoint
    from porttool.progress import Progress


@dataclass(frozen=True)
class Rank:
    """One of `world_size` processes that share a model by tensor parallelism."""

    index: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class BuildRequest:
    """What every builder is told: the types and limits of the engine to be."""

    dtype: Dtype
    limits: Limits
    config: ModelConfig


class Builder(Component):
    """Builds one rank's files of an engine. `name` is the kind of the engine."""

    @abstractmethod
    def build_rank(
        self,
        checkpoint: Checkpoint,
        request: BuildRequest,
        rank: Rank,
        *,
        out: Path,
        progress: Progress,
    ) -> Mapping[str, Any]:
        """Write this rank's files below `out`; return what the manifest should record of it."""
