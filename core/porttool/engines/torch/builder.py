"""Building a torch engine: one rank's slices of the checkpoint, in the engine's type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from porttool.builder import Builder, BuildRequest, Rank
from porttool.component import Options
from porttool.config import Dtype
from porttool.sharding import rank_config, shard
from porttool.shards import TensorJob, write_files
from porttool.standing import require_space
from porttool.weights import cast

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.checkpoint import Checkpoint
    from porttool.progress import Progress


NOT_JOINED = "no runner takes several ranks yet"


class TorchBuildOptions(Options):
    """`tune`: measure the kernels' tiles on this GPU and keep the fastest, which takes minutes.

    "auto" does where torch sees a GPU that runs the kernels and the model is not tiny, unless they
    were measured here before; true always does, false never.
    """

    tune: bool | Literal["auto"] = "auto"


class TorchBuilder(Builder):
    """Writes safetensors; a single rank of the checkpoint's own type shares its files instead."""

    name = "torch"
    Options = TorchBuildOptions
    options: TorchBuildOptions

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self._tiles: dict[BuildRequest, dict[str, Any]] = {}

    def build_rank(
        self,
        checkpoint: Checkpoint,
        request: BuildRequest,
        rank: Rank,
        *,
        out: Path,
        progress: Progress,
    ) -> Mapping[str, Any]:
        """Choose the kernels' tiles for one rank's shape, then link or write its weights."""
        if rank.world_size > 1 and rank.index == 0:
            progress.note(
                f"{NOT_JOINED}: these {rank.world_size} ranks' slices can be inspected, not run; "
                "an engine of --tp 1 can"
            )
        tiles = self._tiles_of(request, rank, progress)
        found = self.write_rank(checkpoint, request, rank, out=out, progress=progress)
        return {**found, **tiles}

    def _tiles_of(self, request: BuildRequest, rank: Rank, progress: Progress) -> dict[str, Any]:
        """Return the tiles' part of a rank's record; ranks of one shape share what is measured."""
        from porttool.engines.torch.tiles import tiles_at_build

        if self.options.tune == "auto" and rank.world_size > 1:
            return {"not_tuned": NOT_JOINED}
        shape = replace(request, config=rank_config(request.config, rank.world_size))
        if shape not in self._tiles:
            self._tiles[shape] = tiles_at_build(shape, self.options.tune, progress.note).record()
        return self._tiles[shape]

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
        write_files(out, jobs, progress=progress)
        progress.finish()
        return {"rank": rank.index, "weights": f"{request.dtype} slices", "n_head": config.n_head}


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
