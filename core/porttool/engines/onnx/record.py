"""What a builder notes in the manifest of an engine that has one rank, and reading it back."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import ValidationError

from porttool.component import explain
from porttool.config import Closed
from porttool.errors import EngineError

if TYPE_CHECKING:
    from porttool.engine import Engine


Form = Literal["scatter", "concat"]
"""How a graph keeps its cache: written in place inside the graph, or joined with what is new."""


class BuildRecord(Closed):
    """The record of the only rank; `of_what` is what it describes, in words."""

    of_what: ClassVar[str]
    rank: Literal[0] = 0

    @classmethod
    def of(cls, engine: Engine) -> Self:
        """Return an engine's record; an EngineError says what the manifest has in its place."""
        built = engine.manifest.built
        if len(built) != 1 or engine.manifest.world_size != 1:
            raise EngineError(
                f"{engine.path}: the manifest says {engine.manifest.world_size} ranks and describes"
                f" {len(built)}; such an engine has one, build it again"
            )
        try:
            return cls.model_validate(built[0])
        except ValidationError as error:
            raise EngineError(
                f"{engine.path}: the manifest describes no {cls.of_what}: {explain(error)}; "
                "build the engine again"
            ) from error
