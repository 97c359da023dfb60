"""Writes cli.md: what `--help` says of every command. Run it after changing an option."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from porttool.cli import COMMANDS, cli

TARGET = Path(__file__).with_name("cli.md")
HEAD = """\
# The command line

What `--help` says, written by `python docs/make_cli.py`. Exit status: 0 done, 1 a failed check or
operation, 2 a usage error, 130 interrupted. Options may be written with underscores. Tab
completion, in `~/.bashrc` (or with `zsh_source`, `fish_source`):
`eval "$(_PORTTOOL_COMPLETE=bash_source porttool)"`.
"""
WIDTH = 100


def pages(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
    """Yield the help of a command and of those below it; plugins' commands are left out."""
    context = click.Context(
        command, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH,
        help_option_names=["-h", "--help"],
    )  # fmt: skip
    if parent is not None:
        yield f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for below in COMMANDS if parent is None else command.list_commands(context):
            found = command.get_command(context, below)
            if found is not None:
                yield from pages(found, below, context)


def cli_page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *pages(cli, "porttool", None)])


if __name__ == "__main__":
    TARGET.write_text(cli_page())
