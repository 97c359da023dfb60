"""How the canonical tensors are stored beside an ONNX model: layout, types and offsets.

The files are safetensors like all of porttool's, written tensor by tensor; the model refers to
them by offset, which is known before anything is written. Linear weights are [in, out], what
MatMul takes; the embedding stays [vocab_size, d_model] and serves as a tied head as it is. Norms
are float32, and `layernorm1p`'s one is added here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from porttool.config import Dtype, ModelConfig
from porttool.shards import MAX_SHARD_BYTES, TensorJob, encode_header, plan_shards
from porttool.sources.safetensors_file import CODES, DTYPES
from porttool.weights import cast

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.checkpoint import Checkpoint

MAX_BYTES = MAX_SHARD_BYTES

METADATA = {"format": "pt"}
"""What `write_tensors` puts into a header: its length moves the data."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a weight file, and where its bytes are."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int
    nbytes: int


def is_transposed(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a canonical tensor is a linear weight that MatMul wants as [in, out]."""
    return len(shape) == 2 and name not in ("embedding.weight", "position.weight", "head.weight")


def is_norm(name: str) -> bool:
    """Return whether a canonical tensor belongs to a norm."""
    return name.rsplit(".", 2)[-2].startswith("norm")


def store_tensor(name: str, tensor: Tensor, *, config: ModelConfig, dtype: Dtype) -> Tensor:
    """Bring a canonical tensor into the engine's type and the layout of the graph."""
    made = cast(name, tensor, dtype)
    if is_norm(name):
        made = made.float()
        return made + 1 if config.norm == "layernorm1p" and name.endswith("weight") else made
    return made.t().contiguous() if is_transposed(name, tuple(made.shape)) else made


def weight_jobs(checkpoint: Checkpoint, dtype: Dtype) -> list[TensorJob]:
    """Say how every tensor is read and written; wide types first, so that all stay aligned."""
    jobs = [weight_job(checkpoint, name, dtype) for name in checkpoint.names()]
    return sorted(jobs, key=lambda job: -DTYPES[CODES[job.dtype]][1])


def weight_job(checkpoint: Checkpoint, name: str, dtype: Dtype) -> TensorJob:
    """Say how one tensor is read and written."""
    file = checkpoint.file_of(name)
    info = file.infos()[name]
    stored = "float32" if is_norm(name) else dtype
    shape = info.shape[::-1] if is_transposed(name, info.shape) else info.shape
    cost = 2 * math.prod(shape) * DTYPES[CODES[stored]][1] + info.nbytes
    make = partial(make_tensor, checkpoint, name, dtype)
    return TensorJob(name, shape, stored, cost, make)


def make_tensor(checkpoint: Checkpoint, name: str, dtype: Dtype) -> Tensor:
    """Read one tensor and store it."""
    read = checkpoint.file_of(name).load(name)
    return store_tensor(name, read, config=checkpoint.config, dtype=dtype)


def plan_files(jobs: Sequence[TensorJob]) -> dict[str, list[TensorJob]]:
    """Divide the tensors into files."""
    return plan_shards(jobs, "model", MAX_BYTES)


def place_tensors(shards: Mapping[str, Sequence[TensorJob]]) -> dict[str, StoredTensor]:
    """Return where every tensor will be, before any is written."""
    placed: dict[str, StoredTensor] = {}
    for file, jobs in shards.items():
        offset = len(encode_header(jobs, METADATA))
        for job in jobs:
            placed[job.name] = StoredTensor(
                job.name, job.shape, job.dtype, file, offset, job.nbytes
            )
            offset += job.nbytes
    return placed
