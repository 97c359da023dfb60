"""Decoding and prefill on one GPU: porttool beside transformers, the same weights, in one run.

    python bench/gpu_decode.py [--models gpt2,...] [--tuning FILE] [--compile gpt2] [--out FILE]

float16, random weights at the models' true sizes, prompts of 512 tokens, 64 new tokens, greedy,
end tokens ignored. A decoded step of ours is a 64th of 64 tokens after the prefill, wall clock
with the host waiting for the tokens, best of five after two warm-ups. Of transformers it is (time
of 65 new tokens - time of 1) / 64, and of ours up to 32 rows too (`by difference`); at 128 rows
that would be a difference of times that are mostly prefill. A prefill is the best of three in a row
behind the decoded steps, and of two after a pause of the GPU (`rested`). Bandwidth and the matrix
product's rate are measured in the same run. Tokens are compared with transformers' over 64 tokens
of 32 prompts: where they first part, the reference's own logits of the two candidates are compared
(`gap`, beside the spread of the row's logits).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from torch import Tensor

from gpu_models import REQUIRED, SHAPES, config, peer, weights_of
from porttool.config import Limits, ModelConfig
from porttool.engines.torch.cuda import CudaDecoder
from porttool.engines.torch.cuda_measure import milliseconds, random_weights
from porttool.engines.torch.kernels.norm import blocking, residual_norm_kernel
from porttool.nn import Step

PROMPT, NEW = 512, 64
RESULTS = Path(__file__).parent / "results"


def timed(run: Callable[[], object], repeats: int = 3) -> float:
    """Return the best wall-clock milliseconds of a few runs after two that warm up."""
    times = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1000)
    return min(times[2:])


def rested(run: Callable[[], object]) -> float:
    """Return the better milliseconds of two runs, each after a pause, as a request may find it."""
    times = []
    for _ in range(2):
        time.sleep(0.7)
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1000)
    return min(times)


def ceilings() -> dict[str, float]:
    """Measure what the memory reads and the matrix units multiply."""
    big = torch.empty(1 << 31, dtype=torch.float16, device="cuda").normal_()
    read = big.nbytes / milliseconds(big.sum) / 1e9
    del big
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    rate = 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9
    return {"read TB/s": round(read, 3), "GEMM TFLOP/s": round(rate, 1)}


def norm_kernel() -> dict[str, Any]:
    """The residual and layer norm kernel beside PyTorch's two operations, 16384 rows."""
    return {str(width): _norm_at(width) for width in (768, 1600, 2048, 4096, 6144)}


def _norm_at(width: int) -> dict[str, float]:
    x, delta = (torch.randn(16384, width, dtype=torch.float16, device="cuda") for _ in "ab")
    gamma, beta = torch.randn(2, width, device="cuda")
    half = gamma.half(), beta.half()
    normed = torch.empty_like(x)

    def ours() -> None:
        residual_norm_kernel[(16384,)](
            x, delta, gamma, gamma, beta, normed, 1e-5, 16384, D=width, PARTS=1, HAS_BIAS=False,
            RMS=False, HAS_BETA=True, PDL=False, EARLY=False, **blocking(width, x.element_size()),
        )  # fmt: skip

    def theirs() -> None:
        torch.nn.functional.layer_norm(x.add_(delta), (width,), *half)

    times = [milliseconds(ours, 21), milliseconds(theirs, 21)]
    return {
        "porttool us": round(times[0] * 1000, 1), "PyTorch us": round(times[1] * 1000, 1),
        "porttool TB/s": round(4 * x.nbytes / times[0] / 1e9, 2),
    }  # fmt: skip


def prompts(vocab_size: int, n: int, length: int = PROMPT) -> Tensor:
    """Draw n prompts, always the same ones."""
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, vocab_size, (n, length), generator=generator)


def first_step(tokens: Tensor) -> Step:
    """Return the step that feeds whole prompts."""
    n, length = tokens.shape
    zeros = torch.zeros(n, dtype=torch.int64)
    return Step(torch.arange(n), tokens, zeros, zeros + length)


def generate(decoder: CudaDecoder, tokens: Tensor, n_new: int) -> Tensor:
    """Greedy tokens [n, n_new] on the host."""
    n, length = tokens.shape
    first = decoder.step(first_step(tokens)).argmax(-1)
    if n_new == 1:
        return first[:, None].cpu()
    ones = torch.ones(n, dtype=torch.int64)
    step = Step(torch.arange(n), first[:, None].cpu(), ones * length, ones)
    return torch.cat((first[:, None], decoder.decode(step, n_new - 1)), dim=1).cpu()


