"""porttool verify: weights, logits, tokens; and where they part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from porttool.cli.evaluation import SHARED, run_evaluation
from porttool.cli.options import (
    FOLDER,
    ModelCommand,
    OptionTable,
    json_option,
    model_options,
    table_options,
)

TABLE: OptionTable = (
    ("--prompt-table", {"type": FOLDER,
                        "help": "Prompt table whose virtual tokens precede every prompt."}),
)  # fmt: skip


@click.command("verify", cls=ModelCommand)
@click.argument("engine", type=FOLDER, required=False)
@table_options(TABLE, SHARED)
@model_options
@json_option
@click.pass_context
def command(context: click.Context, /, engine: Path | None, **_: Any) -> None:
    """Check that ENGINE is still the same model as its source.

    Weights are accounted for, logits compared with Hugging Face in prefill and in decode, greedy
    tokens one by one. The exit status is 0 only if every check passes; if not, it names the first
    operation that differs, and why.
    """
    sides = {"test_engine": True, "test_hf": True, "check_accuracy": True}
    run_evaluation("parity", engine, (), {**context.params, **sides})
