"""Finding the decode kernels' tile shapes by measurement, once, at build."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from porttool.config import ModelConfig
from porttool.engines.torch.cuda import CudaDecoder
from porttool.engines.torch.cuda_chains import stream, wide
from porttool.engines.torch.cuda_state import Scratch, make_scratch
from porttool.engines.torch.cuda_tuning import (
    AttentionTile,
    StreamTile,
    Tuning,
    WideTile,
    default_stream,
    default_wide,
    shapes,
)
from porttool.engines.torch.cuda_weights import Linear
from porttool.nn import Step, meta_decoder

_COLD_BYTES = 400 << 20
"""Weights that one measurement passes through: several times the L2 cache."""

_SHARED_BYTES = 220 << 10
"""Shared memory of one program, at most."""

_STREAM = (
    (2, 512, 2, 4), (2, 1024, 2, 2), (2, 1024, 4, 2), (2, 1024, 4, 3), (2, 2048, 8, 1),
    (2, 2048, 8, 2), (4, 512, 2, 2), (4, 512, 4, 4), (4, 1024, 4, 1), (4, 1024, 4, 2),
    (4, 1024, 4, 3), (4, 1024, 8, 4), (4, 2048, 8, 2), (8, 512, 4, 2), (8, 512, 8, 4),
    (8, 2048, 16, 1), (8, 1024, 8, 2), (4, 256, 2, 2), (4, 256, 2, 4), (8, 256, 2, 1),
    (8, 256, 2, 2), (8, 256, 2, 3), (8, 256, 4, 2), (8, 256, 4, 4), (16, 256, 4, 2),
    (16, 256, 4, 3), (16, 256, 8, 2), (16, 256, 8, 4), (32, 256, 8, 2), (32, 256, 16, 3),
)  # fmt: skip

_WIDE = (
    (16, 128, 4, 4), (16, 256, 4, 4), (16, 256, 4, 6), (32, 128, 4, 4), (32, 128, 4, 6),
    (32, 256, 4, 3), (64, 64, 4, 4), (64, 64, 4, 6), (64, 128, 4, 4), (64, 128, 8, 3),
    (128, 64, 4, 4), (128, 64, 8, 5), (128, 128, 8, 3), (256, 64, 8, 4),
)  # fmt: skip


def stream_candidates(n: int, k: int, *, gated: bool) -> Iterator[StreamTile]:
    """Tiles worth trying for a single row of a matrix [n, k]."""
    yield default_stream(n, k, gated=gated)
    for block_n, block_k, warps, held in _STREAM:
        block_n //= 2 if gated else 1
        tiles = -(-k // block_k)
        if block_n and n // block_n >= 96 and block_k < 2 * k and held <= tiles <= 64:
            yield StreamTile(block_n, block_k, warps, held)


def wide_candidates(
    n: int, k: int, rows: int, name: str, *, gated: bool
) -> Iterator[WideTile]:
    """Tiles worth trying for several rows, with programs for every multiprocessor."""
    yield default_wide(n, k, rows, name, gated=gated)
    for block_n, block_k, warps, stages in _WIDE:
        block_n //= 2 if gated else 1
        shared = 2 * stages * block_k * (rows + block_n * (2 if gated else 1))
        if shared > _SHARED_BYTES or block_k >= 2 * k or block_n < 16:
            continue
        for split in (1, 2, 4, 8) if name in ("out", "down") else (1,):
            programs = -(-n // block_n) * split
            if min(90, n // 48) <= programs <= 4000 and k // (block_k * split) >= 3:
                if split == 1 or programs <= 420:
                    yield WideTile(block_n, block_k, warps, stages, split)


def random_weights(config: ModelConfig, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Draw every canonical tensor from a normal distribution scaled for finite activations."""
    out = {}
    for name, meta in meta_decoder(config).state_dict().items():
        scale = 0.02 if meta.ndim == 1 else min(0.02, meta.shape[-1] ** -0.5)
        value = torch.empty(meta.shape, dtype=dtype, device=device).normal_(0, scale)
        plain = "norm" in name and name.endswith("weight") and config.norm != "layernorm1p"
        out[name] = value + 1 if plain else value
    return out


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """Compile, warm up and record `work`; return its replay."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def milliseconds(run: Callable[[], None], repeats: int = 7) -> float:
    """Return the median device time of `run`."""
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


class _Bench:
    """One kind of matrix in a chain of its like: cold weights, live activations."""

    def __init__(self, decoder: CudaDecoder, name: str, rows: int) -> None:
        self.decoder, self.name, self.rows = decoder, name, rows
        w = decoder.model.weights
        self.linears: list[Linear] = (
            [w.head] if name == "head" else [getattr(layer, name) for layer in w.layers]
        )
        nbytes = sum(linear.nbytes for linear in self.linears)
        self.passes = max(2, -(-_COLD_BYTES // nbytes))
        c = decoder.config
        self.scratch: Scratch = make_scratch(
            c, max(rows, 16), splits=1, split=8, n_best=-(-c.vocab_size // 2),
            dtype=decoder.dtype, device=decoder.device,
        )  # fmt: skip
        for buffer in (self.scratch.x, self.scratch.normed, self.scratch.attended,
                       self.scratch.hidden):  # fmt: skip
            buffer.normal_()

    def microseconds(self, tile: StreamTile | WideTile) -> float:
        """Return the device time of one matrix."""

        def work() -> None:
            for _ in range(self.passes):
                for linear in self.linears:
                    self._enqueue(linear, tile)

        return milliseconds(captured(work)) * 1000 / (self.passes * len(self.linears))

    def _enqueue(self, linear: Linear, tile: StreamTile | WideTile) -> None:
        s, m, single = self.scratch, self.decoder.model, isinstance(tile, StreamTile)
        x = {"out": s.attended, "down": s.hidden}.get(self.name, s.x if single else s.normed)
        out = {"qkv": s.qkv, "up": s.hidden}.get(self.name)
        act = m.config.activation if self.name == "up" else "none"
        best = self.name == "head"
        if isinstance(tile, StreamTile):
            stream(m, s, linear, tile, self.rows, x, out, act=act, best=best)
        else:
            wide(m, s, linear, tile, self.rows, x, out, act=act, best=best)


def tuning_config(config: ModelConfig) -> ModelConfig:
    """Return the same model with as many layers as keep every matrix out of the L2 cache."""
    layer = 2 * (config.qkv_dim + config.n_head * config.head_dim + config.up_dim
                 + config.d_ff) * config.d_model  # fmt: skip
    smallest = 2 * config.n_head * config.head_dim * config.d_model
    wanted = max(2, -(-_COLD_BYTES // layer), min(128, -(-_COLD_BYTES // smallest) // 3))
    return config.model_copy(update={"n_layer": wanted})


def step_milliseconds(decoder: CudaDecoder, n: int, context: int, tokens: int = 8) -> float:
    """Return the device time of one greedy step of n rows at about `context` tokens."""
    ones = torch.ones(n, dtype=torch.int64)
    step = Step(torch.arange(n), ones[:, None], ones * context, ones)
    decoder.decode(step, tokens)
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        decoder.rewind(n, context)
        start.record()
        decoder.replay_greedy(n, tokens)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / tokens)
    return statistics.median(times[2:])


def tune(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    batch_sizes: tuple[int, ...] = (1,),
    device: str = "cuda",
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure every candidate on this GPU with random weights; return the winners as plain data.

    Tiles for several rows are measured for the tile heights that `batch_sizes` need.
    """
    from porttool.engines.torch.cuda_tuning import default_tuning, tile_rows

    small = tuning_config(config)
    decoder = CudaDecoder(small, random_weights(small, dtype, device), dtype=dtype, n_slots=1,
                          max_len=64, device=device)  # fmt: skip
    chosen = default_tuning(config, device)
    notes: dict[str, float] = {}
    single: dict[str, StreamTile] = {}
    several = {rows: dict(tiles) for rows, tiles in chosen.wide.items()}
    for name, (n, k) in shapes(config).items():
        gated = config.gated and name == "up"
        bench = _Bench(decoder, name, 1)
        timed = {t: bench.microseconds(t) for t in stream_candidates(n, k, gated=gated)}
        single[name] = min(timed, key=timed.__getitem__)
        notes[f"{name} x1"] = round(timed[single[name]], 2)
        report(f"{name} [{n}, {k}] 1 row: {single[name]} {notes[f'{name} x1']} us")
        for rows in sorted({tile_rows(b) for b in batch_sizes if b > 1}):
            bench = _Bench(decoder, name, rows)
            tried = {
                t: bench.microseconds(t)
                for t in wide_candidates(n, k, rows, name, gated=gated)
            }
            several[str(rows)][name] = min(tried, key=tried.__getitem__)
            notes[f"{name} x{rows}"] = round(min(tried.values()), 2)
            report(f"{name} [{n}, {k}] {rows} rows: {several[str(rows)][name]} "
                   f"{notes[f'{name} x{rows}']} us")  # fmt: skip
    return Tuning(chosen.gpu, single, several, chosen.attention, chosen.wide_attention,
                  notes).as_dict()  # fmt: skip


def tune_attention(decoder: CudaDecoder, n: int, context: int) -> dict[AttentionTile, float]:
    """Time whole steps with every cut of the context: milliseconds by cut."""
    out = {}
    before = decoder.tuning
    for splits in (2, 4, 8, 16) if n == 1 else (1, 2):
        for block_t in (16, 32, 64):
            for warps in (1, 2, 4):
                if not 8 <= block_t * decoder.config.head_dim // (32 * warps) <= 64:
                    continue
                tile = AttentionTile(splits, block_t, warps)
                key = "attention" if n == 1 else "wide_attention"
                decoder.use(replace(before, **{key: tile}))
                out[tile] = step_milliseconds(decoder, n, context)
    decoder.use(before)
    return out
