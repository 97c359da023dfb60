"""Loading a built engine onto a GPU, beside reading its bytes there.

    python bench/gpu_load.py ENGINE [--rounds 3] [--output FILE]

Both sides read the same files from the page cache, in turn: safetensors' own loader puts every
tensor on the GPU and does nothing else; ours opens the folder, verifies every file's SHA-256,
packs the weights and allocates the cache. Then the first greedy tokens of one row, which compile
or find the kernels and capture the graphs, and once more in the same process.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from porttool import api
from porttool.config import Sampling
from porttool.engine import Engine
from porttool.generate import generate


def seconds(work: Any) -> tuple[float, Any]:
    """Return how long a piece of work took with the GPU idle at both ends, and its result."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def main() -> None:
    """Measure and print or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    files = sorted((arguments.engine / "rank0").glob("*.safetensors"))
    torch.empty(1, device="cuda")
    found: dict[str, list[float]] = {"bytes": [], "verify": [], "load": []}
    for _ in range(arguments.rounds + 1):
        for name, work in (
            ("bytes", lambda: [load_file(f, device="cuda") for f in files]),
            ("verify", lambda: Engine.open(arguments.engine)),
            ("load", lambda: api.load(arguments.engine, options={"device": "cuda"})),
        ):
            took, result = seconds(work)
            found[name].append(round(took, 3))
            if name != "load":
                del result
    runner = result.runner
    sampling = Sampling(max_new_tokens=19, ignore_eos=True)
    first = [seconds(lambda: generate(runner, [[1] * 64], sampling, eos=()))[0] for _ in range(2)]
    medians = {name: statistics.median(times[1:]) for name, times in found.items()}
    report = {
        "gpu": torch.cuda.get_device_name(), "GB": sum(f.stat().st_size for f in files) / 1e9,
        "seconds, the first round warms up": found, "median": medians,
        "load of bytes": round(medians["load"] / medians["bytes"], 2),
        "first tokens, then again, s": [round(t, 3) for t in first],
        "description": runner.description,
    }  # fmt: skip
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