def decoded_step(decoder: CudaDecoder, tokens: Tensor) -> float:
    """Return milliseconds of one decoded step after prompts."""
    n, length = tokens.shape
    first = decoder.step(first_step(tokens)).argmax(-1)
    ones = torch.ones(n, dtype=torch.int64)
    step = Step(torch.arange(n), first[:, None].cpu(), ones * length, ones)
    return timed(lambda: decoder.decode(step, NEW).cpu(), 5) / NEW


def by_difference(run: Callable[[int], object]) -> float:
    """Return the same of `run(number of new tokens)`, which holds the prefill."""
    return (timed(lambda: run(NEW + 1)) - timed(lambda: run(1))) / NEW


def measure_porttool(decoder: CudaDecoder, name: str) -> dict[str, Any]:
    """Every figure of ours for one model."""
    c, out = decoder.config, {}
    for i, n in enumerate((1, 32, 128)):
        tokens = prompts(c.vocab_size, n)
        begin = time.perf_counter()
        generate(decoder, tokens, 9)
        torch.cuda.synchronize()
        out[f"b{n} first use s"] = round(time.perf_counter() - begin, 2)
        out[f"b{n} ms"] = round(decoded_step(decoder, tokens), 4)
        if n <= 32:
            found = by_difference(lambda k, t=tokens: generate(decoder, t, k))
            out[f"b{n} ms by difference"] = round(found, 4)
        out[f"b{n} required"] = REQUIRED[name][i]
        step = first_step(tokens)
        out[f"prefill {n}x512 ms"] = round(timed(lambda s=step: decoder.step(s)), 2)
        if n <= 32:
            out[f"prefill {n}x512 ms, rested"] = round(rested(lambda s=step: decoder.step(s)), 2)
    long = first_step(prompts(c.vocab_size, 32, 924))
    out["prefill 32x924 ms"] = round(timed(lambda: decoder.step(long)), 2)
    flops = prefill_flops(c, 32, 924)
    out["prefill 32x924 TFLOP/s"] = round(flops / out["prefill 32x924 ms"] / 1e9, 1)
    return out


def prefill_flops(c: ModelConfig, rows: int, length: int) -> int:
    """What a prefill computes; the last layer's part behind keys and values, for last tokens only.

    A token of attention sees half of the row, in two products.
    """
    heads = c.n_head * c.head_dim
    behind = c.d_model * (heads + c.up_dim + c.d_ff) + length * heads
    layer = c.d_model * c.qkv_dim + behind
    tokens = rows * length
    return 2 * (tokens * (c.n_layer * layer - behind) + rows * behind)


def make(name: str, weights: dict[str, Tensor], tuning: Any) -> tuple[CudaDecoder, dict[str, Any]]:
    """Load a decoder of 128 rows and say what memory and time that took."""
    torch.cuda.synchronize()
    before, begin = torch.cuda.memory_allocated(), time.perf_counter()
    limits = Limits(max_batch_size=128, max_input_len=924, max_output_len=68)
    decoder = CudaDecoder(config(name), weights, dtype=torch.float16, limits=limits, tuning=tuning)
    torch.cuda.synchronize()
    cache = decoder.model.cache
    kv = cache.keys.nbytes + cache.values.nbytes
    nbytes = sum(w.nbytes for w in weights.values())
    return decoder, {
        "pack s": round(time.perf_counter() - begin, 2), "weights GB": round(nbytes / 1e9, 3),
        "KV GB": round(kv / 1e9, 3), "before": before,
    }  # fmt: skip


def compare(decoder: CudaDecoder, model: torch.nn.Module) -> dict[str, Any]:
    """Greedy tokens of 32 prompts beside transformers', and what parts them."""
    tokens = prompts(decoder.config.vocab_size, 32)
    ours = generate(decoder, tokens, NEW)
    theirs = model.generate(
        tokens.cuda(), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )[:, PROMPT:].cpu()  # fmt: skip
    gaps, spread = [], 0.0
    for row in range(32):
        parted = (ours[row] != theirs[row]).nonzero()
        if len(parted):
            at = int(parted[0])
            seen = torch.cat((tokens[row], theirs[row, :at])).cuda()[None]
            logits = model(seen).logits[0, -1].float()
            gaps.append(float(logits[theirs[row, at]] - logits[ours[row, at]]))
            spread = max(spread, float(logits.std()))
    return {
        "rows the same": 32 - len(gaps), "largest gap where they part": max(gaps, default=0.0),
        "deviation of a row's logits": spread,
    }  # fmt: skip


