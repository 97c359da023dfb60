"""Measuring each kind of matrix alone, in a chain of its like."""

from __future__ import annotations

import torch
from triton import TritonError

from porttool.config import ModelConfig
from porttool.engines.torch.cuda import CudaDecoder
from porttool.engines.torch.cuda_candidates import stream_candidates, wide_candidates
from porttool.engines.torch.cuda_launch import stream, wide
from porttool.engines.torch.cuda_limits import stageable
from porttool.engines.torch.cuda_measure import (
    captured,
    cold_passes,
    limits_of,
    milliseconds,
    random_weights,
    tuning_config,
)
from porttool.engines.torch.cuda_state import Scratch, make_scratch
from porttool.engines.torch.cuda_tuning import StreamTile, WideTile, shapes
from porttool.engines.torch.cuda_weights import Linear


class _Bench:
    """One kind of matrix in a chain of its like: cold weights, live activations."""

    def __init__(self, decoder: CudaDecoder, name: str, rows: int) -> None:
        self.decoder, self.name, self.rows = decoder, name, rows
        w = decoder.model.weights
        self.linears: list[Linear] = (
            [w.head] if name == "head" else [getattr(layer, name) for layer in w.layers]
        )
        nbytes = sum(linear.nbytes for linear in self.linears)
        self.passes = cold_passes(nbytes, len(self.linears))
        c = decoder.config
        self.scratch: Scratch = make_scratch(
            c, max(rows, 16), splits=1, sums=8 * max(c.d_model, c.qkv_dim),
            n_best=-(-c.vocab_size // 2), dtype=decoder.dtype, device=decoder.device,
        )  # fmt: skip
        for buffer in (self.scratch.x, self.scratch.normed, self.scratch.attended,
                       self.scratch.hidden):  # fmt: skip
            buffer.normal_()

    def microseconds(self, tile: StreamTile | WideTile) -> float:
        """Return the device time of one matrix; infinite for a tile that this GPU does not take."""

        def work() -> None:
            for _ in range(self.passes):
                for linear in self.linears:
                    self._enqueue(linear, tile)

        try:
            recorded = captured(work)
        except TritonError:
            return float("inf")
        return milliseconds(recorded) * 1000 / (self.passes * len(self.linears))

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


def leaders(
    config: ModelConfig, *, dtype: torch.dtype, rows: int, device: str, count: int = 5
) -> dict[str, list[StreamTile | WideTile]]:
    """Measure every candidate alone, in a chain of its like; the fastest few of each matrix."""
    small = tuning_config(config)
    decoder = CudaDecoder(small, random_weights(small, dtype, device), dtype=dtype,
                          limits=limits_of(1, 64), device=device)  # fmt: skip
    out: dict[str, list[StreamTile | WideTile]] = {}
    for name, (n, k) in shapes(config).items():
        bench = _Bench(decoder, name, rows)
        gated = config.gated and name == "up"
        tiles: list[StreamTile | WideTile] = (
            list(stream_candidates(n, k, gated=gated))
            if rows == 1
            else list(
                wide_candidates(n, k, rows, name, gated=gated, staged=stageable(dtype, device))
            )
        )
        timed = {tile: bench.microseconds(tile) for tile in dict.fromkeys(tiles)}
        best = sorted(timed, key=timed.__getitem__)
        out[name] = best[:count] + [tile for tile in best[count:] if not tile.block_n]
    return out
