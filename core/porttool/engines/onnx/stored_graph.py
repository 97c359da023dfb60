"""Reading a built graph, which has to be the one that is built from the manifest and the weights.

A graph is a program. Hashes say that it has not changed since they were taken, not that whoever
took them is who built it, and ONNX Runtime does not survive every graph: a LayerNormalization with
an empty name for its bias, for one, ends the process. So nothing that we would not write is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from porttool.engines.onnx.blocks import GraphSpec
from porttool.engines.onnx.decoder import decoder_model
from porttool.engines.onnx.export import MODEL
from porttool.engines.onnx.graph import serialized
from porttool.errors import EngineError, intact

if TYPE_CHECKING:
    from porttool.engine import Engine
    from porttool.engines.onnx.record import Form
    from porttool.engines.onnx.weights import StoredTensor


def read_graph(engine: Engine, form: Form, weights: Mapping[str, StoredTensor]) -> bytes:
    """Return an engine's serialized model, whose weights are in files beside it.

    Raises EngineError if it is not, byte for byte, what the builder writes for the manifest's
    config and limits and for these weights, CheckpointError if it cannot be read.
    """
    made, path = engine.manifest, engine.rank_path() / MODEL
    limits = made.limits
    spec = GraphSpec(made.config, made.dtype, limits.max_len, limits.max_prompt_rows, form)
    with intact(engine.path):
        graph = path.read_bytes()
    if len(graph) < least_size(spec) or graph != serialized(decoder_model(spec, weights)):
        raise EngineError(
            f"{path}: not the graph that is written for the manifest's config, limits and weights; "
            "it was altered, or built by other versions of porttool or onnx: build the engine again"
        )
    return graph


def least_size(spec: GraphSpec) -> int:
    """Return the bytes of what a graph holds for every token: its column, its cosines and sines.

    Limits that ask for a file larger than the one that is there are refused before they are met.
    """
    config = spec.config
    tables = 4 * config.rotary_dim if config.position == "rotary" else 0
    return spec.capacity * (8 + tables)
