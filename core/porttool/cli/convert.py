"""porttool convert: a source becomes a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from porttool.cli import console
from porttool.cli.options import (
    DTYPES,
    FOLDER,
    UNTOLD,
    flags_in,
    json_option,
    model_options,
    options_of,
    set_option,
    spelling,
    table_options,
)
from porttool.progress import format_bytes

if TYPE_CHECKING:
    from porttool.prompt_table import PromptTable


@click.command("convert")
@click.argument("source", required=False)
@model_options
@click.option("--output", "-o", type=FOLDER, help="Folder of the checkpoint.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Type of the weights [the source's].")
@click.option("--processes", type=click.IntRange(1, 64), default=2, show_default=True,
              help="Tensors in preparation at a time.")  # fmt: skip
@table_options(UNTOLD)
@click.option("--allow-nonfinite", is_flag=True, help="Convert weights that hold NaN or infinity.")
@click.option("--force", is_flag=True,
              help="Replace the checkpoint or table that stands at the output.")  # fmt: skip
@set_option
@json_option
@spelling(flags_in(UNTOLD))
def command(
    source: str | None,
    model: str | None,
    workdir: Path | None,
    output: Path | None,
    dtype: str | None,
    processes: int,
    allow_nonfinite: bool,
    force: bool,
    as_json: bool,
    **told: Any,
) -> None:
    """Turn SOURCE into a checkpoint, or into a prompt table.

    SOURCE is a folder, a file or a hub id (OWNER/NAME, or OWNER/NAME@REVISION), by default the
    family's own weights on the hub. The family is recognised; --model insists on one. What a
    killed run left is taken up again.
    """
    from porttool.api import convert, convert_prompts
    from porttool.hub import resolve_source
    from porttool.workspace import Workspace

    options = options_of(UNTOLD, told, told["settings"])
    found = None if source is None else resolve_source(source, None)
    table = found and convert_prompts(
        found,
        output,
        model=model,
        dtype=dtype,  # type: ignore[arg-type]
        force=force,
        allow_nonfinite=allow_nonfinite,
        options=options,
        progress=console.ConsoleProgress(),
    )
    if table:
        show_table(table, as_json=as_json)
        return
    checkpoint = convert(
        found,
        output,
        model=model,
        dtype=dtype,  # type: ignore[arg-type]
        workers=processes,
        force=force,
        allow_nonfinite=allow_nonfinite,
        options=options,
        workspace=Workspace.choose(workdir),
        progress=console.ConsoleProgress(),
    )
    made = checkpoint.manifest
    if as_json:
        console.say_json({"checkpoint": str(checkpoint.path), **made.model_dump(mode="json")})
        return
    console.say(
        f"{checkpoint.path}: {made.family}, {len(checkpoint.names())} tensors, {made.dtype}, "
        f"{format_bytes(sum(f.bytes for f in made.files.values()))}"
    )


def show_table(table: PromptTable, *, as_json: bool) -> None:
    """Say what a prompt table holds: the tasks, which are given by name or number when run."""
    if as_json:
        console.say_json({"table": str(table.path), **table.manifest.model_dump(mode="json")})
        return
    made = table.config
    console.say(f"{table.path}: {made.n_rows} virtual tokens of {made.d_model}, {made.dtype}")
    for number, (task, length) in enumerate(zip(made.tasks, made.lengths, strict=True)):
        console.say(f"  task {number}: {task}, {length} tokens")
