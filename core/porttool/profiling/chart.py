"""The picture: how long each module takes, beside the least time that its work needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from porttool.errors import importing
from porttool.profiling.costs import Peak
from porttool.profiling.table import Line, over_layers


def draw_chart(lines: Sequence[Line], peak: Peak, title: str, path: Path) -> None:
    """Draw one panel a phase; MissingExtra without matplotlib."""
    with importing("eval", "matplotlib"):
        import matplotlib as mpl
    mpl.use("Agg")
    from matplotlib import pyplot

    summed = over_layers(lines, peak)
    phases = sorted({line.phase for line in summed}, reverse=True)
    figure, panels = pyplot.subplots(
        1, len(phases), figsize=(5.5 * len(phases), 3.6), squeeze=False, layout="constrained"
    )
    for axes, phase in zip(panels[0], phases, strict=True):
        rows = [line for line in summed if line.phase == phase][::-1]
        names = [line.module for line in rows]
        axes.barh(names, [1e3 * line.seconds for line in rows], color="#9db7d5", label="measured")
        least = [1e3 * line.seconds * line.fraction for line in rows]
        axes.barh(names, least, height=0.4, color="#1f4e79", label="roofline")
        axes.set_title(f"{phase}: all layers")
        axes.set_xlabel("milliseconds")
    panels[0][0].legend(loc="lower right", frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
