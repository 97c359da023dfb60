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
from porttool.folder import PendingFolder, require_space
from porttool.shards import TensorJob, plan_shards, write_shards
from porttool.sources.safetensors_file import check_entry, read_header
from porttool.weights import cast

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.checkpoint import Checkpoint
    from porttool.progress import Progress

JOURNAL = "journal.jsonl"


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
    total = sum(job.nbytes for job in jobs)
    require_space(out, total)
    progress.start("build", total)
    if dtype == checkpoint.manifest.dtype:
        for name in checkpoint.weight_files():
            checkpoint.copy_file(name, out / name)
            progress.advance((out / name).stat().st_size)
    else:
        write_shards(PendingFolder(out, out), plan_shards(jobs, "model"), workers=2,
                     progress=progress)  # fmt: skip
        (out / JOURNAL).unlink()
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


def tensors_in(file: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a weight file."""
    header, start = read_header(file)
    for name, entry in header.items():
        if name != "__metadata__":
            info, begin = check_entry(file, name, entry)
            yield StoredTensor(name, info.shape, info.dtype, file.name, start + begin, info.nbytes)
