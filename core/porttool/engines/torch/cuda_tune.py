"""Finding the decode kernels' tile shapes by measurement, once, at build."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from triton import TritonError

from porttool.config import ModelConfig
from porttool.engines.torch.cuda import CudaDecoder
from porttool.engines.torch.cuda_balanced import unsuited as balanced_unsuited
from porttool.engines.torch.cuda_candidates import (
    attention_candidates,
    balanced_candidates,
    persistent_candidates,
)
from porttool.engines.torch.cuda_cluster import unsuited as clusters_unsuited
from porttool.engines.torch.cuda_compile import CompilerUnavailable
from porttool.engines.torch.cuda_hopper import programs_of
from porttool.engines.torch.cuda_limits import stageable
from porttool.engines.torch.cuda_measure import (
    limits_of,
    random_weights,
)
from porttool.engines.torch.cuda_persistent import unsuited
from porttool.engines.torch.cuda_tune_alone import leaders
from porttool.engines.torch.cuda_tune_cluster import asked_sooner, cluster_leaders, compile_tiles
from porttool.engines.torch.cuda_tuning import (
    SMALL_ROWS,
    AttentionTile,
    ClusterTile,
    PersistentTile,
    StreamTile,
    Tuning,
    WideTile,
    tile_rows,
)
from porttool.errors import EngineError
from porttool.nn import Step

_MEASURED_MS = 200
"""A step is measured for about this long, more often than three times only within it."""

RETRIED = 8
"""Kinds of attention that are measured again, when the products beside them have been chosen."""


def step_milliseconds(decoder: CudaDecoder, n: int, context: int, tokens: int = 8) -> float:
    """Return the device time of one greedy step of n rows at about `context` tokens."""
    decoder.decode(Step.decode([1] * n, list(range(n)), [context] * n), tokens)
    times: list[float] = []
    while len(times) < 3 or (len(times) < 6 and sum(times) * 3 * tokens < _MEASURED_MS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        decoder.rewind(n, context)
        decoder.replay_greedy(n, tokens)  # the launch of the next graphs hides behind this one
        start.record()
        for _ in range(3):
            decoder.replay_greedy(n, tokens)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / (3 * tokens))
    return float(statistics.median(times[1:]))


def with_tile(tuning: Tuning, name: str, tile: StreamTile | WideTile, n: int) -> Tuning:
    """Return a tuning with one matrix's tile changed, for steps of n rows."""
    if isinstance(tile, StreamTile):
        return replace(tuning, stream={**tuning.stream, name: tile})
    rows = str(tile_rows(n))
    return replace(tuning, wide={**tuning.wide, rows: {**tuning.wide[rows], name: tile}})


class _Search:
    """The best tuning so far of one decoder, and what its whole step takes."""

    def __init__(self, decoder: CudaDecoder, n: int, context: int) -> None:
        self.decoder, self.n, self.context = decoder, n, context
        self.best = decoder.tuning
        self.time = step_milliseconds(decoder, n, context)

    def offer(self, tuning: Tuning) -> float:
        """Measure a whole step; keep the tuning if the step got faster."""
        try:
            self.decoder.use(tuning)
            time = step_milliseconds(self.decoder, self.n, self.context)
        except (TritonError, CompilerUnavailable, EngineError):
            time = float("inf")
        if time < self.time:
            self.best, self.time = tuning, time
        else:
            self.decoder.use(self.best)
        return time

    def offer_tile(self, name: str, tile: StreamTile | WideTile) -> None:
        """Measure one matrix in another tile."""
        self.offer(with_tile(self.best, name, tile, self.n))

    def offer_attention(self, tiles: Iterable[AttentionTile]) -> list[AttentionTile]:
        """Measure cuts of the context; return them, the fastest first."""
        times = {}
        for tile in tiles:
            if self.n == 1:
                times[tile] = self.offer(replace(self.best, attention=tile))
            else:
                several = {**self.best.wide_attention, str(tile_rows(self.n)): tile}
                times[tile] = self.offer(replace(self.best, wide_attention=several))
        return sorted(times, key=times.__getitem__)

    def offer_persistent(self) -> None:
        """Measure the persistent kernel, one of its numbers after the other."""
        d, times = self.decoder, dict[PersistentTile, float]()
        if unsuited(d.config, d.dtype, d.device):
            return
        for tiles in persistent_candidates(d.config, programs_of(d.device)):
            best = min(times, key=times.__getitem__, default=None)
            for tile in tiles:
                whole = PersistentTile(**tile) if best is None else replace(best, **tile)
                times[whole] = self.offer(replace(self.best, persistent=whole))

    def offer_clusters(self, found: Mapping[str, list[ClusterTile]]) -> None:
        """Measure products in clusters, one matrix after the other, beside what was best so far."""
        rows = tile_rows(self.n)
        best, time = {name: tiles[0] for name, tiles in found.items()}, float("inf")
        if now := self.best.cluster.get(str(rows)):
            best, time = dict(now), self.time

        def attempt(name: str, tile: ClusterTile) -> None:
            nonlocal best, time
            several = {**best, name: tile}
            if several == now:
                return
            took = self.offer(replace(self.best, cluster={**self.best.cluster, str(rows): several}))
            if took < time:
                best, time = several, took

        for name, tiles in found.items():
            for tile in tiles:
                attempt(name, tile)
        sooner = {name: asked_sooner(tile) for name, tile in best.items()}
        compile_tiles(self.decoder.config, self.decoder.dtype, rows, sooner)
        for name, tiles in sooner.items():
            for tile in tiles:
                attempt(name, tile)


