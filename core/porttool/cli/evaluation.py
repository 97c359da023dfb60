"""What `summarize` and `verify` share: run an evaluator, show its report, turn it into a status."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from porttool.cli import console
from porttool.cli.options import (
    FOLDER,
    OUTPUT,
    OptionTable,
    as_settings,
    flags_in,
    options_of,
    spelling,
)
from porttool.errors import UsageError

SHARED: OptionTable = (
    ("--hf-model", {"help": "Hugging Face folder to compare with [what was converted]."}),
    ("--output", {"type": OUTPUT, "help": "Folder of the report [beside the engine]."}),
    ("--tokenizer", {"type": FOLDER, "help": "Folder of another tokenizer."}),
    ("--runner-set", {"multiple": True, "nargs": 2, "metavar": "NAME VALUE",
                      "help": "Set an option of the engine's runner; repeatable."}),
    ("--set", {"multiple": True, "nargs": 2, "metavar": "NAME VALUE",
               "help": "Set any other option of the evaluation; repeatable."}),
)  # fmt: skip

SIDES: OptionTable = (
    ("--check-accuracy", {"is_flag": True, "help": "Exit with 1 unless every verdict is yes."}),
    ("--test-hf", {"is_flag": True, "help": "Run Hugging Face alone and keep its results."}),
    ("--test-engine", {"is_flag": True,
                       "help": "Run the engine alone, beside kept results if there are any."}),
)  # fmt: skip


def choose_sides(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with both sides to be run where none was named."""
    asked = dict(params)
    if asked["check_accuracy"] and asked["test_hf"] and not asked["test_engine"]:
        raise UsageError("--test-hf alone compares nothing, so there is no accuracy to check")
    if asked["check_accuracy"]:
        require_enough(asked)
    if not (asked["test_hf"] or asked["test_engine"]):
        asked["test_hf"] = asked["test_engine"] = True
    return asked


def require_enough(asked: Mapping[str, Any]) -> None:
    """Refuse to check the accuracy on too few articles for any verdict, before hours are spent."""
    from porttool.evaluators.statistics import MIN_ARTICLES

    for name in ("max_articles", "max_problems"):
        if (most := asked.get(name)) is not None and most < MIN_ARTICLES:
            raise UsageError(
                f"--{name.replace('_', '-')} {most}: a verdict on the accuracy needs at least "
                f"{MIN_ARTICLES}; leave --check-accuracy out to look at fewer"
            )


def run_evaluation(
    name: str, engine: Path | None, table: OptionTable, asked: Mapping[str, Any]
) -> None:
    """Evaluate and show the report; with `check_accuracy` a verdict of no raises CheckFailed.

    `table` has the evaluation's own options, `asked` what was given.
    """
    from porttool.api import evaluate
    from porttool.workspace import Workspace

    with spelling(flags_in(table)):
        report = evaluate(
            name,
            engine,
            model=asked["model"],
            hf_model=asked["hf_model"],
            output=asked["output"],
            test_engine=asked["test_engine"],
            test_hf=asked["test_hf"],
            tokenizer=asked["tokenizer"],
            prompt_table=asked.get("prompt_table"),
            options=options_of(table, asked, asked["set"]),
            runner_options=as_settings(asked["runner_set"]),
            workspace=Workspace.choose(asked["workdir"]),
            progress=console.ConsoleProgress(),
        )
    if asked["as_json"]:
        console.say_json(report.model_dump(mode="json"))
    else:
        console.show_report(report)
    if asked["check_accuracy"]:
        report.require_pass()
