"""Building a torch engine: one rank's slices of the checkpoint, in the engine's type."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porttool.builder import Builder, BuildRequest, Rank
from porttool.component import Options
from porttool.config import Dtype
from porttool.errors import UsageError
from porttool.folder import PendingFolder, require_space
from porttool.sharding import rank_config, shard
from porttool.shards import TensorJob, plan_shards, write_shards
from porttool.weights import cast

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.checkpoint import Checkpoint
    from porttool.progress import Progress


class TorchBuildOptions(Options):
    """`tune`: measure the kernels' tiles on this GPU (minutes) and keep the fastest."""

    tune: bool = False


class TorchBuilder(Builder):
    """Writes safetensors; a single rank of the checkpoint's own type shares its files instead."""

    name = "torch"
    Options = TorchBuildOptions

    def build_rank(
        self,
        checkpoint: Checkpoint,
        request: BuildRequest,
        rank: Rank,
        *,
        out: Path,
        progress: Progress,
    ) -> Mapping[str, Any]:
        """Link or write one rank's weights, and measure the kernels if asked to."""
        found = dict(self.write_rank(checkpoint, request, rank, out=out, progress=progress))
        options = self.options
        if isinstance(options, TorchBuildOptions) and options.tune:
            found["tuning"] = measured(request, rank, progress)
        return found

    def write_rank(
        self,
        checkpoint: Checkpoint,
        request: BuildRequest,
        rank: Rank,
        *,
        out: Path,
        progress: Progress,
    ) -> Mapping[str, Any]:
        """Link or write one rank's weights."""
        config = rank_config(request.config, rank.world_size)
        if rank.world_size == 1 and request.dtype == checkpoint.manifest.dtype:
            for name in checkpoint.weight_files():
                checkpoint.copy_file(name, out / name, link=True)
            return {"rank": rank.index, "weights": "the checkpoint's own"}
        jobs = [rank_job(checkpoint, name, request.dtype, rank) for name in checkpoint.names()]
        require_space(out, sum(job.nbytes for job in jobs))
        progress.start(f"build rank {rank.index}", sum(job.nbytes for job in jobs))
        folder = PendingFolder(out, out)
        write_shards(folder, plan_shards(jobs, "model"), workers=2, progress=progress)
        (out / "journal.jsonl").unlink()
        progress.finish()
        return {"rank": rank.index, "weights": f"{request.dtype} slices", "n_head": config.n_head}


def measured(request: BuildRequest, rank: Rank, progress: Progress) -> Mapping[str, Any]:
    """Measure the CUDA kernels for one rank's shape on this machine's GPU; say what was chosen."""
    import torch

    if not torch.cuda.is_available():
        raise UsageError("tune was asked for, but torch sees no GPU; build without it")
    from porttool.engines.torch.cuda_tune import tune, tuned_rows

    limits = request.limits
    sizes = tuned_rows(limits.max_batch_size)
    progress.note(
        f"measuring the kernels' tiles on {torch.cuda.get_device_name()} for batches of "
        f"{', '.join(map(str, sizes))}; each takes from half a minute to several"
    )
    return tune(
        rank_config(request.config, rank.world_size),
        dtype=getattr(torch, request.dtype),
        batch_sizes=sizes,
        context=limits.max_input_len,
        report=progress.note,
    )


def rank_job(checkpoint: Checkpoint, name: str, dtype: Dtype, rank: Rank) -> TensorJob:
    """Say how one rank's part of one tensor is read and written."""
    file = checkpoint.file_of(name)
    info = file.infos()[name]

    def make() -> Tensor:
        part = shard(name, checkpoint.config, rank, partial(file.load_rows, name), info.shape[0])
        return cast(name, part, dtype)

    return TensorJob(name, rank_shape(checkpoint, name, rank), dtype, info.nbytes, make)


def rank_shape(checkpoint: Checkpoint, name: str, rank: Rank) -> tuple[int, ...]:
    """Return the shape of one rank's part, read off a tensor without memory."""
    import torch

    shape = checkpoint.file_of(name).infos()[name].shape
    whole = torch.empty(shape, device="meta")
    part = shard(name, checkpoint.config, rank, lambda a, b: whole[a:b], shape[0])
    return tuple(part.shape)
