"""porttool profile: where the time of an engine goes."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from porttool.cli import console
from porttool.cli.options import (
    FOLDER,
    OUTPUT,
    ModelCommand,
    Settings,
    as_settings,
    json_option,
    model_options,
    set_option,
)
from porttool.errors import MissingExtra
from porttool.progress import format_tera
from porttool.standing import made_folder, require_place

if TYPE_CHECKING:
    from porttool.profiling import Profile

POSITIVE = click.IntRange(min=1)
KERNELS_SHOWN = 15


@click.command("profile", cls=ModelCommand)
@click.argument("engine", type=FOLDER, required=False)
@model_options
@click.option("--output", "-o", type=OUTPUT, default=Path("profile"), show_default=True,
              help="Folder of the trace, the tables and the picture.")  # fmt: skip
@click.option("--batch-size", type=POSITIVE, default=1, show_default=True, help="Rows at a time.")
@click.option("--prompt-len", type=POSITIVE, default=128, show_default=True,
              help="Tokens of each prompt.")  # fmt: skip
@click.option("--new-tokens", type=POSITIVE, default=16, show_default=True,
              help="Tokens decoded one at a time.")  # fmt: skip
@click.option("--under", type=click.Choice(("nsys", "ncu")),
              help="Run it under one of NVIDIA's profilers.")  # fmt: skip
@click.option("--ranges-only", is_flag=True,
              help="Run the steps as NVTX ranges, record nothing: what --under runs.")  # fmt: skip
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
    ranges_only: bool,
    settings: Settings,
    as_json: bool,
) -> None:
    """Show where the time of a prefill and its decoding goes.

    Writes a Chrome trace, tables by layer and kernel, and a picture.
    """
    from porttool import api
    from porttool.profiling import ProfileShape, profile, run_unrecorded
    from porttool.workspace import Workspace

    require_place(output / "trace.json")
    if under is not None:
        run_under(under, output, as_json=as_json)
        return
    options, space = as_settings(settings), Workspace.choose(workdir)
    runner = api.load(engine, model=model, options=options, workspace=space).runner
    shape = ProfileShape(batch_size, prompt_len, new_tokens)
    if ranges_only:
        run_unrecorded(runner, shape)
        return
    found = profile(runner, shape, output)
    draw(found, output / "modules.png")
    if as_json:
        console.say_json({**asdict(found), "output": str(output)})
        return
    show(found, output)


def run_under(tool: str, output: Path, *, as_json: bool) -> None:
    """Run this very command line again, without --under, inside a tool; tell its counters."""
    from porttool.profiling.tools import run_tool, tool_command

    arguments = sys.argv[1:]
    at = next(i for i, a in enumerate(arguments) if a.startswith("--under"))
    rest = arguments[:at] + arguments[at + (1 if "=" in arguments[at] else 2) :]
    run = [sys.executable, sys.argv[0], *rest, "--ranges-only"]
    with made_folder(output):
        run_tool(tool_command(tool, run, output))  # type: ignore[arg-type]
    if tool == "ncu":
        tell_counters(output, as_json=as_json)
    elif as_json:
        console.say_json({"trace": str(output / "nsys.nsys-rep"), "output": str(output)})
    else:
        console.say(f"{output / 'nsys.nsys-rep'}: open it in nsys-ui, or `nsys stats` it")


def tell_counters(output: Path, *, as_json: bool) -> None:
    """Turn ncu's file into counters.csv; print each kernel's means."""
    from porttool.profiling.counters import by_kernel, read_counters, write_counters
    from porttool.profiling.tools import COUNTERS

    counters = read_counters(output / COUNTERS)
    write_counters(counters, output / "counters.csv")
    kernels = by_kernel(counters)
    if as_json:
        console.say_json({"kernels": [asdict(k) for k in kernels], "output": str(output)})
        return
    shown = ("Duration", "SM Busy", "Issue Slots Busy", "Executed Ipc Active", "DRAM Throughput")
    units = {counter.name: counter.unit for counter in counters}
    rows = [
        (k.phase, k.kernel[:50], str(k.launches),
         *(f"{k.means[n]:.2f}" if n in k.means else "" for n in shown))
        for k in kernels[:KERNELS_SHOWN]
    ]  # fmt: skip
    columns = tuple(f"{n}, {units[n]}" if n in units else n for n in shown)
    console.table("Counters, means over launches", ("step", "kernel", "launches", *columns), rows)
    console.say(f"{output / 'counters.csv'}: every counter of every launch")


def draw(found: Profile, picture: Path) -> None:
    """Draw the picture; without matplotlib say so: everything else is there."""
    from porttool.profiling.chart import draw_chart

    try:
        draw_chart(found.lines, found.peak, found.description, picture)
    except MissingExtra as error:
        console.note(f"{picture} is not drawn: {error}")
    else:
        console.note(f"{picture}: the picture")


def show(found: Profile, output: Path) -> None:
    """Print phases, modules or kernels, and where the files are."""
    from porttool.profiling.table import over_layers

    flops = format_tera(found.peak.flops)
    peak = f"{flops} TFLOP/s, {found.peak.bandwidth / 1e9:.0f} GB/s measured"
    rows = [
        (name, f"{1e3 * f['seconds']:.3f}", f"{f['flops'] / 1e9:.3f}", f"{f['bytes'] / 1e9:.3f}",
         f"{f['roofline']:.0%}")
        for name, f in found.phases.items()
    ]  # fmt: skip
    console.table(
        f"{found.description}; {peak}", ("step", "ms", "GFLOP", "GB", "of the roofline"), rows
    )
    if any(line.layer >= 0 for line in found.lines):
        lines = [
            (line.phase, line.module, f"{1e3 * line.seconds:.3f}", f"{line.cost.flops / 1e9:.3f}",
             f"{line.cost.nbytes / 1e9:.3f}", f"{line.fraction:.0%}")
            for line in over_layers(found.lines, found.peak)
        ]  # fmt: skip
        columns = ("step", "module, all layers", "ms", "GFLOP", "GB", "of the roofline")
        console.table("Modules", columns, lines)
    kernels = [
        (name[:70], str(calls), f"{1e3 * seconds:.3f}")
        for name, calls, seconds in found.kernels[:KERNELS_SHOWN]
    ]
    console.table("Kernels and operations, all steps", ("name", "calls", "ms"), kernels)
    console.say(f"{output}: trace.json (chrome://tracing, Perfetto), layers.csv, kernels.csv")
