"""Writing the folder: tensor by tensor, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from porttool.checkpoint import Checkpoint
from porttool.config import Dtype
from porttool.folder import PendingFolder, pending_folder
from porttool.huggingface_export.architectures import Architecture, Part, architecture_of
from porttool.progress import SILENT, Progress
from porttool.shards import TensorJob, plan_shards, work_key, write_shards
from porttool.standing import require_space
from porttool.weights import cast

if TYPE_CHECKING:
    from torch import Tensor

MARK = "porttool_export.json"
"""Says what a folder is and of which checkpoint; without it the folder is not whole, or another's.
"""
HEAD = Part("lm_head.weight")
MISREAD = "tokenizer.model"
"""NeMo's sentencepiece model: transformers makes a tokenizer with other pieces of the bare file."""


def export(
    checkpoint: Checkpoint,
    output: Path,
    *,
    dtype: Dtype | None = None,
    replace: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Write a folder that transformers loads and return it; resume what was interrupted.

    Norms that the checkpoint stores minus one are written in float32, for 16 bits would round them.
    Raises UsageError for a model that transformers has no architecture for.
    """
    found = architecture_of(checkpoint.config)
    kind = dtype or checkpoint.manifest.dtype
    config = json.dumps(config_values(checkpoint, found, kind), indent=1)
    mark = json.dumps(
        {"format": "huggingface", "porttool_version": version("porttool"),
         "family": checkpoint.manifest.family, "checkpoint_digest": checkpoint.digest},
        indent=1,
    )  # fmt: skip
    jobs = list(plan_jobs(checkpoint, found, kind))
    n_bytes = sum(job.nbytes for job in jobs)
    require_space(output, n_bytes)
    shards = plan_shards(jobs, "model")
    key = work_key(mark + config, shards)
    with pending_folder(
        output, key, manifest=MARK, replace=replace, sources=[checkpoint.path]
    ) as folder:
        progress.start("export huggingface", n_bytes)
        write_shards(folder, shards, workers=2, progress=progress)
        if len(shards) > 1:
            folder.add_bytes("model.safetensors.index.json", index_of(shards, n_bytes))
        copy_tokenizer(folder, checkpoint)
        if (checkpoint.tokenizer / MISREAD).is_file():
            progress.note(f"{MISREAD} is left out: transformers would read it otherwise")
        if checkpoint.manifest.dtype in ("float16", "bfloat16"):
            progress.note(
                "to verify an engine beside it, export a checkpoint that was converted without "
                "--dtype, unless the source is in 16 bits itself: these weights may be rounded"
            )
        folder.add_bytes("config.json", config.encode())
        folder.finish(MARK, mark)
        progress.finish()
    return output


def copy_tokenizer(folder: PendingFolder, checkpoint: Checkpoint) -> None:
    """Put the tokenizer's files beside the weights, as far as transformers reads them alike."""
    for name in checkpoint.tokenizer_files:
        file = checkpoint.path / name
        if file.name != MISREAD:
            folder.add_bytes(file.name, file.read_bytes())
    checkpoint.require_unchanged()


def config_values(checkpoint: Checkpoint, found: Architecture, dtype: Dtype) -> dict[str, object]:
    """Return what config.json holds."""
    tokens = checkpoint.manifest.tokens
    ends = tokens.eos[0] if len(tokens.eos) == 1 else list(tokens.eos) or None
    return {
        "architectures": [found.name], **found.values, "dtype": dtype,
        "tie_word_embeddings": checkpoint.config.tied_head,
        "bos_token_id": tokens.bos, "eos_token_id": ends, "pad_token_id": tokens.pad,
    }  # fmt: skip


def plan_jobs(checkpoint: Checkpoint, found: Architecture, dtype: Dtype) -> Iterator[TensorJob]:
    """Say of every tensor of theirs how it is made of ours."""
    for name in checkpoint.names():
        info = checkpoint.file_of(name).infos()[name]
        for part in (HEAD,) if name == "head.weight" else found.parts(name):
            first, last = part.rows
            shape = ((last or info.shape[0]) - first, *info.shape[1:])
            kind: Dtype = "float32" if part.plus_one and dtype != "float64" else dtype
            yield TensorJob(
                part.name, shape[::-1] if part.transposed else shape, kind, info.nbytes,
                partial(make, checkpoint, name, part, kind),
            )  # fmt: skip


def make(checkpoint: Checkpoint, name: str, part: Part, dtype: Dtype) -> Tensor:
    """Read a canonical tensor and make one of theirs of it."""
    import torch

    tensor = checkpoint.file_of(name).load_rows(name, *part.rows)
    if part.plus_one:
        tensor = tensor.to(getattr(torch, dtype)) + 1
    made = cast(name, tensor, dtype)
    return (made.t() if part.transposed else made).contiguous()


def index_of(shards: Mapping[str, Sequence[TensorJob]], n_bytes: int) -> bytes:
    """Return the index that says which file holds a tensor."""
    where = {job.name: file for file, jobs in shards.items() for job in jobs}
    index = {"metadata": {"total_size": n_bytes}, "weight_map": where}
    return json.dumps(index, indent=1).encode()
