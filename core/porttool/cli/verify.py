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

OPTIONS: OptionTable = ()
TABLE: OptionTable = (
    ("--prompt-table", {"type": FOLDER,
                        "help": "Prompt table whose virtual tokens precede every prompt."}),
)  # fmt: skip


@click.command("verify", cls=ModelCommand)
@click.argument("engine", type=FOLDER, required=False)
@table_options(OPTIONS, TABLE, SHARED)
@model_options
@json_option
@click.pass_context
def command(context: click.Context, /, engine: Path | None, **_: Any) -> None:
    """Hold ENGINE against its source: exit status 0 only if it is still the same model.

    Weights are accounted for, logits compared with Hugging Face in prefill and in decode, greedy
    tokens token by token. On failure it names the first operation where the two part, and why.
    """
    sides = {"test_engine": True, "test_hf": True, "check_accuracy": True}
    asked = {**context.params, **sides}
    run_evaluation("parity", engine, OPTIONS, asked)
