"""Building an ONNX engine: the graph, its weights, and the session options to run it with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import ValidationError

from porttool.builder import Builder, BuildRequest, Rank
from porttool.component import Options, explain
from porttool.config import Closed
from porttool.engines.onnx.export import MODEL, export_model, require_single_rank
from porttool.errors import EngineError

if TYPE_CHECKING:
    from porttool.checkpoint import Checkpoint
    from porttool.engine import Engine
    from porttool.progress import Progress

Cache = Literal["scatter", "concat"]
Optimization = Literal["none", "basic", "extended", "all"]


class OnnxOptions(Options):
    """How the graph keeps its cache, and how ONNX Runtime is to treat it.

    `cache`: `scatter` writes into a cache of fixed capacity inside the graph (opset 24), `concat`
    joins cache and new tokens and returns the new ones (opset 20). `optimization`: how far ONNX
    Runtime rewrites the graph.
    """

    cache: Cache = "scatter"
    optimization: Optimization = "all"


class SessionRecord(Closed):
    """What the builder was told of the session."""

    optimization: Optimization


class GraphRecord(Closed):
    """What the builder notes of the graph in the engine's manifest."""

    rank: Literal[0]
    graph: Literal["model.onnx"]
    opset: int
    cache: Cache
    capacity: int
    nodes: int
    session: SessionRecord

    @classmethod
    def of(cls, engine: Engine) -> GraphRecord:
        """Return an engine's record; an EngineError says what the manifest has in its place."""
        built = engine.manifest.built
        if len(built) != 1 or engine.manifest.world_size != 1:
            raise EngineError(
                f"{engine.path}: the manifest says {engine.manifest.world_size} ranks and describes"
                f" {len(built)}; an ONNX engine has one, build it again"
            )
        try:
            return cls.model_validate(built[0])
        except ValidationError as error:
            raise EngineError(
                f"{engine.path}: the manifest describes no ONNX graph: {explain(error)}; "
                "build the engine again"
            ) from error


class OnnxBuilder(Builder):
    """Writes one graph and its weights; ONNX Runtime and TensorRT take the same file."""

    name = "onnx"
    Options = OnnxOptions

    def build_rank(
        self,
        checkpoint: Checkpoint,
        request: BuildRequest,
        rank: Rank,
        *,
        out: Path,
        progress: Progress,
    ) -> Mapping[str, Any]:
        """Export the model; the session's options go into the manifest."""
        require_single_rank(rank, self.name)
        options = cast("OnnxOptions", self.options)
        made = export_model(checkpoint, request, out, form=options.cache, progress=progress)
        record = GraphRecord(
            rank=0,
            graph=MODEL,
            opset=made.opset,
            cache=options.cache,
            capacity=made.spec.capacity,
            nodes=made.n_nodes,
            session=SessionRecord(optimization=options.optimization),
        )
        return record.model_dump()
