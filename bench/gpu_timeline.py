"""What each kernel of a decoded step adds to it, on one GPU, random weights at the true sizes.

    python bench/gpu_timeline.py [--models gpt2-xl,santacoder] [--rows 1,8,32,128]

One line a model and batch: for every kernel of a layer, and then of the step's end, its duration
under torch's profiler and, after the slash, the time from its predecessor's end to its own, both
in microseconds and as means over the layers of eight tokens at about 520 tokens of context. A
kernel starts before its predecessor has ended (programmatic dependent launch), so that durations
overlap; the second figures add up to the step.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_models import SHAPES, config
from porttool.config import Limits
from porttool.engines.torch.cuda import CudaDecoder
from porttool.engines.torch.cuda_measure import random_weights
from porttool.engines.torch.cuda_tune import step_milliseconds

CONTEXT, TOKENS = 512, 8


def kernels(decoder: CudaDecoder, n: int) -> list[tuple[float, float, str]]:
    """Begin, end (microseconds) and name of every kernel of a few steps of n rows."""
    step_milliseconds(decoder, n, CONTEXT)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        decoder.rewind(n, CONTEXT)
        decoder.replay_greedy(n, TOKENS)
        torch.cuda.synchronize()
    found = [
        (e.time_range.start, e.time_range.end, e.name)
        for e in seen.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    ]
    ours = [e for e in found if not e[2].startswith(("Memcpy", "Memset", "void at::"))]
    return sorted(ours)


def timeline(decoder: CudaDecoder, n: int) -> str:
    """Return the line of a model and a batch."""
    events = kernels(decoder, n)
    a_step = len(events) // TOKENS
    n_layer, tail = decoder.config.n_layer, 3 if n > 1 else 2
    a_layer = (a_step - tail) // n_layer
    spent: dict[tuple[int, int], list[tuple[float, float, str]]] = defaultdict(list)
    last = events[0][0]
    for i, (begin, end, name) in enumerate(events):
        at = i % a_step
        place = (0, at % a_layer) if at < a_layer * n_layer else (1, at - a_layer * n_layer)
        spent[place].append((end - begin, end - last, name[:22]))
        last = max(last, end)
    parts = []
    for _, seen in sorted(spent.items()):
        lasting = sum(s[0] for s in seen) / len(seen)
        added = sum(s[1] for s in seen) / len(seen)
        parts.append(f"{seen[0][2]} {lasting:.2f}/{added:.2f}")
    return f"{a_step} kernels a step, {a_layer} a layer | " + " | ".join(parts)


def main() -> None:
    """Print every line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--rows", default="1,8,32,128")
    parser.add_argument(
        "--tuning", type=Path, default=Path(__file__).parent / "results" / "gpu_tuning.json"
    )
    arguments = parser.parse_args()
    tunings = json.loads(arguments.tuning.read_text())
    limits = Limits(max_batch_size=128, max_input_len=924, max_output_len=68)
    for name in arguments.models.split(","):
        with torch.inference_mode():
            weights = random_weights(config(name), torch.float16, "cuda")
            decoder = CudaDecoder(config(name), weights, dtype=torch.float16, limits=limits,
                                  tuning=tunings.get(name))  # fmt: skip
            decoder.model.cache.keys.normal_()
            decoder.model.cache.values.normal_()
            for n in map(int, arguments.rows.split(",")):
                print(name, n, f"{step_milliseconds(decoder, n, CONTEXT):.4f} ms |",
                      timeline(decoder, n), flush=True)  # fmt: skip
            del decoder, weights
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
