"""Where GPT-2 124M spends its time in ONNX Runtime on a CPU: a profile kept for the documents.

python bench/profile_gpt2_cpu.py --output bench/results/profile_gpt2_cpu
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from porttool import api
from porttool.profiling import ProfileShape, profile
from porttool.profiling.chart import draw_chart
from porttool.profiling.table import over_layers

SHAPE = ProfileShape(batch=1, prompt=256, new=24)


def main() -> None:
    """Port a drawn GPT-2, profile it, keep tables and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("profile_gpt2_cpu"))
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder / "source")
        api.convert(folder / "source", folder / "checkpoint")
        api.build(folder / "checkpoint", folder / "engine", engine="onnx", max_batch_size=1,
                  max_input_len=SHAPE.prompt, max_output_len=SHAPE.new)  # fmt: skip
        runner = api.load(folder / "engine", options={"device": "cpu", "threads": 2}).runner
        profile(runner, SHAPE, folder / "warm-up")
        found = profile(runner, SHAPE, output)
    (output / "trace.json").unlink()  # large, and made again in a minute
    draw_chart(found.lines, found.peak, found.description, output / "modules.png")
    for line in over_layers(found.lines, found.peak):
        print(f"{line.phase:8} {line.module:14} {1e3 * line.seconds:8.3f} ms {line.fraction:6.1%}")
    print(found.phases)


if __name__ == "__main__":
    main()
