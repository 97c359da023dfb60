"""The weight files beside an ONNX model: canonical tensors in safetensors, referred to by offset.

They are what every porttool engine holds, so they are verified like any other's. What the graph
needs otherwise (linear weights as [in, out], norms in float32) are constant operations in it, which
every runtime folds when it loads. Files of the checkpoint's own type are copied, not linked: onnx
refuses external data with several hard links.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from porttool.config import Dtype
from porttool.engines.onnx.element_types import ELEMENT_TYPES
from porttool.errors import EngineError
from porttool.nn import require_shapes
from porttool.shards import TensorJob, write_files
from porttool.sources.safetensors_file import SafetensorsFile, check_entry, read_header
from porttool.standing import require_space
from porttool.weights import cast, listing

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.checkpoint import Checkpoint
    from porttool.engine import Engine
    from porttool.progress import Progress


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a weight file, and where its bytes are."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int
    nbytes: int


def write_weights(
    checkpoint: Checkpoint, dtype: Dtype, out: Path, *, progress: Progress
) -> dict[str, StoredTensor]:
    """Copy the checkpoint's files, or write another type; return where every tensor is."""
    jobs = [weight_job(checkpoint, name, dtype) for name in checkpoint.names()]
    copied = checkpoint.weight_files() if dtype == checkpoint.manifest.dtype else []
    sizes = {name: (checkpoint.path / name).stat().st_size for name in copied}
    total = sum(sizes.values()) if copied else sum(job.nbytes for job in jobs)
    require_space(out, total)
    progress.start("build", total)
    for name, size in sizes.items():
        checkpoint.copy_file(name, out / name)
        progress.advance(size)
    if not copied:
        write_files(out, jobs, progress=progress)
    progress.finish()
    files = sorted(out.glob("*.safetensors"))
    return {tensor.name: tensor for file in files for tensor in tensors_in(file)}


def weight_job(checkpoint: Checkpoint, name: str, dtype: Dtype) -> TensorJob:
    """Say how one tensor is read and written in a type."""
    file = checkpoint.file_of(name)
    info = file.infos()[name]

    def make() -> Tensor:
        return cast(name, file.load(name), dtype)

    return TensorJob(name, info.shape, dtype, info.nbytes, make)


def stored_weights(engine: Engine) -> dict[str, StoredTensor]:
    """Return where an engine's tensors are: those of its config, whole, and of its type.

    Raises SourceError for a file that is no safetensors, EngineError for other tensors.
    """
    made = engine.manifest
    if made.dtype not in ELEMENT_TYPES:
        raise EngineError(f"{engine.path}: no ONNX engine is {made.dtype}; build it again")
    files = [engine.path / name for name in sorted(made.files) if name.endswith(".safetensors")]
    found = [t for f in files if f.parent == engine.rank_path() for t in tensors_in(f)]
    stored = {tensor.name: tensor for tensor in found}
    require_shapes(made.config, {name: tensor.shape for name, tensor in stored.items()})
    if wrong := [name for name, tensor in stored.items() if tensor.dtype != made.dtype]:
        raise EngineError(
            f"{engine.path}: the manifest says {made.dtype}, which the weights are not: "
            f"{listing(wrong)}; build the engine again"
        )
    return stored


def tensors_in(file: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a weight file."""
    SafetensorsFile(file)  # refuses one whose header does not fit its size
    header, head = read_header(file)
    for name, entry in header.items():
        if name != "__metadata__":
            info, begin = check_entry(file, name, entry)
            begin += len(head)
            yield StoredTensor(name, info.shape, info.dtype, file.name, begin, info.nbytes)
