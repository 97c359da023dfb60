"""What choosing costs on one GPU: a decoded step for each way of choosing, chained and not.

    python bench/gpu_sampling.py [--models gpt2,camel-5b] [--batches 1,8,32] [--out FILE]

float16, random weights at the models' true sizes, prompts of 128 tokens, through the generation
loop. A step is (time of 65 new tokens - time of 1) / 64, wall clock, best of three after two
warm-ups. `chained`: as it is, up to 16 tokens between two looks of the host. `single`: the same
code with the host looking at every token. Both take turns in one process.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gpu_models import config
from porttool.config import Limits, ModelConfig, Sampling
from porttool.engines.torch.cuda import CudaDecoder
from porttool.engines.torch.cuda_measure import random_weights
from porttool.generate import generate
from porttool.nn import Step
from porttool.runner import Choose

PROMPT, NEW, REPEATS, WARM = 128, 64, 3, 2
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "logprobs": {"logprobs": True},
    "logits": {"keep_logits": True},
    "repetition": {"repetition_penalty": 1.2},
    "temperature": {"temperature": 1.0},
    "top-k": {"temperature": 1.0, "top_k": 50},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
    "all penalties": {
        "temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.1,
        "bad_words": ((5,), (7, 9)), "min_new_tokens": 1,
    },
    "4 beams": {"num_beams": 4},
}  # fmt: skip


class Drawn:
    """What the loop asks of a runner, over a decoder with drawn weights."""

    prompt_rows = 0

    def __init__(self, shape: ModelConfig, batch: int) -> None:
        limits = Limits(max_batch_size=batch, max_input_len=PROMPT, max_output_len=NEW + 1)
        self.config, self.n_slots, self.single = shape, batch, False
        self.engine = SimpleNamespace(manifest=SimpleNamespace(limits=limits))
        weights = random_weights(shape, torch.float16, "cuda")
        self.decoder = CudaDecoder(shape, weights, dtype=torch.float16, limits=limits)
        self.step, self.copy_slots = self.decoder.step, self.decoder.copy_slots

    def decode(self, step: Step, n_tokens: int, choose: Choose | None = None) -> Tensor:
        """Choose chained, or one token."""
        if self.single:
            logits = self.decoder.step(step)
            return (logits.argmax(-1) if choose is None else choose(logits, 0))[:, None]
        if choose is None:
            return self.decoder.decode(step, n_tokens)
        return self.decoder.sample(step, n_tokens, choose)


def seconds(runner: Any, rows: int, new: int, way: dict[str, Any]) -> float:
    """Generate once."""
    prompts = [[(31 * i + 7 * j) % 50000 for j in range(PROMPT)] for i in range(rows)]
    sampling = Sampling(**{"max_new_tokens": new, "ignore_eos": True, **way})
    torch.cuda.synchronize()
    began = time.perf_counter()
    generate(runner, prompts, sampling, eos=())
    return time.perf_counter() - began


def measure(runner: Drawn, batch: int) -> dict[str, dict[str, float]]:
    """Return milliseconds a step of each way."""
    found: dict[str, dict[str, float]] = {}
    for name, way in WAYS.items():
        rows = batch // way.get("num_beams", 1)
        if not rows:
            continue
        best: dict[str, list[float]] = {"chained": [], "single": []}
        for turn in range(WARM + REPEATS):
            for kind, times in best.items():
                runner.single = kind == "single"
                spent = seconds(runner, rows, NEW + 1, way) - seconds(runner, rows, 1, way)
                if turn >= WARM:
                    times.append(spent)
        found[name] = {kind: round(min(t) / NEW * 1000, 4) for kind, t in best.items()}
    return found


def main() -> None:
    """Measure every model at every batch; print a table and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="gpt2,camel-5b")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/sampling.json")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name in arguments.models.split(","):
        for batch in map(int, arguments.batches.split(",")):
            runner = Drawn(config(name), batch)
            results[f"{name} b{batch}"] = found = measure(runner, batch)
            for way, times in found.items():
                print(f"{name:10} b{batch:<4} {way:14} " + "  ".join(
                    f"{kind} {ms:7.3f} ms" for kind, ms in times.items()), flush=True)  # fmt: skip
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
            del runner
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
