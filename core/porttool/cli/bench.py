"""porttool bench: latency, throughput and memory, beside Hugging Face and the roofline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from porttool.cli import console
from porttool.cli.options import (
    FILE,
    FOLDER,
    ModelCommand,
    OptionTable,
    as_settings,
    explaining,
    json_option,
    model_options,
    names_in,
    set_option,
    spelling,
    table_options,
)
from porttool.errors import UsageError, require_extra
from porttool.standing import require_writable, whole_file

if TYPE_CHECKING:
    from porttool.benchmark import BenchmarkResult

GRID: OptionTable = (
    ("--batch-size", {"default": "1", "show_default": True, "metavar": "N,N,...",
                      "help": "Rows at a time."}),
    ("--input-len", {"default": "128", "show_default": True, "metavar": "N,N,...",
                     "help": "Tokens of each prompt."}),
    ("--output-len", {"default": "64", "show_default": True, "metavar": "N,N,...",
                      "help": "Tokens made for each prompt, 2 or more."}),
)  # fmt: skip

OPTIONS: OptionTable = (
    ("--hf-model", {"type": FOLDER,
                    "help": "Hugging Face folder to measure beside, eager and compiled; one that "
                            "holds a config alone runs random weights."}),
    ("--no-compile", {"is_flag": True, "help": "Leave the compiled peer out."}),
    ("--warmup", {"type": click.IntRange(min=0), "default": 2, "show_default": True,
                  "help": "Runs of each side in a cell that do not count."}),
    ("--repeats", {"type": click.IntRange(min=1), "default": 5, "show_default": True,
                   "help": "Rounds in which the sides take turns."}),
    ("--seed", {"type": int, "default": 0, "show_default": True, "help": "Seed of the prompts."}),
    ("--output-json", {"type": FILE, "help": "File for everything that was measured."}),
    ("--picture", {"type": FILE, "help": "File for a picture: .png, .svg or .pdf."}),
)  # fmt: skip


PICTURES = (".png", ".svg", ".pdf")
"""What a picture's name may end in."""


@click.command("bench", cls=ModelCommand)
@click.argument("engines", type=FOLDER, nargs=-1)
@table_options(GRID, OPTIONS)
@model_options
@set_option
@json_option
@click.pass_context
def command(context: click.Context, /, engines: tuple[Path, ...], **_: Any) -> None:
    """Measure how fast ENGINES are, over a grid of sizes.

    Every batch runs with every input and output length. Every side gets the same random prompts,
    greedily, end tokens ignored. The sides take turns in every round, beside what the device was
    measured to do just then.
    """
    from porttool.benchmark import Method, bench, grid
    from porttool.workspace import Workspace

    asked = context.params
    cells = grid(*(read_sizes(flag, asked[name]) for name, flag in names_in(GRID).items()))
    picture, json_file = asked["picture"], asked["output_json"]
    if str(json_file) == "-":
        raise UsageError("--output-json writes a file, name one; --json prints what was measured")
    require_writable(picture, json_file)
    if picture and picture.suffix.lower() not in PICTURES:
        raise UsageError(f"--picture {picture}: its name should end in {', '.join(PICTURES)}")
    if picture:
        require_extra("eval", "matplotlib")
    space = Workspace.choose(asked["workdir"])
    with spelling({"seed": "--seed"}), explaining():
        method = Method(warmup=asked["warmup"], repeats=asked["repeats"], seed=asked["seed"])
    found = bench(
        tuple(space.find_engine(engine, asked["model"]) for engine in engines or (None,)),
        cells,
        hf_model=asked["hf_model"],
        compiled=not asked["no_compile"],
        method=method,
        options=as_settings(asked["settings"]),
        progress=console.ConsoleProgress(),
    )
    if asked["as_json"]:
        console.say_json(found.model_dump(mode="json"))
    else:
        show(found)
    if json_file:  # what was measured is on the screen, whatever becomes of the file
        with whole_file(json_file) as place:
            place.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    if picture:
        from porttool.benchmark.page import draw_picture

        with whole_file(picture) as place:
            draw_picture(found, place)
        console.note(f"{picture}: the picture")


def read_sizes(flag: str, text: str) -> tuple[int, ...]:
    """Return the numbers of a list; at least 1, of output at least 2: one between two tokens."""
    least = 2 if flag == "--output-len" else 1
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise UsageError(f"{flag} {text!r}: give whole numbers from {least} on, as in 8,32")
    return tuple(dict.fromkeys(int(part) for part in parts))


def show(found: BenchmarkResult) -> None:
    """Print who was measured, the figures, and what did not run."""
    from porttool.benchmark.page import as_tables

    for table in as_tables(found):
        console.table(table.title, table.columns, table.rows)
    for failure in found.failures:
        where = f", {failure.cell}" if failure.cell else ""
        console.say(f"{failure.side}{where}: did not run: {failure.reason}")
