"""GPT-2 124M's prompts on a CPU: the last layer for the last token alone, and for all of them.

    python bench/cpu_last_layer.py [--threads 2] [--rounds 15]

The two take turns on the same random weights. A ratio is taken within a round, and the median of
the rounds is reported; read it, not the milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from porttool.config import Limits, ModelConfig
from porttool.engines.torch.cpu import CpuDecoder, Plan
from porttool.nn import Decoder, Step

RESULT = Path(__file__).parent / "results" / "cpu_last_layer.json"
SHAPE = ModelConfig(
    vocab_size=50257, n_positions=1024, n_layer=12, n_head=12, n_kv_head=12, head_dim=64,
    d_model=768, d_ff=3072, activation="gelu_tanh", attention_scale=0.125,
)  # fmt: skip


class Whole(CpuDecoder):
    """Runs every token through every layer, as before."""

    def _torch_step(self, plan: Plan, *, all_positions: bool) -> Tensor:
        step, module = plan.step, self.module
        x = module.embed(step.tokens, step.positions)
        for layer in module.layers:
            x = x + self._attend(layer, layer.norm1(x), step.positions, plan, None)
            x = x + layer.mlp(layer.norm2(x))
        return module.logits(module.norm(x[torch.arange(len(x)), step.lengths - 1])).float()


def seconds(decoder: CpuDecoder, step: Step) -> float:
    """Return how long a prompt takes."""
    began = time.perf_counter()
    decoder.step(step, all_positions=False)
    return time.perf_counter() - began


def main() -> None:
    """Measure prompts of two lengths in two types."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    weights = {n: torch.randn(w.shape) * 0.02 for n, w in Decoder(SHAPE).state_dict().items()}
    limits = Limits(max_batch_size=1, max_input_len=1000, max_output_len=1)
    out: dict[str, object] = {"torch": torch.__version__, **vars(asked)}
    for dtype in (torch.float32, torch.bfloat16):
        alone, whole = (k(SHAPE, weights, dtype=dtype, limits=limits) for k in (CpuDecoder, Whole))
        for length in (256, 924):
            step = Step.prefill([torch.randint(0, 50257, (length,)).tolist()])
            seconds(alone, step), seconds(whole, step)
            rounds = [(seconds(alone, step), seconds(whole, step)) for _ in range(asked.rounds)]
            out[f"{str(dtype)[6:]}, {length} tokens"] = {
                "last token alone, ms": [round(a * 1000, 1) for a, _ in rounds],
                "all tokens, ms": [round(b * 1000, 1) for _, b in rounds],
                "of all tokens' time": round(statistics.median(a / b for a, b in rounds), 3),
            }
    RESULT.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
