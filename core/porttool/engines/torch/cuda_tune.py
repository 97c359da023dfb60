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
from porttool.engines.torch.cuda_tuning import SKINNY_ROWS, Tile, Tuning, default_tuning
from porttool.engines.torch.cuda_weights import Linear
from porttool.nn import meta_decoder

_COLD_BYTES = 400 << 20
"""Weights that one measurement passes through: several times the L2 cache."""


def candidates(n: int, k: int, *, gated: bool) -> Iterator[Tile]:
    """Tiles worth trying for a matrix [n, k]: 8 to 64 weights a thread and load."""
    for warps in (2, 4, 8, 16):
        for block_n in (2, 4, 8, 16, 32):
            for block_k in (256, 512, 1024, 2048):
                share = block_n * block_k * (2 if gated else 1) // (32 * warps)
                if not 16 <= share <= 32 or block_k >= 2 * k or n // block_n < 96:
                    continue
                tiles = -(-k // block_k)
                for held in sorted({1, min(2, tiles), min(4, tiles)}):
                    if held * share > 96 or (tiles - held) * share > 1024:
                        continue
                    for own in {False, held < tiles}:
                        yield Tile("stream", block_n, block_k, warps, held=held, own=own)
    for block_n, block_k, groups, stages in (
        (8, 64, 4, 4), (16, 64, 4, 4), (32, 64, 4, 4), (16, 128, 4, 3), (16, 64, 8, 3),
        (8, 128, 4, 4), (8, 64, 8, 4), (32, 32, 8, 4),
    ):  # fmt: skip
        if n // block_n >= 64:
            yield Tile("tile", block_n, block_k, groups, groups, stages)


def random_weights(config: ModelConfig, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Draw every canonical tensor from a normal distribution scaled for finite activations."""
    out = {}
    for name, meta in meta_decoder(config).state_dict().items():
        scale = 0.02 if meta.ndim == 1 else min(0.02, meta.shape[-1] ** -0.5)
        value = torch.empty(meta.shape, dtype=dtype, device=device).normal_(0, scale)
        out[name] = value + 1 if "norm" in name and name.endswith("weight") else value
    return out


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """Compile, warm up and record `work`; return its replay."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def milliseconds(run: Callable[[], None], repeats: int = 9) -> float:
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


def time_linear(decoder: CudaDecoder, name: str, tile: Tile, n: int) -> float:
    """Microseconds of one matrix in a chain of its like, n rows, weights cold."""
    chain = decoder.chain
    model = replace(decoder.model, tuning=replace(
        decoder.tuning, tiles={**decoder.tuning.tiles, name: tile}))  # fmt: skip
    w = model.weights
    same: list[Linear] = (
        [w.head] if name == "head" else [getattr(layer, name) for layer in w.layers]
    )
    n_best = -(-decoder.config.vocab_size // tile.block_n)
    s = replace(
        chain.scratch,
        best=torch.empty(SKINNY_ROWS, n_best, device=decoder.device),
        where=torch.empty(SKINNY_ROWS, n_best, dtype=torch.int32, device=decoder.device),
    )
    for buffer in (s.x, s.attended, s.hidden):
        buffer.normal_()
    probe = type(chain)(model, decoder.rows, s)
    probe.order = same
    x, out, options = {
        "qkv": (s.x, s.qkv, {}),
        "out": (s.attended, None, {}),
        "up": (s.x, s.hidden, {"act": decoder.config.activation}),
        "down": (s.hidden, None, {}),
        "head": (s.x, None, {"best": True}),
    }[name]
    passes = max(2, -(-_COLD_BYTES // sum(part.nbytes for part in same)))

    def work() -> None:
        for _ in range(passes):
            for at, linear in enumerate(same):
                probe.linear(name, linear, n, x, out, at, **options)  # type: ignore[arg-type]

    return milliseconds(captured(work)) * 1000 / (passes * len(same))


def tuning_config(config: ModelConfig) -> ModelConfig:
    """Return the same model with just enough layers to keep its weights out of the L2 cache."""
    layer = 2 * (config.qkv_dim + config.n_head * config.head_dim + config.up_dim
                 + config.d_ff) * config.d_model  # fmt: skip
    smallest = 2 * config.n_head * config.head_dim * config.d_model
    wanted = max(2, -(-_COLD_BYTES // layer), min(128, -(-_COLD_BYTES // smallest) // 3))
    return config.model_copy(update={"n_layer": wanted})


def tune(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: str = "cuda",
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure every candidate on this GPU with random weights; return the winner as plain data."""
    small = tuning_config(config)
    decoder = CudaDecoder(small, random_weights(small, dtype, device), dtype=dtype, n_slots=1,
                          max_len=64, device=device)  # fmt: skip
    tiles: dict[str, Tile] = {}
    notes: dict[str, float] = {}
    for name in decoder.tuning.tiles:
        linear = decoder.order_of(name)
        n, k = linear.weight.shape
        timed = {
            tile: time_linear(decoder, name, tile, 1)
            for tile in candidates(n // (2 if linear.gated else 1), k, gated=linear.gated)
        }
        tiles[name] = min(timed, key=timed.__getitem__)
        notes[name] = timed[tiles[name]]
        report(f"{name} [{n}, {k}]: {tiles[name]} {notes[name]:.2f} us")
    chosen = default_tuning(config, device)
    chosen = Tuning(**{**chosen.__dict__, "tiles": tiles, "notes": notes})
    return chosen.as_dict()