def refine(
    decoder: CudaDecoder, found: Mapping[str, list[StreamTile | WideTile]], n: int, context: int,
    clustered: Mapping[str, list[ClusterTile]] | None = None,
    balanced: Sequence[AttentionTile] = (),
) -> float:  # fmt: skip
    """Try the leaders in the whole step of n rows, where neighbours matter; milliseconds."""
    alone = decoder.tuning.persistent
    rows = str(tile_rows(n)) if n > 1 else ""
    others = {k: v for k, v in decoder.tuning.cluster.items() if k != rows}
    # only a single row's search shall build a persistent kernel
    first = replace(decoder.tuning, persistent=None, cluster=others)
    for name, tiles in found.items():
        first = with_tile(first, name, next(t for t in tiles if t.block_n), n)
    decoder.use(first)
    search = _Search(decoder, n, context)
    staged = stageable(decoder.dtype, decoder.device)
    search.offer_attention(attention_candidates(decoder.config, n, staged=staged))
    balanced = search.offer_attention(balanced)
    for name, tiles in found.items():
        for tile in tiles:
            search.offer_tile(name, tile)
    if clustered and all(clustered.values()):
        search.offer_clusters(clustered)
        search.offer_attention(balanced[:RETRIED])  # its neighbours are others now
        if rows in search.best.cluster:
            search.offer_clusters(clustered)  # and so may theirs be
    if n == 1:
        search.offer(replace(search.best, join_in_out=True))
        search.offer_persistent()
        alone = search.best.persistent
    decoder.use(replace(search.best, persistent=alone))
    return search.time


def balanced_for(decoder: CudaDecoder, n: int, context: int) -> list[AttentionTile]:
    """Balanced attention to measure for n rows; few rows may be tokens that see each other."""
    d = decoder
    if n <= SMALL_ROWS or balanced_unsuited(d.config, d.dtype, d.device):
        return []
    return list(balanced_candidates(d.config, n, context))


def tuned_rows(max_batch_size: int) -> tuple[int, ...]:
    """One batch size for every row tile that batches of up to so many rows run in."""
    tops = {tile_rows(n): n for n in range(2, max_batch_size + 1)}
    return 1, *(min(top, rows) for rows, top in sorted(tops.items()))


def tune(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    batch_sizes: tuple[int, ...] = (1,),
    context: int = 512,
    device: str = "cuda",
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure the candidates on this GPU with random weights; the winners as plain data.

    Each matrix is first measured alone, then its fastest few in whole steps of each batch size
    at `context` tokens. Steps of other sizes run in the tiles of the same `tile_rows`.
    """
    found, clustered = {}, {}
    for n in batch_sizes:
        report(f"{n} rows: measuring each matrix alone")
        rows = 1 if n == 1 else tile_rows(n)
        found[n] = leaders(config, dtype=dtype, rows=rows, device=device)
        if n > 1 and not clusters_unsuited(config, dtype, device):
            clustered[n] = cluster_leaders(config, dtype=dtype, rows=rows, device=device)
    decoder = CudaDecoder(
        config, random_weights(config, dtype, device), dtype=dtype,
        limits=limits_of(max(batch_sizes), context + 128), device=device,
    )  # fmt: skip
    for cached in (decoder.model.cache.keys, decoder.model.cache.values):
        cached.normal_()  # zeros would draw less power and run faster
    notes = {}
    for n in batch_sizes:
        report(f"{n} rows: measuring whole steps")
        balanced = balanced_for(decoder, n, context)
        took = round(refine(decoder, found[n], n, context, clustered.get(n), balanced), 4)
        notes[f"ms at {n} x {context}"] = took
        report(f"tuned for {n} rows: {took} ms a step; {decoder.tuning.described(n)}")
    return replace(decoder.tuning, notes=notes).as_dict()
