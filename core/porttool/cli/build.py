"""porttool build: a checkpoint becomes an engine, or a shape one with random weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from porttool.cli import console
from porttool.cli.options import (
    DTYPES,
    FOLDER,
    ModelCommand,
    OptionTable,
    Place,
    as_settings,
    explaining,
    json_option,
    model_options,
    names_in,
    set_option,
    spelling,
    table_options,
)
from porttool.errors import UsageError

if TYPE_CHECKING:
    from porttool.checkpoint import Checkpoint
    from porttool.workspace import Workspace

SIZE = click.IntRange(min=1)

OPTIONS: OptionTable = (
    ("--dtype", {"type": click.Choice(DTYPES), "help": "Type to run in [the checkpoint's]."}),
    ("--tp", {"type": click.IntRange(1, 1024), "default": 1, "show_default": True,
              "help": "Ranks that share the model."}),
    ("--max-batch-size", {"type": SIZE, "default": 8, "show_default": True,
                          "help": "Rows that run at a time, beams included."}),
    ("--max-input-len", {"type": SIZE, "help": "Longest prompt [what the positions leave]."}),
    ("--max-output-len", {"type": SIZE, "help": "Most new tokens [100]."}),
    ("--max-beam-width", {"type": SIZE, "default": 8, "show_default": True,
                          "help": "Most beams of a prompt."}),
    ("--max-prompt-embedding-table-size", {"type": click.IntRange(min=0), "default": 0,
                                           "show_default": True,
                                           "help": "Room for rows of a prompt table."}),
    ("--force", {"is_flag": True, "help": "Replace the engine that stands at the output."}),
)  # fmt: skip

KNOBS: OptionTable = (
    ("--n-layer", {"type": SIZE, "help": "Dummy: layers."}),
    ("--n-embd", {"type": SIZE, "help": "Dummy: width of the model."}),
    ("--n-head", {"type": SIZE, "help": "Dummy: query heads."}),
    ("--n-kv-head", {"type": SIZE, "help": "Dummy: key and value heads; 1 is multi-query."}),
    ("--head-dim", {"type": SIZE, "help": "Dummy: width of a head [n-embd / n-head]."}),
    ("--inter-size", {"type": SIZE, "help": "Dummy: width of the MLP [4 * n-embd]."}),
    ("--vocab-size", {"type": SIZE, "help": "Dummy: token ids."}),
    ("--n-positions", {"type": SIZE, "help": "Dummy: positions."}),
    ("--hidden-act", {"help": "Dummy: activation, as gelu, gelu_new, relu, silu, swiglu [gelu]."}),
    ("--rotary-pct", {"type": click.FloatRange(0, 1),
                      "help": "Dummy: share of a head that is rotated; 0 is learned positions."}),
    ("--no-bias", {"is_flag": True, "help": "Dummy: no bias in linear maps."}),
)  # fmt: skip

DUMMY: OptionTable = (
    ("--dummy", {"is_flag": True,
                 "help": "Random weights: of the shape that --model is published with, or of "
                         "--config, or of all that the options say. For measurements alone."}),
    ("--config", {"type": Place(exists=True),
                  "help": "Dummy: config.json of an installed family, a manifest of porttool's, "
                          "or a ModelConfig as JSON."}),
    *KNOBS,
    ("--random-seed", {"type": int, "help": "Dummy: seed of the weights [0]."}),
)  # fmt: skip


@click.command("build", cls=ModelCommand)
@click.argument("checkpoint", type=FOLDER, required=False)
@model_options
@click.option("--output", "-o", type=FOLDER, help="Folder of the engine.")
@click.option("--engine", default="torch", show_default=True, help="Kind of engine.")
@table_options(OPTIONS, DUMMY)
@set_option
@json_option
@click.pass_context
def command(context: click.Context, /, checkpoint: Path | None, **_: Any) -> None:
    """Build an engine from CHECKPOINT, for the sizes it has to serve.

    With --dummy there is no checkpoint: the weights are random, and the engine says so.
    """
    from porttool.api import build
    from porttool.workspace import Workspace

    asked = context.params
    space = Workspace.choose(asked["workdir"])
    with open_source(asked, checkpoint, space) as source:
        built = build(
            source,
            asked["output"],
            model=asked["model"],
            engine=asked["engine"],
            dtype=asked["dtype"],
            tensor_parallel=asked["tp"],
            max_batch_size=asked["max_batch_size"],
            max_input_len=asked["max_input_len"],
            max_output_len=asked["max_output_len"],
            max_beam_width=asked["max_beam_width"],
            max_prompt_rows=asked["max_prompt_embedding_table_size"],
            force=asked["force"],
            options=as_settings(asked["settings"]),
            workspace=space,
            progress=console.ConsoleProgress(),
        )
    made = built.manifest
    if asked["as_json"]:
        console.say_json({"engine": str(built.path), **made.model_dump(mode="json")})
        return
    limits = made.limits
    console.say(
        f"{built.path}: {made.kind} engine of {made.family}, {made.dtype}, {made.world_size} "
        f"rank(s); batch {limits.max_batch_size}, input {limits.max_input_len}, output "
        f"{limits.max_output_len}, beams {min(limits.max_beam_width, limits.max_batch_size)}"
        + ("; DUMMY: its weights are random" if made.dummy else "")
    )


def open_source(
    asked: dict[str, Any], checkpoint: Path | None, space: Workspace
) -> AbstractContextManager[Path | Checkpoint | None]:
    """Return what is built from: the checkpoint's path, or random weights while they are needed."""
    given = [flag for name, flag in names_in(DUMMY).items() if asked[name] not in (None, False)]
    if not asked["dummy"]:
        if given:
            raise UsageError(f"{', '.join(given)}: only a --dummy build has a shape of its own")
        return nullcontext(checkpoint)
    if checkpoint is not None:
        raise UsageError(f"--dummy draws the weights: leave the checkpoint {checkpoint} out")
    from porttool.dummy import Knobs, dummy_checkpoint

    flags = names_in(KNOBS)
    knobs = {name: asked[name] for name in flags if name != "no_bias"}
    with spelling(flags), explaining():
        shape = Knobs(**knobs, bias=False if asked["no_bias"] else None)
    return dummy_checkpoint(
        asked["output"],
        model=asked["model"],
        config=asked["config"],
        knobs=shape,
        dtype=asked["dtype"] or "float16",
        seed=asked["random_seed"] or 0,
        force=asked["force"],
        workspace=space,
        progress=console.ConsoleProgress(),
    )
