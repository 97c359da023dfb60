"""porttool profile: where the time of an engine goes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from porttool.cli import console
from porttool.cli.options import FOLDER, as_settings, json_option, model_options, set_option

if TYPE_CHECKING:
    from porttool.profiling import Profile

POSITIVE = click.IntRange(min=1)
KERNELS_SHOWN = 15


@click.command("profile")
@click.argument("engine", type=FOLDER, required=False)
@model_options
@click.option("--output", "-o", type=FOLDER, default=Path("profile"), show_default=True,
              help="Folder of the trace, the tables and the picture.")  # fmt: skip
@click.option("--batch-size", type=POSITIVE, default=1, show_default=True, help="Rows at a time.")
@click.option("--prompt-len", type=POSITIVE, default=128, show_default=True,
              help="Tokens of each prompt.")  # fmt: skip
@click.option("--new-tokens", type=POSITIVE, default=16, show_default=True,
              help="Tokens decoded one at a time.")  # fmt: skip
@click.option("--under", type=click.Choice(("nsys", "ncu")),
              help="Run it under one of NVIDIA's profilers.")  # fmt: skip
@set_option
@json_option
def command(
    engine: Path | None,
    model: str | None,
    workdir: Path | None,
    output: Path,
    batch_size: int,
    prompt_len: int,
    new_tokens: int,
    under: str | None,
    settings: tuple[tuple[str, str], ...],
    as_json: bool,
) -> None:
    """Profile a prefill and its decoding: a Chrome trace, tables by layer and kernel, a picture."""
    from porttool import api
    from porttool.profiling import ProfileShape, profile
    from porttool.workspace import Workspace

    if under is not None:
        run_under(under, output)
        return
    options, space = as_settings(settings), Workspace.choose(workdir)
    runner = api.load(engine, model=model, options=options, workspace=space).runner
    found = profile(runner, ProfileShape(batch_size, prompt_len, new_tokens), output)
    if as_json:
        console.say_json({**asdict(found), "output": str(output)})
        return
    show(found, output)


def run_under(tool: str, output: Path) -> None:
    """Run this very command line again, without --under, inside a tool."""
    import sys

    from porttool.profiling.tools import run_tool, tool_command

    arguments = sys.argv[1:]
    at = next(i for i, a in enumerate(arguments) if a.startswith("--under"))
    rest = arguments[:at] + arguments[at + (1 if "=" in arguments[at] else 2) :]
    output.mkdir(parents=True, exist_ok=True)
    run_tool(tool_command(tool, rest, output))  # type: ignore[arg-type]


def show(found: Profile, output: Path) -> None:
    """Print phases, modules or kernels, and where the files are."""
    from porttool.profiling.chart import draw_chart
    from porttool.profiling.table import over_layers

    peak = f"{found.peak.flops / 1e12:.2f} TFLOP/s, {found.peak.bandwidth / 1e9:.0f} GB/s measured"
    rows = [
        (name, f"{1e3 * f['seconds']:.3f}", f"{f['flops'] / 1e9:.3f}", f"{f['bytes'] / 1e9:.3f}",
         f"{f['roofline']:.0%}")
        for name, f in found.phases.items()
    ]  # fmt: skip
    console.table(
        f"{found.description}; {peak}", ("step", "ms", "GFLOP", "GB", "of the roofline"), rows
    )
    if found.lines:
        lines = [
            (line.phase, line.module, f"{1e3 * line.seconds:.3f}", f"{line.cost.flops / 1e9:.3f}",
             f"{line.cost.nbytes / 1e9:.3f}", f"{line.fraction:.0%}")
            for line in over_layers(found.lines, found.peak)
        ]  # fmt: skip
        columns = ("step", "module, all layers", "ms", "GFLOP", "GB", "of the roofline")
        console.table("Modules", columns, lines)
        draw_chart(found.lines, found.peak, found.description, output / "modules.png")
    kernels = [
        (name[:70], str(calls), f"{1e3 * seconds:.3f}")
        for name, calls, seconds in found.kernels[:KERNELS_SHOWN]
    ]
    console.table("Kernels and operations, all steps", ("name", "calls", "ms"), kernels)
    console.say(f"{output}: trace.json (chrome://tracing, Perfetto), layers.csv, kernels.csv")
