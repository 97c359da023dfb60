"""Tensor parallelism: which axis each canonical tensor splits on, and one rank's slices.

Column-parallel projections (attention.qkv, mlp.up) split by output rows, row-parallel ones
(attention.out, mlp.down) by input columns (Shoeybi et al. 2019). Query heads are divided; key and
value heads are divided if there are enough of them and repeated on several ranks if not. Each half
of a gated MLP is divided by itself. Embedding and head split by vocabulary rows, padded with zeros
so that every rank has as many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from porttool.builder import Rank
from porttool.config import ModelConfig
from porttool.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    RowReader = Callable[[int, int], Tensor]

VOCABULARY = ("embedding.weight", "head.weight")
ROW_PARALLEL = ("attention.out.weight", "mlp.down.weight")
"""Split by input column."""


def require_divisible(config: ModelConfig, world_size: int) -> None:
    """Refuse a number of ranks that does not divide the heads and the MLP."""
    kv = max(config.n_kv_head, world_size) % min(config.n_kv_head, world_size)
    if config.n_head % world_size or config.d_ff % world_size or kv:
        raise UsageError(
            f"--tp {world_size} does not divide n_head {config.n_head}, n_kv_head "
            f"{config.n_kv_head} and d_ff {config.d_ff}"
        )


def rank_config(config: ModelConfig, world_size: int) -> ModelConfig:
    """Return the shape of one rank's part: its heads, its MLP columns, its vocabulary rows."""
    require_divisible(config, world_size)
    return config.model_copy(
        update={
            "n_head": config.n_head // world_size,
            "n_kv_head": max(1, config.n_kv_head // world_size),
            "d_ff": config.d_ff // world_size,
            "vocab_size": -(-config.vocab_size // world_size),
        }
    )


def row_ranges(name: str, config: ModelConfig, rank: Rank) -> list[tuple[int, int]] | None:
    """Return the row ranges of a tensor that a rank holds, or None if it holds all of them.

    A range may reach past the end of the vocabulary: the missing rows are zeros.
    """
    index, world = rank.index, rank.world_size
    if name in VOCABULARY:
        rows = -(-config.vocab_size // world)
        return [(index * rows, (index + 1) * rows)]
    if ".attention.qkv." in name:
        return list(qkv_ranges(config, rank))
    if ".mlp.up." in name:
        part = config.d_ff // world
        halves = range(2 if config.gated else 1)
        return [(h * config.d_ff + index * part, h * config.d_ff + (index + 1) * part)
                for h in halves]  # fmt: skip
    return None


def qkv_ranges(config: ModelConfig, rank: Rank) -> Iterator[tuple[int, int]]:
    """Yield a rank's rows of the fused projection: its query heads, its key and value heads."""
    query = config.n_head // rank.world_size
    yield rank.index * query * config.head_dim, (rank.index + 1) * query * config.head_dim
    n_kv = max(1, config.n_kv_head // rank.world_size)
    first = rank.index * config.n_kv_head // rank.world_size
    for base in (config.n_head, config.n_head + config.n_kv_head):
        yield (base + first) * config.head_dim, (base + first + n_kv) * config.head_dim


def shard(name: str, config: ModelConfig, rank: Rank, read_rows: RowReader, n_rows: int) -> Tensor:
    """Read one rank's part of a canonical tensor; `read_rows(first, last)` reads whole rows."""
    import torch

    ranges = row_ranges(name, config, rank)
    if ranges is None:
        tensor = read_rows(0, n_rows)
        if name.endswith(ROW_PARALLEL):
            part = tensor.shape[1] // rank.world_size
            return tensor[:, rank.index * part : (rank.index + 1) * part].contiguous()
        return tensor
    pieces = [read_rows(min(first, n_rows), min(last, n_rows)) for first, last in ranges]
    missing = sum(last - first for first, last in ranges) - sum(p.shape[0] for p in pieces)
    if missing:
        pieces.append(pieces[0].new_zeros(missing, *pieces[0].shape[1:]))
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]
