"""porttool export: a checkpoint leaves in another ecosystem's form."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from porttool.cli import console
from porttool.cli.options import DTYPES, FOLDER, json_option
from porttool.errors import UsageError

FORMATS = ("fastertransformer", "huggingface")


@click.command("export")
@click.argument("checkpoint", type=FOLDER)
@click.option("--format", "form", type=click.Choice(FORMATS), required=True,
              help="What to write.")  # fmt: skip
@click.option("--output", "-o", type=FOLDER, required=True,
              help="Folder; FasterTransformer's <tp>-gpu is made in it.")  # fmt: skip
@click.option("--tp", type=click.IntRange(1, 1024), default=1, show_default=True,
              help="FasterTransformer: ranks to write files for.")  # fmt: skip
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
    """Write CHECKPOINT for FasterTransformer or transformers.

    Early versions of TensorRT-LLM read the former's folder. `verify` and `summarize` take the
    latter's with --hf-model, for a source that transformers cannot run.
    """
    from porttool import fastertransformer, huggingface_export
    from porttool.api import open_checkpoint
    from porttool.plugins import load_registry
    from porttool.standing import require_free

    raw = form == "fastertransformer"
    if tp > 1 and not raw:
        raise UsageError(f"--tp {tp}: a Hugging Face folder is not divided; leave it out")
    target = fastertransformer.place_of(output, tp) if raw else output
    mark = fastertransformer.CONFIG if raw else huggingface_export.MARK
    require_free(target, mark, replace=force, sources=[checkpoint])  # before hashing it
    opened = open_checkpoint(checkpoint, load_registry())
    write = partial(fastertransformer.export, tp=tp) if raw else huggingface_export.export
    folder = write(
        opened,
        output,
        dtype=dtype,  # type: ignore[arg-type]
        replace=force,
        progress=console.ConsoleProgress(),
    )
    if as_json:
        console.say_json({"folder": str(folder), "format": form, "tensor_parallel": tp})
        return
    console.say(f"{folder}: {form}, " + (f"files for {tp} rank(s)" if raw else "for transformers"))
