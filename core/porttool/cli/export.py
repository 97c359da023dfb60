"""porttool export: a checkpoint leaves in another ecosystem's form."""

from __future__ import annotations

from pathlib import Path

import click

from porttool.cli import console
from porttool.cli.options import DTYPES, FOLDER, json_option


@click.command("export")
@click.argument("checkpoint", type=FOLDER)
@click.option("--format", "form", type=click.Choice(["fastertransformer"]), required=True,
              help="What to write.")  # fmt: skip
@click.option("--output", "-o", type=FOLDER, required=True, help="Folder; <tp>-gpu is made in it.")
@click.option("--tp", type=click.IntRange(1, 1024), default=1, show_default=True,
              help="Tensor-parallel ranks to write files for.")  # fmt: skip
@click.option("--dtype", type=click.Choice(DTYPES), help="Type of the weights [the checkpoint's].")
@click.option("--force", is_flag=True, help="Replace an export that stands at the output.")
@json_option
def command(
    checkpoint: Path,
    form: str,
    output: Path,
    tp: int,
    dtype: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write CHECKPOINT as a FasterTransformer folder.

    Early versions of TensorRT-LLM read it, too.
    """
    from porttool.api import open_checkpoint
    from porttool.fastertransformer import CONFIG, export, place_of
    from porttool.plugins import load_registry
    from porttool.standing import require_free

    # Before the checkpoint is hashed.
    require_free(place_of(output, tp), CONFIG, replace=force, sources=[checkpoint])
    folder = export(
        open_checkpoint(checkpoint, load_registry()),
        output,
        tp=tp,
        dtype=dtype,  # type: ignore[arg-type]
        replace=force,
        progress=console.ConsoleProgress(),
    )
    if as_json:
        console.say_json({"folder": str(folder), "format": form, "tensor_parallel": tp})
        return
    console.say(f"{folder}: {form}, files for {tp} rank(s)")
