"""porttool beside vLLM on one GPU: the same weights and prompts, one process, in turn.

    python bench/gpu_vllm.py --models santacoder,camel-5b --out results/gpu_vllm.json

float16, greedy, prompts of 512 random tokens, 64 new ones. Prefill is the wall-clock time until the
first tokens are on the host, right behind other work ("busy": the two alternate) and after 0.7 s
of pause; a decoded step is a 64th of what 65 tokens take more than one does right before. vLLM runs
with its defaults (compiled, CUDA graphs), but in this process, without its prefix cache, and reads
token ids, so that neither side tokenizes. Medians. Two minutes a model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # greedy needs none
}  # fmt: skip

import torch
import vllm
from torch import Tensor

from gpu_decode import NEW, PROMPT, RESULTS, generate, prompts
from gpu_models import config, peer, weights_of
from porttool.config import Limits
from porttool.engines.torch.cuda import CudaDecoder

ROWS = (1, 32)
Generate = Callable[[Tensor, int], Tensor]


def engine_of(model: Any, folder: str) -> Generate:
    """Start vLLM with a transformers model's weights; return what generates n tokens of rows."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    llm = vllm.LLM(
        folder, load_format="dummy", dtype="float16", skip_tokenizer_init=True, max_num_seqs=128,
        max_model_len=PROMPT + NEW + 1, enable_prefix_caching=False,
        gpu_memory_utilization=0.45, kv_cache_memory_bytes=16 << 30,
        compilation_config={"cudagraph_capture_sizes": list(ROWS)},
    )  # fmt: skip
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("lm_head.")}
    loaded = llm.apply_model(lambda theirs: theirs.load_weights(weights.items()))
    assert all(len(names) >= len(weights) for names in loaded), "vLLM left weights out"

    def run(tokens: Tensor, n_new: int) -> Tensor:
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=n_new, min_tokens=n_new, ignore_eos=True, detokenize=False
        )
        rows = [{"prompt_token_ids": row} for row in tokens.tolist()]
        found = llm.generate(rows, sampling, use_tqdm=False)
        return torch.tensor([list(row.outputs[0].token_ids) for row in found])

    return run


def in_turn(
    sides: dict[str, Generate], tokens: Tensor, n_new: int, *, rounds: int, pause: float = 0.0
) -> dict[str, float]:
    """Median milliseconds of each side, after a round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, run in sides.items():
            time.sleep(pause)
            begin = time.perf_counter()
            run(tokens, n_new)
            times[name].append((time.perf_counter() - begin) * 1000)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def decoded(sides: dict[str, Generate], tokens: Tensor, rounds: int = 7) -> dict[str, float]:
    """Median milliseconds of each side's step: 65 tokens less the one of a run right before."""
    steps: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            stamps = [time.perf_counter()]
            for n in (1, NEW + 1):
                run(tokens, n)
                stamps.append(time.perf_counter())
            one, all_of_them = stamps[1] - stamps[0], stamps[2] - stamps[1]
            steps[name].append((all_of_them - one) * 1000 / NEW)
    return {name: statistics.median(found) for name, found in steps.items()}


def measure(name: str, tuning: Any, result: dict[str, Any]) -> None:
    """Add everything about one model to a result, and print it as it is found."""
    model = peer(name)
    if model is None:
        raise SystemExit(f"{name}: transformers has no such model")
    limits = Limits(max_batch_size=max(ROWS), max_input_len=PROMPT, max_output_len=NEW + 1)
    weights = weights_of(model, transposed=config(name).n_kv_head > 1)
    decoder = CudaDecoder(config(name), weights, dtype=torch.float16, limits=limits, tuning=tuning)
    with tempfile.TemporaryDirectory() as folder:
        theirs = engine_of(model, folder)
    sides: dict[str, Generate] = {
        "porttool": lambda tokens, n: generate(decoder, tokens, n), "vLLM": theirs,
    }  # fmt: skip
    for n in ROWS:
        tokens = prompts(config(name).vocab_size, n)
        short = in_turn(sides, tokens, 1, rounds=9)
        calm = in_turn(sides, tokens, 1, rounds=3, pause=0.7)
        steps = decoded(sides, tokens)
        for side in sides:
            result[f"{side} prefill {n}x{PROMPT} ms, busy"] = round(short[side], 2)
            result[f"{side} prefill {n}x{PROMPT} ms, rested"] = round(calm[side], 2)
            result[f"{side} b{n} ms"] = round(steps[side], 4)
        print(name, json.dumps(result, indent=1), flush=True)
    same = [run(tokens, NEW) for run in sides.values()]
    result[f"rows of {len(tokens)} with the same {NEW} tokens"] = int(
        (same[0] == same[1]).all(-1).sum()
    )


def main() -> None:
    """Measure, and write after each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="santacoder,camel-5b,starcoder")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_vllm.json")
    arguments = parser.parse_args()
    tunings = json.loads((RESULTS / "gpu_tuning.json").read_text())
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name in arguments.models.split(","):
        found[name] = {"vLLM": vllm.__version__}
        measure(name, tunings.get(name), found[name])
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
