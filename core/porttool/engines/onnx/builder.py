"""Building an ONNX engine: the graph, its weights, and the session options to run it with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from porttool.builder import Builder, BuildRequest, Rank
from porttool.component import Options
from porttool.config import Closed
from porttool.engines.onnx.export import MODEL, export_model, require_single_rank
from porttool.engines.onnx.record import BuildRecord, Form

if TYPE_CHECKING:
    from porttool.checkpoint import Checkpoint
    from porttool.progress import Progress

Optimization = Literal["none", "basic", "extended", "all"]


class OnnxOptions(Options):
    """How the graph keeps its cache, and how ONNX Runtime is to treat it.

    `cache`: `scatter` writes into a cache of fixed capacity inside the graph (opset 24), `concat`
    joins cache and new tokens and returns the new ones (opset 20). `optimization`: how far ONNX
    Runtime rewrites the graph.
    """

    cache: Form = "scatter"
    optimization: Optimization = "all"


class SessionRecord(Closed):
    """What the builder was told of the session."""

    optimization: Optimization


class GraphRecord(BuildRecord):
    """What the builder notes of the graph in the engine's manifest."""

    of_what = "ONNX graph"
    graph: Literal["model.onnx"]
    opset: int
    cache: Form
    capacity: int
    nodes: int
    session: SessionRecord


class OnnxBuilder(Builder):
    """Writes one graph and its weights; ONNX Runtime and TensorRT take the same file."""

    name = "onnx"
    Options = OnnxOptions
    options: OnnxOptions

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
        options = self.options
        made = export_model(checkpoint, request, out, form=options.cache, progress=progress)
        record = GraphRecord(
            graph=MODEL,
            opset=made.opset,
            cache=options.cache,
            capacity=made.spec.capacity,
            nodes=made.n_nodes,
            session=SessionRecord(optimization=options.optimization),
        )
        return record.model_dump()
