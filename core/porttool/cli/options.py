"""Options that several commands share, declared once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from porttool.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = ("float32", "float16", "bfloat16", "float64")
FOLDER = click.Path(path_type=Path)
OUTPUT = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)


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


OptionTable = tuple[tuple[str, dict[str, Any]], ...]
"""Flags with their click settings."""


def table_options(*tables: OptionTable) -> Callable[[F], F]:
    """Add tables of options to a command, in their order."""

    def add(command: F) -> F:
        for flag, settings in reversed([option for table in tables for option in table]):
            command = click.option(flag, **settings)(command)
        return command

    return add


@contextmanager
def spelling(flags: Mapping[str, str]) -> Iterator[None]:
    """Let a UsageError name options (Python name → flag) as they are on the command line."""
    try:
        yield
    except UsageError as error:
        text = str(error)
        for name, flag in flags.items():
            text = re.sub(rf"(?<![\w-]){name}(?!\w)", flag, text)
        raise UsageError(text) from error


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")

set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    nargs=2,
    metavar="NAME VALUE",
    help="Set an option of the plugin that does the work; may be repeated.",
)


def as_settings(pairs: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """Turn --set pairs into options; a value that reads as JSON is taken as that."""
    import json

    settings: dict[str, Any] = {}
    for name, value in pairs:
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings
