"""porttool build: a checkpoint becomes an engine."""

from __future__ import annotations

from pathlib import Path

import click

from porttool.cli import console
from porttool.cli.options import DTYPES, FOLDER, as_settings, json_option, model_options, set_option


@click.command("build")
@click.argument("checkpoint", type=FOLDER, required=False)
@model_options
@click.option("--output", "-o", type=FOLDER, help="Folder of the engine.")
@click.option("--engine", default="torch", show_default=True, help="Kind of engine.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Type to run in [the checkpoint's].")
@click.option("--tp", type=click.IntRange(1, 1024), default=1, show_default=True,
              help="Ranks that share the model.")  # fmt: skip
@click.option("--max-batch-size", type=click.IntRange(min=1), default=8, show_default=True,
              help="Rows that run at a time, beams included.")  # fmt: skip
@click.option("--max-input-len", type=click.IntRange(min=1),
              help="Longest prompt [what the positions leave].")  # fmt: skip
@click.option("--max-output-len", type=click.IntRange(min=1), help="Most new tokens [100].")
@click.option("--max-beam-width", type=click.IntRange(min=1), default=8, show_default=True,
              help="Most beams of a prompt.")  # fmt: skip
@click.option("--max-prompt-embedding-table-size", "max_prompt_rows",
              type=click.IntRange(min=0), default=0, show_default=True,
              help="Room for rows of a prompt table.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace what stands at the output.")
@set_option
@json_option
def command(
    checkpoint: Path | None,
    model: str | None,
    workdir: Path | None,
    output: Path | None,
    engine: str,
    dtype: str | None,
    tp: int,
    max_batch_size: int,
    max_input_len: int | None,
    max_output_len: int | None,
    max_beam_width: int,
    max_prompt_rows: int,
    force: bool,
    settings: tuple[tuple[str, str], ...],
    as_json: bool,
) -> None:
    """Build an engine from CHECKPOINT, for the sizes that it shall serve."""
    from porttool.api import build
    from porttool.workspace import Workspace

    built = build(
        checkpoint,
        output,
        model=model,
        engine=engine,
        dtype=dtype,  # type: ignore[arg-type]
        tensor_parallel=tp,
        max_batch_size=max_batch_size,
        max_input_len=max_input_len,
        max_output_len=max_output_len,
        max_beam_width=max_beam_width,
        max_prompt_rows=max_prompt_rows,
        force=force,
        options=as_settings(settings),
        workspace=Workspace.choose(workdir),
        progress=console.ConsoleProgress(),
    )
    made = built.manifest
    if as_json:
        console.say_json({"engine": str(built.path), **made.model_dump(mode="json")})
        return
    limits = made.limits
    console.say(
        f"{built.path}: {made.kind} engine of {made.family}, {made.dtype}, {made.world_size} "
        f"rank(s); batch {limits.max_batch_size}, input {limits.max_input_len}, output "
        f"{limits.max_output_len}, beams {limits.max_beam_width}"
    )
