"""Options that several commands share, declared once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from porttool.errors import MissingFolder, PorttoolError, UsageError
from porttool.standing import require_text_name

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = ("float32", "float16", "bfloat16", "float64")


class Place(click.Path):
    """A path that manifests and reports can name."""

    def __init__(self, **checks: bool) -> None:
        super().__init__(path_type=Path, **checks)

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        """Return the path; UsageError for a name that is no text."""
        found = Path(os.fsdecode(super().convert(value, param, ctx)))
        require_text_name(found)
        return found


FOLDER = Place()
OUTPUT = Place(file_okay=False)
FILE = Place(dir_okay=False)


class ModelCommand(click.Command):
    """A command with --model: where a folder of the model's is missing, it says what makes it."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        taken = {p.name for p in self.params if isinstance(p, click.Argument)}
        if taken & {"engine", "engines"} and not any(ctx.params[name] for name in taken if name):
            note_older_engine(ctx.params["model"], ctx.params["workdir"])
        try:
            return super().invoke(ctx)
        except MissingFolder as error:
            advice = advise_step(error.path, ctx.params["model"], ctx.params["workdir"])
            raise UsageError(f"{error}{advice}") from error


def advise_step(missing: Path, model: str | None, workdir: Path | None) -> str:
    """Return which commands make a model's folder; empty for a folder that was given by its path.

    A model that is not installed gets what `convert` would say of it.
    """
    from porttool.plugins import load_registry, named_converters
    from porttool.workspace import Workspace

    space = Workspace.choose(workdir)
    if model is None or missing not in (space.checkpoint(model), space.engine(model)):
        return ""
    steps = ["build"] if missing == space.engine(model) else []
    if not space.checkpoint(model).exists():
        converters = (registry := load_registry()).converters
        try:
            family = converters.get(named_converters(registry, model)[0]).family
        except UsageError as error:
            return f": {error}"
        if family != model:
            return f": folders go by the family, give --model {family}"
        steps.insert(0, "convert")
    where = f" --workdir {workdir}" if workdir else ""
    said = " and ".join(f"`porttool {step} --model {model}{where}`" for step in steps)
    return f"; run {said} first"


def note_older_engine(model: str | None, workdir: Path | None) -> None:
    """Say where a model's engine was built from another checkpoint than the one beside it."""
    from porttool.checkpoint import Checkpoint
    from porttool.cli import console
    from porttool.engine import Engine
    from porttool.workspace import Workspace

    space = Workspace.choose(workdir)
    with suppress(PorttoolError):  # the command itself says what is missing or broken
        name = space.find_model(model)
        engine, checkpoint = space.engine(name), space.checkpoint(name)
        made = Engine.open(engine, verify=False).manifest
        if made.dummy or not checkpoint.exists():
            return
        if made.checkpoint_digest != Checkpoint.open(checkpoint, verify=False).digest:
            console.note(
                f"{engine} was built from another checkpoint than {checkpoint} is now: "
                f"`porttool build --model {name} --force` builds it anew"
            )


def model_options(command: F) -> F:
    """Add --model and --workdir, which together stand for every path."""
    for option in (
        click.option(
            "--workdir", type=FOLDER, help="Work folder [$PORTTOOL_HOME, ./porttool-out]."
        ),
        click.option(
            "--model",
            help="Model family: names the paths under the work folder; a path given must be of it.",
        ),
    ):
        command = option(command)
    return command


Settings = tuple[tuple[str, str], ...]
"""Names and values of `--set`."""

OptionTable = tuple[tuple[str, dict[str, Any]], ...]
"""Flags with their click settings."""


def table_options(*tables: OptionTable) -> Callable[[F], F]:
    """Add tables of options to a command, in their order."""

    def add(command: F) -> F:
        for flag, settings in reversed([option for table in tables for option in table]):
            command = click.option(flag, **settings)(command)
        return command

    return add


def names_in(table: OptionTable) -> dict[str, str]:
    """Return the options of a table, by their Python names."""
    return {flag.strip("-").replace("-", "_"): flag for flag, _ in table}


def flags_in(table: OptionTable) -> dict[str, str]:
    """Return the same for `spelling`: single words are left out, for prose has them too."""
    return {name: flag for name, flag in names_in(table).items() if "_" in name}


@contextmanager
def spelling(flags: Mapping[str, str]) -> Iterator[None]:
    """Let a UsageError name options (Python name → flag) as they are on the command line."""
    try:
        yield
    except UsageError as error:
        text = str(error)
        for name, flag in flags.items():
            text = re.sub(rf"(?<![\w/-]){name}(?![\w/])", flag, text)
        error.args = (text,)  # not a new one: its kind and its notes say more
        raise


@contextmanager
def explaining() -> Iterator[None]:
    """Turn what a closed model says of the values it was given into a UsageError."""
    from pydantic import ValidationError

    from porttool.component import explain

    try:
        yield
    except ValidationError as error:
        raise UsageError(explain(error)) from error


UNTOLD: OptionTable = (
    ("--n-head", {"type": click.IntRange(min=1), "help": "Heads, where the source cannot tell."}),
    ("--vocab-size", {"type": click.IntRange(min=1),
                      "help": "Ids without padding, where the source cannot tell."}),
)  # fmt: skip
"""Options of converters that have flags of their own."""


def options_of(table: OptionTable, asked: Mapping[str, Any], pairs: Settings) -> dict[str, Any]:
    """Return the options of a component that a command was given: of a table, and --set pairs."""
    given = {name: asked[name] for name in names_in(table) if asked[name] is not None}
    return given | as_settings(pairs)


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")

set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    nargs=2,
    metavar="NAME VALUE",
    help="Set an option of the plugin that does the work; may be repeated.",
)


def as_settings(pairs: Settings) -> dict[str, Any]:
    """Turn --set pairs into options; a value that reads as JSON is taken as that."""
    settings: dict[str, Any] = {}
    for name, value in pairs:
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings
