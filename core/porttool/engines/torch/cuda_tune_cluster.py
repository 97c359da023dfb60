"""Measuring products in clusters, each kind of matrix in a chain of its like."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from porttool.config import ModelConfig
from porttool.engines.torch.cuda import CudaDecoder
from porttool.engines.torch.cuda_candidates import cluster_candidates
from porttool.engines.torch.cuda_cluster import (
    KERNEL,
    NAMES,
    ClusterProduct,
    between,
    macros,
    residual,
)
from porttool.engines.torch.cuda_compile import CompilerUnavailable
from porttool.engines.torch.cuda_hopper import compile_kernel, programs_of
from porttool.engines.torch.cuda_measure import (
    captured,
    cold_passes,
    limits_of,
    milliseconds,
    random_weights,
    tuning_config,
)
from porttool.engines.torch.cuda_state import Between, Scratch, make_scratch
from porttool.engines.torch.cuda_tuning import ClusterTile, shapes
from porttool.errors import EngineError


def cluster_leaders(
    config: ModelConfig, *, dtype: torch.dtype, rows: int, device: str, count: int = 3
) -> dict[str, list[ClusterTile]]:
    """Measure every candidate alone; the fastest few of each matrix, fewer where none runs."""
    small = tuning_config(config)
    decoder = CudaDecoder(small, random_weights(small, dtype, device), dtype=dtype,
                          limits=limits_of(1, 64), device=device)  # fmt: skip
    scratch = make_scratch(small, rows, splits=1, sums=1, n_best=1, dtype=dtype, device=device)
    for buffer in (scratch.x, scratch.normed, scratch.attended, scratch.hidden):
        buffer.normal_()
    scratch.moments.fill_(1.0)  # unset ones could make every product infinite
    out = {}
    for name in NAMES:
        n, k = shapes(config)[name]
        tiles = list(cluster_candidates(
            n, k, rows, programs_of(device), gated=config.gated and name == "up",
            residual=residual(name),
        ))  # fmt: skip
        compile_tiles(config, dtype, rows, {name: tiles})
        kept = between(config, {name: tiles}, rows, device)
        timed = {t: _microseconds(decoder, scratch, kept, name, rows, t) for t in tiles}
        best = sorted((t for t in tiles if timed[t] < float("inf")), key=timed.__getitem__)
        out[name] = best[:count]
    return out


def asked_sooner(tile: ClusterTile) -> list[ClusterTile]:
    """Return a tile with more slots ahead: worth a whole step, where what comes before matters."""
    stages = tile.stages
    more = dict.fromkeys((stages // 2 + 1, -(-3 * stages // 4), stages))
    return [replace(tile, ahead=ahead) for ahead in more if ahead != tile.ahead]


def compile_tiles(
    config: ModelConfig, dtype: torch.dtype, rows: int, tiles: Mapping[str, Sequence[ClusterTile]]
) -> None:
    """Put kernels in the cache, several at a time; what does not compile is found out later."""

    def attempt(one: dict[str, object]) -> None:
        try:
            compile_kernel(KERNEL, one)
        except CompilerUnavailable:
            return

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        list(pool.map(attempt, [
            macros(config, dtype, name, tile, rows) for name in tiles for tile in tiles[name]
        ]))  # fmt: skip


def _microseconds(
    decoder: CudaDecoder, scratch: Scratch, kept: Between, name: str, rows: int,
    tile: ClusterTile,
) -> float:  # fmt: skip
    """Return the device time of one matrix; infinite for a tile that does not run."""
    layers = range(1, decoder.config.n_layer)  # the first layer's qkv is another kernel
    try:
        products = [
            ClusterProduct(decoder.model, scratch, i, name, rows, tile, kept) for i in layers
        ]
        nbytes = sum(getattr(decoder.model.weights.layers[i], name).nbytes for i in layers)
        passes = cold_passes(nbytes, len(products))

        def work() -> None:
            for _ in range(passes):
                for product in products:
                    product.enqueue()

        return milliseconds(captured(work)) * 1000 / (passes * len(products))
    except (CompilerUnavailable, EngineError):
        return float("inf")
