"""Where things live when no path is given: one folder a model, under one work folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from porttool.checkpoint import Checkpoint
from porttool.engine import Engine
from porttool.errors import UsageError

VARIABLE = "PORTTOOL_HOME"
DEFAULT = "porttool-out"


@dataclass(frozen=True)
class Workspace:
    """The work folder: `--workdir`, else `$PORTTOOL_HOME`, else `./porttool-out`."""

    root: Path

    @classmethod
    def choose(cls, workdir: Path | None = None) -> Workspace:
        """Return the workspace that options and environment name."""
        return cls(workdir or Path(os.environ.get(VARIABLE) or DEFAULT))

    def checkpoint(self, model: str) -> Path:
        """Return where a model's checkpoint lives."""
        return self.root / model / "checkpoint"

    def engine(self, model: str) -> Path:
        """Return where a model's engine lives."""
        return self.root / model / "engine"

    def report(self, model: str, kind: str) -> Path:
        """Return where a model's reports of a kind live."""
        return self.root / model / kind

    def models(self) -> list[str]:
        """Return the models that have an engine here."""
        return sorted(p.parent.parent.name for p in self.root.glob("*/engine/engine.json"))

    def find_model(self, model: str | None) -> str:
        """Return the model that was named, or the only one that has an engine here."""
        if model is not None:
            return model
        found = self.models()
        if len(found) == 1:
            return found[0]
        listed = ", ".join(found) if found else "none"
        raise UsageError(
            f"name a model with --model or give a path; engines in {self.root}: {listed}"
        )

    def find_engine(self, engine: Path | None, model: str | None) -> Path:
        """Return the engine of a path, held to the model if one is named, else of a model."""
        if engine is None:
            return self.engine(self.find_model(model))
        if model is not None:
            require_family(engine, Engine.open(engine, verify=False).manifest.family, model)
        return engine


def require_family(path: Path, family: str, model: str) -> None:
    """Raise UsageError where `model`, a family or a converter of one, is not of a folder's family.

    A folder's family may be written as a converter of it too: random weights are of what was named.
    """
    if family.partition("/")[0] != model.partition("/")[0]:
        raise UsageError(
            f"{path} is of the family {family}, not {model}: take --model away, or give one "
            f"of {model}"
        )


def require_family_of(checkpoint: Path | Checkpoint, model: str) -> None:
    """As `require_family`, of a checkpoint; known before gigabytes are hashed."""
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.open(checkpoint, verify=False)
    require_family(checkpoint.path, checkpoint.manifest.family, model)
