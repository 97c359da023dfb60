"""porttool summarize: ROUGE of the port beside Hugging Face, on the same articles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from porttool.cli.evaluation import SHARED, SIDES, choose_sides, run_evaluation
from porttool.cli.options import (
    DTYPES,
    FILE,
    FOLDER,
    ModelCommand,
    json_option,
    model_options,
    table_options,
)

OPTIONS = (
    ("--dataset", {"help": "Hub id, .jsonl, .parquet or saved folder [abisee/cnn_dailymail]."}),
    ("--article-ids", {"type": FILE, "help": "File of pinned article ids."}),
    ("--max-articles", {"type": int, "help": "Articles to summarise [200]."}),
    ("--shuffle-seed", {"type": int, "help": "Shuffle before choosing; unset takes the first."}),
    ("--max-input-len", {"type": int, "help": "Last tokens of a prompt to keep [923, or fewer]."}),
    ("--max-new-tokens", {"type": int, "help": "Tokens of a summary [100]."}),
    ("--num-beams", {"type": int, "help": "Beams [1: greedy]."}),
    ("--batch-size", {"type": int, "help": "Articles at a time in Hugging Face [8]."}),
    ("--prompt", {"type": click.Choice(["auto", "suffix", "instruction"]),
                  "help": "TL;DR or the model's template."}),
    ("--reference-dtype", {"type": click.Choice(DTYPES), "help": "Hugging Face's [float32]."}),
    ("--margin", {"type": float, "help": "ROUGE points that may be lost [by type]."}),
    ("--rouge1-threshold", {"type": float, "help": "Least ROUGE-1 of the engine, absolute."}),
)  # fmt: skip


@click.command("summarize", cls=ModelCommand)
@click.argument("engine", type=FOLDER, required=False)
@table_options(SIDES, OPTIONS, SHARED)
@model_options
@json_option
@click.pass_context
def command(context: click.Context, /, engine: Path | None, **_: Any) -> None:
    """Summarise articles with ENGINE and Hugging Face; compare.

    The articles are cnn_dailymail's, or those of --dataset. Both sides get the same token ids.
    ROUGE is compared article by article, tokens with an eye for ties, and log-probabilities
    directly. The two sides may run separately: first --test-hf, later --test-engine.
    """
    run_evaluation("summarize", engine, OPTIONS, choose_sides(context.params))
