"""What a person sees of a benchmark: a table, and a picture with the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from porttool.benchmark.results import BenchmarkResult, Measurement
from porttool.benchmark.roofline import decode_cost, peak_of
from porttool.errors import require_extra
from porttool.evaluator import Table
from porttool.progress import format_tera

WHERE = "batch x in > out"
LATENCY = (WHERE, "side", "first ms", "ms a token", "p90", "p99", "x eager")
THROUGHPUT = (WHERE, "side", "tokens/s", "peak GB", "prefill", "decode")
COLOURS = ("#1f4e79", "#c0504d", "#9b8b3f", "#5a8f5a", "#7c5f9a", "#444444")


def as_tables(result: BenchmarkResult) -> tuple[Table, ...]:
    """Return who was measured, how long it took, and what came of it; each fits 80 columns."""
    sides = [
        (s.name + (" (random weights)" if s.random_weights else ""), s.description,
         f"{s.bytes_on_disk / 1e9:.3f}", f"{s.load_seconds:.1f}", s.memory_counter)
        for s in result.sides
    ]  # fmt: skip
    heads = ("side", "what", "GB on disk", "s to load", "memory read from")
    latency = [
        (where(m), m.side, f"{m.first_token_ms:.2f}", f"{m.token_ms:.3f}", f"{m.token_ms_p90:.3f}",
         f"{m.token_ms_p99:.3f}", "-" if m.times_as_fast is None else f"{m.times_as_fast:.2f}")
        for m in result.measurements
    ]  # fmt: skip
    throughput = [
        (where(m), m.side, f"{m.tokens_per_second:.1f}",
         "-" if m.peak_memory_bytes is None else f"{m.peak_memory_bytes / 1e9:.3f}",
         f"{m.prefill_roofline:.0%}", f"{m.decode_roofline:.0%}")
        for m in result.measurements
    ]  # fmt: skip
    return (
        Table(title=title_of(result), columns=heads, rows=tuple(sides)),
        Table(title="Latency", columns=LATENCY, rows=tuple(latency)),
        Table(
            title=f"Throughput; prefill and decode of the roofline, {ceilings_in(result)}",
            columns=THROUGHPUT,
            rows=tuple(throughput),
        ),
    )


def title_of(result: BenchmarkResult) -> str:
    """Return the machine, and a warning where weights are random."""
    machine = result.machine
    dummy = "; RANDOM WEIGHTS" if result.random_weights else ""
    return (machine.gpu or f"{machine.processor}, {machine.threads} threads") + dummy


def where(m: Measurement) -> str:
    """Return a measurement's cell, short."""
    return f"{m.cell.batch_size} x {m.cell.input_len} > {m.cell.output_len}"


def ceilings_in(result: BenchmarkResult) -> str:
    """Say between which speeds the device was measured over the rounds."""
    peaks = [peak_of(r.ceiling) for m in result.measurements for r in m.rounds]
    flops = sorted(p.flops for p in peaks)
    memory = sorted(p.bandwidth / 1e9 for p in peaks)
    return (
        f"measured beside: {format_tera(flops[0])} to {format_tera(flops[-1])} TFLOP/s, "
        f"{memory[0]:.0f} to {memory[-1]:.0f} GB/s"
    )


def draw_picture(result: BenchmarkResult, path: Path) -> None:
    """Draw milliseconds a token and to the first token over the batch, a row for each length.

    The dashed line is the least time on the device as it was measured. MissingExtra without
    matplotlib.
    """
    require_extra("eval", "matplotlib")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    lengths = sorted({(m.cell.input_len, m.cell.output_len) for m in result.measurements})
    figure, panels = pyplot.subplots(
        len(lengths), 2, figsize=(10, 3.6 * len(lengths)), squeeze=False, layout="constrained"
    )
    for (token, first), (n_in, n_out) in zip(panels, lengths, strict=True):
        here = [m for m in result.measurements if (m.cell.input_len, m.cell.output_len)
                == (n_in, n_out)]  # fmt: skip
        draw_lines(token, here, "token_ms", f"input {n_in}, output {n_out}: ms a token")
        draw_least(token, result, here)
        draw_lines(first, here, "first_token_ms", f"input {n_in}: ms to the first token")
    panels[0][0].legend(frameon=False, fontsize=8)
    types = ", ".join(sorted({s.dtype for s in result.sides}))
    figure.suptitle(f"{title_of(result)}, {types}", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_lines(axes: Any, measured: Sequence[Measurement], value: str, title: str) -> None:
    """Draw one line a side, both axes logarithmic."""
    sides = list(dict.fromkeys(m.side for m in measured))
    for colour, side in zip(COLOURS * len(sides), sides, strict=False):
        points = sorted((m.cell.batch_size, getattr(m, value)) for m in measured if m.side == side)
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=side)
        for batch, found in points:
            axes.annotate(f"{found:.3g}", (batch, found), (0, 5), textcoords="offset points",
                          fontsize=7, color=colour)  # fmt: skip
    batches = sorted({m.cell.batch_size for m in measured})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_xticks(batches, [str(b) for b in batches])
    axes.set_xlabel("batch")
    axes.set_title(title, fontsize=9)


def draw_least(axes: Any, result: BenchmarkResult, measured: Sequence[Measurement]) -> None:
    """Draw the roofline of the first side's type: the least milliseconds a token."""
    side = result.sides[0]
    points = sorted(
        (m.cell.batch_size, 1e3 * decode_cost(result.model, m.cell, side.dtype).seconds(
            peak_of(m.rounds[len(m.rounds) // 2].ceiling)))
        for m in measured if m.side == side.name
    )  # fmt: skip
    if points:
        axes.plot(*zip(*points, strict=True), "--", color="#888888", label="roofline")
