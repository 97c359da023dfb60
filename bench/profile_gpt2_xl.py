"""Where the torch engine spends its time on GPT-2 XL (1.5B) on a GPU: float16, drawn weights.

    python bench/profile_gpt2_xl.py --output bench/results/profile_gpt2_xl

The decoder is made on the GPU, without a checkpoint, so that the script needs no disk. Under a
counter profiler, one pass without torch's: `ncu … python bench/profile_gpt2_xl.py --once`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))

from porttool.config import Limits, ModelConfig
from porttool.engines.torch.cuda import CudaDecoder
from porttool.engines.torch.cuda_measure import random_weights
from porttool.nn import Step
from porttool.profiling import ProfileShape, profile
from porttool.profiling.run import run_steps

XL = ModelConfig(
    vocab_size=50257, n_positions=1024, n_layer=48, n_head=25, n_kv_head=25, head_dim=64,
    d_model=1600, d_ff=6400, activation="gelu_tanh", attention_scale=0.125,
)  # fmt: skip
LIMITS = Limits(max_batch_size=8, max_input_len=512, max_output_len=128)
PROMPT, NEW = 512, 64


class Drawn:
    """What `profile` asks of a runner, over a decoder with drawn weights."""

    decodes_on_device = True

    def __init__(self) -> None:
        weights = random_weights(XL, torch.float16, "cuda")
        self.decoder = CudaDecoder(XL, weights, dtype=torch.float16, limits=LIMITS)
        self.description = f"GPT-2 XL, float16, {self.decoder.description}"
        manifest = SimpleNamespace(limits=LIMITS, dtype="float16", config=XL)
        self.engine = SimpleNamespace(manifest=manifest)

    def step(self, step: Step) -> torch.Tensor:
        """Feed tokens."""
        return self.decoder.step(step, all_positions=False)

    def decode(self, step: Step, n_tokens: int) -> torch.Tensor:
        """Decode on the device."""
        return self.decoder.decode(step, n_tokens)

    def profiled(self, work: Callable[[], None]) -> list[Any]:
        """Run the work: torch's profiler sees all of it."""
        work()
        return []


def main() -> None:
    """Profile batch 1 and 8, keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("profile_gpt2_xl"))
    parser.add_argument("--once", action="store_true", help="Run one prompt, profile nothing.")
    arguments = parser.parse_args()
    runner: Any = Drawn()
    if arguments.once:
        run_steps(runner, ProfileShape(1, PROMPT, 1))
        return
    with tempfile.TemporaryDirectory() as folder:
        for batch in (1, 8):
            shape = ProfileShape(batch, PROMPT, NEW)
            profile(runner, shape, Path(folder) / "warm-up")  # the profiler's own first run
            found = profile(runner, shape, Path(folder) / "out")
            print(batch, json.dumps(found.phases))
            keep(Path(folder) / "out", arguments.output, batch)


def keep(found: Path, output: Path, batch: int) -> None:
    """Keep the numbers of a profile; the trace is large."""
    output.mkdir(parents=True, exist_ok=True)
    shutil.copy(found / "profile.json", output / f"batch{batch}.json")
    shutil.copy(found / "kernels.csv", output / f"batch{batch}_kernels.csv")


if __name__ == "__main__":
    main()
