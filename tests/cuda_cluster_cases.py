"""Shapes and tiles for products in clusters."""

from __future__ import annotations

from dataclasses import replace

import torch

import cuda_cases as cases
from porttool.config import ModelConfig
from porttool.engines.torch.cuda_cluster import NAMES
from porttool.engines.torch.cuda_rule import default_tuning
from porttool.engines.torch.cuda_tuning import ClusterTile, Tuning

HOPPER = 132  # multiprocessors of an H200
_LONG = {"n_positions": 640, "vocab_size": 1003}
SHAPES = {
    "learned": {"head_dim": 64, "d_model": 192, "d_ff": 832, **_LONG},
    "multi-query": {"head_dim": 128, "d_model": 768, "d_ff": 3072, **_LONG},
    "gated rotary": {"head_dim": 80, "d_model": 320, "d_ff": 704, **_LONG},
    "grouped rms": {"head_dim": 160, "d_model": 960, "d_ff": 640, **_LONG},
}
TILES = [
    ClusterTile(64, 1, 3, 3),
    ClusterTile(64, 3, 4, 2),
    ClusterTile(128, 5, 2, 1),
    ClusterTile(192, 2, 2, 1),
    ClusterTile(128, 3, 3, 2, by_memory=True),
]


def shape_of(case: str, **changes: object) -> ModelConfig:
    """Return a case's shape, as large as the kernel wants it, with some of it changed."""
    return cases.config(case, **{**SHAPES[case], **changes})


def with_clusters(shape: ModelConfig, device: str, tile: ClusterTile) -> Tuning:
    """Return the rule's tuning, with one tile for every product of every number of rows."""
    products = {str(rows): dict.fromkeys(NAMES, tile) for rows in (16, 32, 64, 128)}
    return replace(default_tuning(shape, device), cluster=products)


def tensors_of(*objects: object) -> dict[int, torch.Tensor]:
    """Return every tensor in (nested) dataclasses and tuples by its address."""
    found: dict[int, torch.Tensor] = {}
    for thing in objects:
        if isinstance(thing, torch.Tensor):
            found[thing.data_ptr()] = thing
        elif isinstance(thing, tuple):
            found |= tensors_of(*thing)
        elif hasattr(thing, "__dataclass_fields__"):
            found |= tensors_of(*(getattr(thing, f) for f in thing.__dataclass_fields__))
    return found
