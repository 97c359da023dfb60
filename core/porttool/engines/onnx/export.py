"""Writing the model: weights streamed into files of their own, then the graph, then the checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from porttool.builder import BuildRequest, Rank
from porttool.errors import UsageError, importing, require_extra

if TYPE_CHECKING:
    from porttool.checkpoint import Checkpoint
    from porttool.engines.onnx.blocks import GraphSpec
    from porttool.engines.onnx.record import Form
    from porttool.progress import Progress

MODEL: Final = "model.onnx"


@dataclass(frozen=True)
class Exported:
    """A written model: its specification and what it is made of."""

    path: Path
    spec: GraphSpec
    opset: int
    n_nodes: int


def export_model(
    checkpoint: Checkpoint,
    request: BuildRequest,
    out: Path,
    *,
    form: Form = "scatter",
    progress: Progress,
) -> Exported:
    """Write `model.onnx` and its weight files into a folder; check the graph strictly.

    Raises UsageError for a type that the graph cannot have, EngineError for an invalid graph.
    """
    require_onnx()
    from porttool.engines.onnx.blocks import OPSETS, GraphSpec
    from porttool.engines.onnx.decoder import decoder_model
    from porttool.engines.onnx.graph import check_model, serialized
    from porttool.engines.onnx.weights import write_weights

    if request.dtype == "float64":
        raise UsageError(
            "an ONNX engine is float32, float16 or bfloat16: neither ONNX Runtime nor TensorRT "
            "has the operators in float64; choose another --dtype, or --engine torch"
        )
    limits = request.limits
    spec = GraphSpec(request.config, request.dtype, limits.max_len, limits.max_prompt_rows, form)
    model = decoder_model(spec, write_weights(checkpoint, request.dtype, out, progress=progress))
    path = out / MODEL
    path.write_bytes(serialized(model))
    checked = check_model(str(path))
    return Exported(path, spec, OPSETS[form], len(checked.graph.node))


def require_onnx() -> None:
    """Raise MissingExtra if the onnx package is not installed, or too old."""
    require_extra("onnx", "onnx")
    with importing("onnx", "onnx"):
        import onnx  # noqa: F401


def require_single_rank(rank: Rank, kind: str) -> None:
    """Refuse tensor parallelism: standard ONNX has no operator that joins ranks."""
    if rank.world_size != 1:
        raise UsageError(
            f"--tp {rank.world_size}: the {kind} engine runs on one device, because ONNX has no "
            "standard operator that sums over ranks; use --engine torch for several"
        )
