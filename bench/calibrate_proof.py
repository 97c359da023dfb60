"""Measure what the bounds of `verify` and `summarize` are calibrated with.

For each type: what a sound engine's logits and log-probabilities are off by, beside the same for
engines damaged on purpose. Writes one JSON file beside this script.

    python bench/calibrate_proof.py --articles 40
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from porttool.converter import convert
from porttool.engine import Engine, build, choose_limits
from porttool.evaluator import Report
from porttool.evaluators.damage import DAMAGES, Damage
from porttool.evaluators.parity import verify
from porttool.evaluators.summarize import summarize
from porttool.plugins import choose_converter, load_registry
from porttool.runner import load_runner
from porttool.text import load_tokenizer

HERE = Path(__file__).parent
DEMO = HERE.parent / "examples" / "demo"


def verdicts(report: Report) -> dict[str, Any]:
    """Return what a report says, shortened."""
    return {v.name: [v.passed, v.found, v.bound, v.detail] for v in report.verdicts}


def measure(engine: Engine, source: Path, articles: int, saved: Path, work: Path) -> dict[str, Any]:
    """Verify an engine and compare its summaries with the reference's saved ones."""
    registry = load_registry()
    converter = choose_converter(registry, source)
    runner, tokenizer = load_runner(engine, registry), load_tokenizer(engine.tokenizer)
    parity = verify(
        runner=runner, source=source, converter=converter, tokenizer=tokenizer,
        output=work / "parity",
    )  # fmt: skip
    out = work / "summaries"
    out.mkdir(parents=True, exist_ok=True)
    (out / "reference.json").write_bytes((saved / "reference.json").read_bytes())
    summaries = summarize(runner=runner, tokenizer=tokenizer, output=out, options=recipe(articles))
    return {
        "verify": {"passed": parity.passed, "notes": parity.notes, **verdicts(parity)},
        "summarize": {"passed": summaries.passed, **verdicts(summaries)},
    }


def recipe(articles: int) -> dict[str, Any]:
    """Return the options that both sides run with."""
    return {
        "dataset": str(DEMO / "articles.jsonl"), "max_articles": articles, "max_new_tokens": 60,
        "max_input_len": 412,
    }  # fmt: skip


def main() -> None:
    """Measure every type and damage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO / "gpt2-news")
    parser.add_argument("--articles", type=int, default=40)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "bfloat16"])
    parser.add_argument("--output", type=Path, default=HERE / "calibrate_proof.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    registry = load_registry()
    converter = choose_converter(registry, args.model)
    results: dict[str, Any] = {"articles": args.articles, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checkpoint = convert(
            converter, args.model, work / "checkpoint",
            plugin=registry.record(registry.converters, converter.name),
        )  # fmt: skip
        summarize(source=args.model, converter=converter, output=work / "reference",
                  options=recipe(args.articles))  # fmt: skip
        for dtype in args.dtypes:
            engine = build(
                checkpoint, registry.builders.get("torch")(), work / dtype,
                plugin=registry.record(registry.builders, "torch"),
                limits=choose_limits(checkpoint.config), dtype=dtype,
            )  # fmt: skip
            for name in DAMAGES:
                if Damage(name).obstacle(engine.manifest.config):
                    continue
                place = work / f"{dtype}-{name.replace('/', ' ')}"
                damaged = Damage(name).apply(engine, place)
                found = measure(damaged, args.model, args.articles, work / "reference",
                                work / f"out-{place.name}")  # fmt: skip
                results[f"{dtype}, {name}"] = found
                print(dtype, name, json.dumps(found), flush=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
