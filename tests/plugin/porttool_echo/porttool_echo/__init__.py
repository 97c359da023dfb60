"""A stranger's plugin, with a family, an engine, an evaluator and a command of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porttool import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable

    import click

    from porttool import Builder, Converter, Evaluator, Runner

api_version = 1


@hookimpl
def porttool_converters() -> Iterable[type[Converter]]:
    """Return the converter of the family."""
    from porttool_echo.converter import EchoConverter

    return [EchoConverter]


@hookimpl
def porttool_builders() -> Iterable[type[Builder]]:
    """Return the builder of echo engines."""
    from porttool_echo.engine import EchoBuilder

    return [EchoBuilder]


@hookimpl
def porttool_runners() -> Iterable[type[Runner]]:
    """Return the runner of echo engines."""
    from porttool_echo.engine import EchoRunner

    return [EchoRunner]


@hookimpl
def porttool_evaluators() -> Iterable[type[Evaluator]]:
    """Return the evaluator."""
    from porttool_echo.evaluator import EchoEvaluator

    return [EchoEvaluator]


@hookimpl
def porttool_commands(cli: click.Group) -> None:
    """Add the command `porttool echo`."""
    from porttool_echo.command import command

    cli.add_command(command)
