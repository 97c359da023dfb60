"""porttool infill: programs filled in by the port beside Hugging Face, on the same problems."""

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
    ("--dataset", {"type": FILE, "required": True,
                   "help": "JSON lines in HumanEval's schema; a row may have a suffix."}),
    ("--kind", {"type": click.Choice(["infill", "completion"]),
                "help": "Fill a gap or complete a function [infill]."}),
    ("--max-problems", {"type": int, "help": "Problems to take [200]."}),
    ("--max-new-tokens", {"type": int, "help": "Tokens of an answer [64]."}),
    ("--batch-size", {"type": int, "help": "Problems at a time in Hugging Face [8]."}),
    ("--reference-dtype", {"type": click.Choice(DTYPES), "help": "Hugging Face's [float32]."}),
    ("--margin", {"type": float, "help": "Points that may be lost [by type]."}),
)  # fmt: skip


@click.command("infill", cls=ModelCommand)
@click.argument("engine", type=FOLDER, required=False)
@table_options(SIDES, OPTIONS, SHARED)
@model_options
@json_option
@click.pass_context
def command(context: click.Context, /, engine: Path | None, **_: Any) -> None:
    """Fill gaps in programs with ENGINE and Hugging Face; compare.

    Both get the same token ids. Exact match, edit similarity and ROUGE are compared problem by
    problem, tokens with an eye for ties, and log-probabilities directly.
    """
    run_evaluation("infill", engine, OPTIONS, choose_sides(context.params))
