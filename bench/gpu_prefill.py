"""Prefill with the attention for Hopper GPUs beside Triton's, in turn in one process on one GPU.

    python bench/gpu_prefill.py [--models gpt2,...] [--out FILE]

float16, random weights at the models' true sizes. `alone`: one layer's attention of prompts that
go through the layers together, and of longer ones, device time from a graph of twenty, medians of
five. `whole`: wall clock of a prefill, medians: right behind others ("in a row"), where a large one
draws all the power that the GPU may take, and after 0.7 s of pause. Rates count two operations for
each multiplication with a key that a query sees.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gpu_decode import RESULTS, ceilings, first_step, prefill_flops, prompts
from gpu_models import SHAPES, config
from porttool.config import Limits, ModelConfig
from porttool.engines.torch import cuda_prompt_attention
from porttool.engines.torch.cuda import CudaDecoder
from porttool.engines.torch.cuda_measure import random_weights
from porttool.engines.torch.cuda_packed import Packed
from porttool.engines.torch.cuda_prefill import _attention
from porttool.engines.torch.cuda_prefill_graph import Size

SIDES = {"Hopper": cuda_prompt_attention.ROUNDS, "Triton": 1 << 30}
"""What ROUNDS has to be for the one to run, and for the other."""

ALONE = ((16, 924), (8, 512), (2, 2048), (1, 8192))
WHOLE = ((32, 512), (128, 512), (32, 924))
REPLAYED, ROUNDS = 20, 5


@contextmanager
def attention_of(side: str) -> Iterator[None]:
    """Let prompts run with the attention of one side."""
    before = cuda_prompt_attention.ROUNDS
    cuda_prompt_attention.ROUNDS = SIDES[side]
    try:
        yield
    finally:
        cuda_prompt_attention.ROUNDS = before


def medians(runs: dict[str, Callable[[], object]], rounds: int, pause: float) -> dict[str, float]:
    """Median wall-clock milliseconds of each side, in turn and first by turns."""
    times: dict[str, list[float]] = {side: [] for side in runs}
    for i in range(rounds):
        for side in sorted(runs, reverse=bool(i % 2)):
            time.sleep(pause)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            runs[side]()
            torch.cuda.synchronize()
            times[side].append((time.perf_counter() - begin) * 1000)
    return {side: statistics.median(found) for side, found in times.items()}


def alone(decoder: CudaDecoder, rows: int, length: int) -> dict[str, float]:
    """Microseconds and rate of one layer's attention, of each side."""
    c, device = decoder.config, decoder.device
    packed = Packed(first_step(prompts(c.vocab_size, rows, length)))
    size = Size(packed.n_tokens, packed.n_rows)
    prompt = size.prompt(packed.padded(size.tokens, size.columns).to(device), length)
    query = torch.randn(packed.n_tokens, c.qkv_dim, device=device).to(decoder.dtype)
    out, graphs, runs = torch.empty_like(query[:, : c.n_head * c.head_dim]).contiguous(), {}, {}
    for side in SIDES:
        with attention_of(side):
            attend = _attention(decoder.model, query, prompt, out)
            attend(0)
            torch.cuda.synchronize()
            graphs[side] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[side]):
                for _ in range(REPLAYED):
                    attend(0)
        runs[side] = graphs[side].replay
    found = medians(runs, ROUNDS, 0.0)
    operations = 4 * rows * c.n_head * c.head_dim * length * (length + 1) / 2
    out_ = {}
    for side, ms in found.items():
        out_[f"{side} us"] = round(ms * 1000 / REPLAYED, 1)
        out_[f"{side} TFLOP/s"] = round(operations * REPLAYED / ms / 1e9)
    return out_


def whole(decoder: CudaDecoder, rows: int, length: int) -> dict[str, float]:
    """Milliseconds of a prefill with each side's attention, in a row and after pauses."""
    step = first_step(prompts(decoder.config.vocab_size, rows, length))
    out: dict[str, float] = {}

    def run(side: str) -> None:
        with attention_of(side):
            decoder.step(step)

    runs = {side: lambda side=side: run(side) for side in SIDES}
    medians(runs, 2, 0.0)  # kernels are compiled, the GPU is warm
    rounds = 3 if rows > 32 else ROUNDS
    for name, pause in (("in a row", 0.0), ("after a pause", 0.7)):
        for side, ms in medians(runs, rounds, pause).items():
            out[f"{side} ms, {name}"] = round(ms, 2)
    return out


def measure(name: str, shape: ModelConfig) -> dict[str, Any]:
    """Every figure of one model."""
    weights = random_weights(shape, torch.float16, "cuda")
    limits = Limits(max_batch_size=128, max_input_len=924, max_output_len=68)
    decoder = CudaDecoder(shape, weights, dtype=torch.float16, limits=limits)
    if decoder.model.prompts is None:
        raise SystemExit(f"{name}: {decoder.description}")
    result: dict[str, Any] = {"alone": {}, "whole": {}}
    for rows, length in WHOLE:
        result["whole"][f"{rows}x{length}"] = whole(decoder, rows, length)
    result["TFLOP of 32x924"] = round(prefill_flops(shape, 32, 924) / 1e12, 2)
    del decoder, weights
    gc.collect()
    longer = shape.model_copy(update={"n_layer": 1, "n_positions": 8192})
    one = random_weights(longer, torch.float16, "cuda")
    limits = Limits(max_batch_size=16, max_input_len=8191, max_output_len=1)
    decoder = CudaDecoder(longer, one, dtype=torch.float16, limits=limits)
    for rows, length in ALONE:
        result["alone"][f"{rows}x{length}"] = alone(decoder, rows, length)
    return result


@torch.inference_mode()
def main() -> None:
    """Measure, and write after each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_prefill.json")
    arguments = parser.parse_args()
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **ceilings()
    }  # fmt: skip
    for name in arguments.models.split(","):
        begin = time.perf_counter()
        found[name] = measure(name, config(name))
        gc.collect()
        torch.cuda.empty_cache()
        print(name, f"{time.perf_counter() - begin:.0f} s", json.dumps(found[name]), flush=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
