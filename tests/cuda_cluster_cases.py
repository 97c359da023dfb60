"""Shapes and tiles for products in clusters, and a double of their kernel that runs on a CPU."""

from __future__ import annotations

from dataclasses import replace

import torch

import cuda_cases as cases
from porttool.config import ModelConfig
from porttool.engines.torch.cuda_cluster import NAMES
from porttool.engines.torch.cuda_tuning import ClusterTile, Tuning, default_tuning

HOPPER = 132  # multiprocessors of an H200
_LONG = {"n_positions": 640, "vocab_size": 1003}
SHAPES = {
    "learned": {"head_dim": 64, "d_model": 192, "d_ff": 832, **_LONG},
    "multi-query": {"head_dim": 128, "d_model": 768, "d_ff": 3072, **_LONG},
    "gated rotary": {"head_dim": 80, "d_model": 320, "d_ff": 704, **_LONG},
    "grouped rms": {"head_dim": 160, "d_model": 960, "d_ff": 640, **_LONG},
}
TILES = [ClusterTile(64, 1, 3, 3), ClusterTile(64, 3, 4, 2), ClusterTile(128, 5, 2, 1)]


def shape_of(case: str, **changes: object) -> ModelConfig:
    """Return a case's shape, as large as the kernel wants it, with some of it changed."""
    return cases.config(case, **{**SHAPES[case], **changes})


def with_clusters(shape: ModelConfig, device: str, tile: ClusterTile) -> Tuning:
    """Return the rule's tuning, with one tile for every product of every number of rows."""
    products = {str(rows): dict.fromkeys(NAMES, tile) for rows in (16, 32, 64, 128)}
    return replace(default_tuning(shape, device), cluster=products)


class Kernel:
    """In the kernel's place: computes on a CPU from the addresses that it is given.

    `known` are all tensors by their addresses. What products tell of the residual stream is kept
    by tiles, as the kernel leaves it, so that a reader with other tiles would go wrong.
    """

    def __init__(self, defined, known) -> None:
        self.defined, self.known = dict(defined), known

    def at(self, address: int | None) -> torch.Tensor | None:
        return None if address is None else self.known[address]

    def launch_clusters(self, grid, cluster, stream, a, *, chained) -> None:
        d, kind = self.defined, type("Kind", (), self.defined)
        assert cluster == d["SPLIT"]
        assert grid[0] == -(-a.columns // d["BLOCK_N"]) * cluster
        assert grid[1] == -(-a.rows // d["BLOCK_M"])
        weights = self.at(a.weights[0]).double()
        inputs = self.at(a.inputs[0])[: a.rows, : a.chunks * 64].double()
        bias, tile = self.at(a.bias), d["BLOCK_N"]
        value = inputs @ weights.T
        if kind.NORM:
            told = self.at(a.heard).reshape(-1)[: a.heard_tiles * a.rows * 2]
            first, second = told.view(a.heard_tiles, a.rows, 2).sum(0).double().unbind(-1)
            mean = torch.zeros_like(first) if kind.RMS else first / a.width
            scale = (second / a.width - mean**2 + float(d["EPS"][:-1])).rsqrt()
            column = self.at(a.column_sum).double()
            value = scale[:, None] * (value * a.taken - mean[:, None] * column)
        value = value if bias is None else value + bias.double()
        if kind.GATED:
            value, gate = value[:, : a.columns], value[:, a.columns :]
        if kind.ACTIVATED:
            value = activated(value, next(k for k in d if k.startswith("ACT_"))[4:])
        value = value * gate if kind.GATED else value
        if not kind.RESIDUAL:
            self.at(a.out)[: a.rows] = value
            return
        x = self.at(a.x)[: a.rows]
        x += value
        self.at(a.out)[: a.rows] = x * self.at(a.gamma) * a.given
        parts = [torch.stack((p.sum(1), (p**2).sum(1)), -1) for p in x.split(tile, 1)]
        told = torch.stack(parts)
        self.at(a.told).reshape(-1)[: told.numel()] = told.reshape(-1)


def activated(value: torch.Tensor, kind: str) -> torch.Tensor:
    f = torch.nn.functional
    return {"gelu_tanh": lambda v: f.gelu(v, approximate="tanh"), "gelu": f.gelu,
            "silu": f.silu}[kind](value)  # fmt: skip


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
