"""Writing a folder of raw arrays, tensor by tensor, whole or not at all."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

from porttool.checkpoint import Checkpoint
from porttool.config import ITEMSIZE, Dtype, ModelConfig
from porttool.errors import UsageError
from porttool.fastertransformer.config_file import CONFIG, NAMES, FolderConfig, format_config
from porttool.fastertransformer.layout import BinFile, bin_files, check_parallel
from porttool.folder import FileRecord, PendingFolder, pending_folder, sync
from porttool.memory import as_bytes
from porttool.progress import SILENT, Progress
from porttool.shards import write_all
from porttool.standing import require_space
from porttool.weights import cast

if TYPE_CHECKING:
    from torch import Tensor


def export(
    checkpoint: Checkpoint,
    output: Path,
    *,
    tp: int = 1,
    dtype: Dtype | None = None,
    replace: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Write `<output>/<tp>-gpu` and return it; resume what was interrupted.

    Raises UsageError for a model that the layout cannot express or `tp` cannot divide.
    """
    check_expressible(checkpoint.config)
    check_parallel(checkpoint.config, tp)
    manifest = checkpoint.manifest
    kind = dtype or manifest.dtype
    own = FolderConfig(
        config=plain_norm(checkpoint.config),
        tokens=manifest.tokens,
        dtype=kind,
        tensor_parallel=tp,
    )
    text = format_config(own)
    target = place_of(output, tp)
    names = checkpoint.names()
    shapes = {name: checkpoint.file_of(name).infos()[name].shape for name in names}
    sizes = {name: math.prod(shape) * ITEMSIZE[kind] for name, shape in shapes.items()}
    require_space(target, sum(sizes.values()))
    key = hashlib.sha256(f"{checkpoint.digest}{text}".encode()).hexdigest()
    with pending_folder(
        target, key, manifest=CONFIG, replace=replace, sources=[checkpoint.path]
    ) as folder:
        progress.start("export fastertransformer", sum(sizes.values()))
        for name in names:
            files = bin_files(name, checkpoint.config)
            if not written(folder, files, tp):
                tensor = cast(name, read(checkpoint, name), kind)
                write_tensor(folder, files, tensor, tp)
            progress.advance(sizes[name])
        for file in checkpoint.tokenizer_files:  # beside the arrays, as TensorRT-LLM has them
            folder.add_bytes(Path(file).name, (checkpoint.path / file).read_bytes())
        checkpoint.require_unchanged()
        folder.finish(CONFIG, text)
        progress.finish()
    return target


def place_of(output: Path, tp: int) -> Path:
    """Return the folder that is made in an output."""
    return output / f"{tp}-gpu"


def check_expressible(config: ModelConfig) -> None:
    """Refuse what FasterTransformer's layout has no place for."""
    problems = {
        "grouped key heads": config.n_kv_head not in (1, config.n_head),
        "RMSNorm": config.norm == "rmsnorm",
        "heads that are not the model's width": config.n_head * config.head_dim != config.d_model,
        "a gated " + config.activation: (config.activation, config.gated) not in NAMES,
    }
    if found := [what for what, wrong in problems.items() if wrong]:
        raise UsageError(f"FasterTransformer's layout cannot express {' and '.join(found)}")


def plain_norm(config: ModelConfig) -> ModelConfig:
    """Return the config with norms stored as they act: the layout has no `layernorm1p`."""
    return config.model_copy(update={"norm": "layernorm"})


def read(checkpoint: Checkpoint, name: str) -> Tensor:
    """Read a canonical tensor; a norm stored minus one gets it back."""
    import torch

    tensor = checkpoint.file_of(name).load(name)
    minus_one = checkpoint.config.norm == "layernorm1p" and name.endswith(
        ("norm.weight", "norm1.weight", "norm2.weight")
    )
    wide = torch.promote_types(tensor.dtype, torch.float32)  # in 16 bits the sum would lose some
    return tensor.to(wide) + 1 if minus_one else tensor


def written(folder: PendingFolder, files: tuple[BinFile, ...], tp: int) -> bool:
    """Tell whether an interrupted run finished all files of a tensor."""
    return all(file.name(r) in folder.files for file in files for r in range(file.parts(tp)))


def write_tensor(
    folder: PendingFolder, files: tuple[BinFile, ...], tensor: Tensor, tp: int
) -> None:
    """Write a tensor's file, or its part for every rank."""
    import torch

    for file in files:
        for rank in range(file.parts(tp)):
            columns = (file.span(rank, tp),) if file.columns is not None else ()
            local = torch.cat([tensor[(r.canonical, *columns)] for r in file.regions(rank, tp)])
            data = as_bytes((local.t() if file.transposed else local).contiguous())
            with (folder.path / file.name(rank)).open("wb", buffering=0) as target:
                write_all(target, data)
                sync(target)
            digest = hashlib.sha256(data).hexdigest()
            folder.add_file(file.name(rank), FileRecord(bytes=len(data), sha256=digest))
