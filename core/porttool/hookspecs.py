"""The five hooks. Each yields classes; none carries behaviour.

Implement them in the module that your entry point names, with imports inside the functions, so
that listing plugins stays fast:

    from porttool import hookimpl

    api_version = 1

    @hookimpl
    def porttool_converters():
        from porttool_myfamily.converter import MyConverter
        return [MyConverter]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click

    from porttool.builder import Builder
    from porttool.converter import Converter
    from porttool.evaluator import Evaluator
    from porttool.prompt_table import TableConverter
    from porttool.runner import Runner

API_VERSION = 1
"""What a plugin's `api_version` must say. It changes only when plugins must."""

hookspec = pluggy.HookspecMarker("porttool")
hookimpl = pluggy.HookimplMarker("porttool")


@hookspec
def porttool_converters() -> Iterable[type[Converter | TableConverter]]:
    """Return the converters that this plugin brings: one for each source format of a family.

    Those of prompt tables, which make a table instead of a checkpoint, are among them.
    """
    return ()


@hookspec
def porttool_builders() -> Iterable[type[Builder]]:
    """Return builders; a builder's `name` is the kind of engine that it makes."""
    return ()


@hookspec
def porttool_runners() -> Iterable[type[Runner]]:
    """Return runners; a runner's `name` is the kind of engine that it loads."""
    return ()


@hookspec
def porttool_evaluators() -> Iterable[type[Evaluator]]:
    """Return evaluators: what can be measured of a port beside its reference."""
    return ()


@hookspec
def porttool_commands(cli: click.Group) -> None:
    """Add commands to the command line's group."""
