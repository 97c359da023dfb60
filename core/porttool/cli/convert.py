"""porttool convert: a source becomes a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from porttool.cli import console
from porttool.cli.options import DTYPES, FOLDER, as_settings, json_option, model_options, set_option


@click.command("convert")
@click.argument("source", required=False)
@model_options
@click.option("--output", "-o", type=FOLDER, help="Folder of the checkpoint.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Type of the weights [the source's].")
@click.option("--processes", type=click.IntRange(1, 64), default=2, show_default=True,
              help="Tensors in preparation at a time.")  # fmt: skip
@click.option("--n-head", type=click.IntRange(min=1), help="Heads, where the source cannot tell.")
@click.option("--vocab-size", type=click.IntRange(min=1),
              help="Ids without padding, where the source cannot tell.")  # fmt: skip
@click.option("--allow-nonfinite", is_flag=True, help="Convert weights that hold NaN or infinity.")
@click.option("--force", is_flag=True, help="Replace what stands at the output.")
@set_option
@json_option
def command(
    source: str | None,
    model: str | None,
    workdir: Path | None,
    output: Path | None,
    dtype: str | None,
    processes: int,
    n_head: int | None,
    vocab_size: int | None,
    allow_nonfinite: bool,
    force: bool,
    settings: tuple[tuple[str, str], ...],
    as_json: bool,
) -> None:
    """Turn SOURCE (a folder, a file or a hub id) into a checkpoint.

    SOURCE defaults to the family's own weights on the hub. The family is recognised; --model
    insists on one. What a killed run left is taken up again.
    """
    from porttool.api import convert
    from porttool.workspace import Workspace

    asked = {"n_head": n_head, "vocab_size": vocab_size}
    checkpoint = convert(
        source,
        output,
        model=model,
        dtype=dtype,  # type: ignore[arg-type]
        workers=processes,
        force=force,
        allow_nonfinite=allow_nonfinite,
        options={k: v for k, v in asked.items() if v is not None} | as_settings(settings),
        workspace=Workspace.choose(workdir),
        progress=console.ConsoleProgress(),
    )
    made = checkpoint.manifest
    if as_json:
        console.say_json({"checkpoint": str(checkpoint.path), **made.model_dump(mode="json")})
        return
    console.say(
        f"{checkpoint.path}: {made.family}, {len(checkpoint.names())} tensors, {made.dtype}, "
        f"{sum(f.bytes for f in made.files.values()) / 1e6:.1f} MB"
    )
