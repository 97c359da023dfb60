"""Ten thousand generations in one process: does its memory stay flat?

    python bench/soak.py --generations 10000 --seed 1

Each engine runs in a process of its own, on the demo model: prompts of 1 to 32 tokens, 1 to 6 at
a time in batches of 4, up to 12 new tokens, greedy, sampled, with penalties, stop strings,
log-probabilities and logits, by beams; half of them streamed. Resident memory, open files and
threads are sampled every 50 generations, and a fixed prompt must get the same answer each time.
The first fifth is warm-up; after it the line of least squares may rise by at most BOUND bytes a
generation, and no file or thread may be added. Exits with 1 if one does. A leaked row of logits
alone would be 8 kB.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

BOUND = 256
ENGINES = ("torch", "onnx")
RESULT = Path(__file__).parent / "results" / "soak.json"
PICTURE = RESULT.with_suffix(".png")


def soak_engine(kind: str, generations: int, seed: int, every: int) -> dict[str, Any]:
    """Soak one engine in this process; return its samples and what they say."""
    import torch

    from soaking import build_engine, growth, soak

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        loaded = build_engine(Path(folder), kind)
        samples = list(soak(loaded, generations, seed=seed, every=every))
        description = loaded.runner.description
    warm = samples[len(samples) // 5 :]
    return {
        "engine": description,
        "bytes_per_generation": round(growth(warm), 1),
        "first_mb": round(warm[0].rss / 1e6, 2),
        "last_mb": round(warm[-1].rss / 1e6, 2),
        "peak_mb": round(max(s.rss for s in warm) / 1e6, 2),
        "files_added": warm[-1].files - warm[0].files,
        "threads_added": warm[-1].threads - warm[0].threads,
        "samples": [list(asdict(s).values()) for s in samples],
    }


def is_flat(found: dict[str, Any]) -> bool:
    """Tell whether nothing grows."""
    added = found["files_added"] + found["threads_added"]
    return found["bytes_per_generation"] <= BOUND and added <= 0


def draw_picture(engines: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw resident memory over generations, and its change; the dotted line ends the warm-up."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(engines), figsize=(10, 5), layout="constrained")
    for (upper, lower), (kind, found) in zip(axes.T, engines.items(), strict=True):
        numbers = [s[0] for s in found["samples"]]
        sizes = [s[2] for s in found["samples"]]
        upper.plot(numbers, [size / 1e6 for size in sizes])
        upper.set(title=f"{kind}: {found['bytes_per_generation']:+.0f} bytes a generation",
                  ylabel="resident MB", ylim=(0, 1.2 * max(sizes) / 1e6))  # fmt: skip
        lower.plot(numbers, [(size - sizes[0]) / 1e3 for size in sizes])
        lower.axvline(numbers[len(numbers) // 5], color="0.7", linestyle=":")
        lower.set(xlabel="generations", ylabel="kB beyond the first sample")
    figure.savefig(path, dpi=100)


def table(engines: dict[str, dict[str, Any]]) -> str:
    """Return the table of docs/reliability.md."""
    lines = [
        "| engine | generations | MB after warm-up | MB at the end | bytes a generation "
        "| files, threads added |",
        "|---|---|---|---|---|---|",
    ]
    for found in engines.values():
        lines.append(
            f"| {found['engine']} | {found['samples'][-1][0]} | {found['first_mb']} | "
            f"{found['last_mb']} | {found['bytes_per_generation']:+.1f} | "
            f"{found['files_added']}, {found['threads_added']} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--engine", choices=ENGINES, help="soak one, print its result")
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    if asked.engine:
        print(json.dumps(soak_engine(asked.engine, asked.generations, asked.seed, asked.every)))
        return 0
    command = [sys.executable, __file__, "--generations", str(asked.generations),
               "--seed", str(asked.seed), "--every", str(asked.every), "--engine"]  # fmt: skip
    engines = {}
    for kind in ENGINES:
        done = subprocess.run([*command, kind], check=True, stdout=subprocess.PIPE, text=True)
        engines[kind] = json.loads(done.stdout.splitlines()[-1])
    facts = {
        "script": "bench/soak.py", "seed": asked.seed, "bound_bytes_per_generation": BOUND,
        "sample_fields": ["generation", "seconds", "rss", "files", "threads"],
        "python": platform.python_version(), "torch": version("torch"),
        "onnxruntime": version("onnxruntime"), "engines": engines,
    }  # fmt: skip
    asked.output.write_text(json.dumps(facts) + "\n")
    draw_picture(engines, asked.output.with_suffix(".png"))
    print(table(engines))
    return int(not all(map(is_flat, engines.values())))


if __name__ == "__main__":
    sys.exit(main())
