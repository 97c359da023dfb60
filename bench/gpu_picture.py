"""The picture of decoding on a GPU: a step of 1, 32 and 128 rows, beside transformers and vLLM.

    python bench/gpu_picture.py [--results FILE] [--out FILE]

Reads what `gpu_decode.py` wrote. A line marks the time in which a sum in PyTorch would read the
weights that a token needs, at the speed measured in that run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gpu_models import config

HERE = Path(__file__).parent
NAMES = {
    "gpt2": "GPT-2 124M", "gpt2-xl": "GPT-2 XL", "santacoder": "SantaCoder",
    "gpt-next-2b": "GPT-Next 2B", "camel-5b": "camel-5b", "starcoder": "StarCoder",
}  # fmt: skip
VLLM = {
    "gpt2": (1.15, 1.61, 2.92), "gpt2-xl": (2.78, 4.60, 10.3), "santacoder": (1.60, 1.87, 3.04),
    "camel-5b": (3.61, 5.31, 11.9), "starcoder": (9.27, 9.38, 10.95),
}  # fmt: skip
"""vLLM 0.22, ms a step of 1, 32 and 128 rows on the same kind of GPU, before these scripts were."""

ROWS = (1, 32, 128)
BARS = (("transformers", "#c9c9c9"), ("vLLM 0.22", "#9db7d5"), ("porttool", "#1f4e79"))


def steps(found: dict[str, Any], name: str, index: int) -> list[float | None]:
    """Return milliseconds of a step in the order of BARS; None where nothing was measured."""
    model, key = found["models"][name], f"b{ROWS[index]} ms"
    vllm = VLLM[name][index] if name in VLLM else None
    return [model.get("transformers eager", {}).get(key), vllm, model["porttool"][key]]


def summed(found: dict[str, Any], name: str) -> float:
    """Return the milliseconds in which PyTorch would sum the weights that a token needs."""
    shape = config(name)
    embedding = 0 if shape.tied_head else 2e-9 * shape.vocab_size * shape.d_model
    gigabytes = float(found["models"][name]["load"]["weights GB"]) - embedding
    return gigabytes / float(found["ceilings"]["read TB/s"])


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw a panel for each number of rows."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 4.2), sharey=True, layout="constrained")
    models = [name for name in NAMES if name in found["models"]][::-1]
    for index, axes in enumerate(panels):
        for bar, (label, color) in enumerate(BARS):
            for y, name in enumerate(models):
                took = steps(found, name, index)[bar]
                if took is None:
                    continue
                place = y + (1 - bar) * 0.28
                axes.barh(place, took, 0.26, color=color, label=label if y == 0 else None)
                axes.text(
                    took * 1.06, place, f"{took:.{3 + (took >= 10)}g}", va="center", fontsize=7
                )
        if ROWS[index] == 1:
            for y, name in enumerate(models):
                axes.plot([summed(found, name)] * 2, [y - 0.42, y + 0.42], color="#d1495b", lw=1.2,
                          label="weights summed by PyTorch" if y == 0 else None)  # fmt: skip
            lines, texts = axes.get_legend_handles_labels()
        axes.set_xscale("log")
        axes.set_xlim(0.04, 80)
        axes.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
        axes.set_title(f"{ROWS[index]} row{'s' * (ROWS[index] > 1)}", fontsize=10)
        axes.set_xlabel("milliseconds a decoded step")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(models)), [NAMES[name] for name in models])
    figure.legend(lines, texts, loc="outside upper right", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(f"{found['gpu']}, float16, prompt of 512 tokens, greedy", fontsize=9, x=0.2)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "gpu_decode.json")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "decode.png")
    arguments = parser.parse_args()
    draw(json.loads(arguments.results.read_text()), arguments.out)


if __name__ == "__main__":
    main()