def measure_peer(model: torch.nn.Module, *, compiled: bool) -> dict[str, float]:
    """Decoded steps of transformers: eager with its dynamic cache, or static and compiled."""
    out = {}
    options: dict[str, Any] = {"cache_implementation": "static"} if compiled else {}
    for n in (1,) if compiled else (1, 32):
        tokens = prompts(model.config.vocab_size, n).cuda()

        def run(k: int, tokens: Tensor = tokens) -> None:
            model.generate(tokens, max_new_tokens=k, min_new_tokens=k, do_sample=False,
                           **options)  # fmt: skip

        short, long = (timed(lambda k=k: run(k), 1) for k in (1, NEW + 1))
        out[f"b{n} ms"] = round((long - short) / NEW, 3)
    return out


def measure(name: str, tunings: dict[str, Any], *, compiled: bool) -> dict[str, Any]:
    """Everything about one model."""
    result: dict[str, Any] = {}
    model = peer(name)
    if model is None:
        weights = random_weights(config(name), torch.float16, "cuda")
    else:
        weights = weights_of(model, transposed=config(name).n_kv_head > 1)
        result["transformers eager"] = measure_peer(model, compiled=False)
    decoder, result["load"] = make(name, weights, tunings.get(name))
    result["porttool"] = measure_porttool(decoder, name)
    if model is not None:
        result["tokens"] = compare(decoder, model)
        if compiled:
            result["transformers static and compiled"] = measure_peer(model, compiled=True)
    return result


def memory(name: str, tunings: dict[str, Any]) -> dict[str, float]:
    """Peak memory of a decoder for 32 rows that owns its weights, beside weights and cache."""
    weights = random_weights(config(name), torch.float16, "cuda")
    limits = Limits(max_batch_size=32, max_input_len=924, max_output_len=100)
    decoder = CudaDecoder(config(name), weights, dtype=torch.float16, limits=limits,
                          tuning=tunings.get(name))  # fmt: skip
    kept = decoder.model.cache.keys.nbytes * 2 + sum(w.nbytes for w in weights.values())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    generate(decoder, prompts(decoder.config.vocab_size, 32, 924), 17)
    peak = torch.cuda.max_memory_reserved()
    return {"weights and KV GB": round(kept / 1e9, 3), "peak GB": round(peak / 1e9, 3),
            "more, %": round(100 * (peak / kept - 1), 1)}  # fmt: skip


def memory_apart(name: str, tuning: Path) -> dict[str, float]:
    """`memory` in a process of its own, which nothing measured before has touched."""
    command = [sys.executable, __file__, "--memory-of", name, "--tuning", str(tuning)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and write the result after every model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--tuning", type=Path, default=RESULTS / "gpu_tuning.json")
    parser.add_argument("--compile", default="gpt2")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_decode.json")
    parser.add_argument("--memory-of", choices=SHAPES)
    arguments = parser.parse_args()
    tunings = json.loads(arguments.tuning.read_text()) if arguments.tuning.is_file() else {}
    if arguments.memory_of:
        with torch.inference_mode():
            print(json.dumps(memory(arguments.memory_of, tunings)))
        return
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "ceilings": ceilings(),
        "residual and layer norm, 16384 rows": norm_kernel(), "models": {},
    }  # fmt: skip
    print(json.dumps(result, indent=1), flush=True)
    for name in arguments.models.split(","):
        with torch.inference_mode():
            found = measure(name, tunings, compiled=name in arguments.compile.split(","))
        gc.collect()
        torch.cuda.empty_cache()
        result["models"][name] = found
        print(name, json.dumps(found), flush=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    with ThreadPoolExecutor(2) as pool:  # nothing is timed any more
        peaks = pool.map(lambda name: memory_apart(name, arguments.tuning), result["models"])
        for found, peak in zip(result["models"].values(), peaks, strict=True):
            found["memory, 32 rows"] = peak
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
