"""The command `porttool echo`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("echo")
@click.argument("engine", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
def command(engine: Path, output: Path) -> None:
    """Check that ENGINE counts; leave the report in OUTPUT."""
    from porttool.api import load
    from porttool.evaluator import Port, evaluate
    from porttool_echo.evaluator import EchoEvaluator

    report = evaluate(EchoEvaluator(), Port(runner=load(engine).runner), output)
    click.echo(f"echo: {report.verdicts[0].found}")
    report.require_pass()
