"""The picture of a comparison: scores, articles one by one, differences, drift."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porttool.evaluators.comparison import judge_rouge
from porttool.evaluators.rouge import KINDS

if TYPE_CHECKING:
    from porttool.evaluators.comparison import Comparison

ENGINE, REFERENCE, SOFT, BAD = "#2f6fed", "#98a2b3", "#667085", "#d92d20"


def draw_chart(comparison: Comparison, path: Path) -> None:
    """Draw what there is to show of the sides that ran, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.05, hspace=0.08)
    figure = Figure(figsize=(13, 7.6) if comparison.both else (6.5, 4), layout=layout)
    FigureCanvasAgg(figure)
    if comparison.both:
        axes = figure.subplots(2, 2).flatten()
        draw_means(axes[0], comparison)
        draw_scatter(axes[1], comparison)
        draw_differences(axes[2], comparison)
        draw_drift(axes[3], comparison)
    else:
        axes = [figure.subplots()]
        draw_means(axes[0], comparison)
    for each in axes:
        plain(each)
    figure.savefig(path, dpi=140)


def plain(axes: Any) -> None:
    """Take the box away and quieten the ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#d0d5dd")
    axes.tick_params(colors=SOFT, labelsize=9, length=3)
    axes.set_title(axes.get_title("left"), loc="left", fontsize=11.5, fontweight="bold")
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(SOFT)
        label.set_fontsize(9.5)


def draw_means(axes: Any, comparison: Comparison) -> None:
    """Draw each kind's mean on both sides, with its interval over articles."""
    sides = [
        (name, colour, scores)
        for name, colour, scores in (
            ("engine", ENGINE, comparison.engine_scores),
            ("Hugging Face", REFERENCE, comparison.reference_scores),
        )
        if scores
    ]
    width = 0.8 / len(sides)
    for index, (name, colour, scores) in enumerate(sides):
        found = [comparison.estimate(scores[kind]) for kind in KINDS]
        at = np.arange(len(KINDS)) + (index - (len(sides) - 1) / 2) * width
        errors = [[f.mean - f.low for f in found], [f.high - f.mean for f in found]]
        axes.bar(at, [f.mean for f in found], width * 0.92, color=colour, label=name)
        axes.errorbar(at, [f.mean for f in found], errors, fmt="none", ecolor="#344054",
                      elinewidth=1, capsize=3)  # fmt: skip
        for x, f in zip(at, found, strict=True):
            axes.annotate(f"{f.mean:.1f}", (x, f.high), (0, 3), textcoords="offset points",
                          ha="center", fontsize=8.5, color="#344054")  # fmt: skip
    axes.set_xticks(range(len(KINDS)), [k.replace("rouge", "ROUGE-") for k in KINDS])
    axes.set_ylabel("mean F, %")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.06)
    axes.set_title(f"Scores of {len(comparison.articles)} articles", loc="left")
    axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1.0), ncols=2)


def draw_scatter(axes: Any, comparison: Comparison) -> None:
    """Draw every article: its ROUGE-1 with Hugging Face and with the engine."""
    x = np.array(comparison.reference_scores["rouge1"])
    y = np.array(comparison.engine_scores["rouge1"])
    outcomes = np.array([a.outcome for a in comparison.agreements])
    top = max(x.max(), y.max(), 1) * 1.05
    axes.plot([0, top], [0, top], color="#d0d5dd", linewidth=1, zorder=0)
    for outcome, label, colour in (
        ("same", "same tokens", ENGINE),
        ("tie", "part at a tie", "#f79009"),
        ("different", "differ", BAD),
    ):
        chosen = outcomes == outcome
        if chosen.any():
            axes.scatter(x[chosen], y[chosen], s=26, alpha=0.65, color=colour, linewidths=0,
                         label=f"{label} ({chosen.sum()})")  # fmt: skip
    axes.set(xlim=(0, top), ylim=(0, top), xlabel="Hugging Face", ylabel="engine")
    axes.set_aspect("equal")
    axes.set_title("ROUGE-1 of each article", loc="left")
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def draw_differences(axes: Any, comparison: Comparison) -> None:
    """Draw each kind's mean difference between its bounds, and the margin."""
    margin = comparison.tolerance.margin
    for row, kind in enumerate(KINDS):
        found = comparison.estimate(comparison.differences(kind))
        colour = ENGINE if judge_rouge(comparison, kind).passed else BAD
        axes.plot([found.low, found.high], [row, row], color=colour, linewidth=2.5)
        axes.plot([found.mean], [row], "o", color=colour, markersize=7)
    axes.axvline(0, color="#d0d5dd", linewidth=1, zorder=0)
    axes.axvline(-margin, color=BAD, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(f"margin -{margin:g}", (-margin, -0.55), (4, 0), textcoords="offset points",
                  color=BAD, fontsize=9)  # fmt: skip
    reach = max(abs(v) for v in (*axes.get_xlim(), 1.5 * margin))
    axes.set(xlim=(-reach, reach), ylim=(len(KINDS) - 0.5, -0.8))
    axes.set_yticks(range(len(KINDS)), [k.replace("rouge", "ROUGE-") for k in KINDS])
    axes.set_xlabel("engine minus Hugging Face, points")
    level = comparison.bounds.confidence
    axes.set_title(f"Paired difference with one-sided {level:.0%} bounds", loc="left")


def draw_drift(axes: Any, comparison: Comparison) -> None:
    """Draw how far the chosen tokens' log-probabilities lie apart, and the bound."""
    values = np.array([v for a in comparison.agreements for v in a.drift])
    axes.set_title("Log-probability drift of the chosen tokens", loc="left")
    if not values.size:
        axes.text(0.5, 0.5, "not measured", ha="center", color=SOFT, transform=axes.transAxes)
        return
    bound = comparison.tolerance.drift
    shown = np.sort(np.maximum(values, bound * 1e-4))
    axes.fill_between(shown, 100 * np.arange(1, len(shown) + 1) / len(shown), step="post",
                      color=ENGINE, alpha=0.25, linewidth=0)  # fmt: skip
    axes.step(shown, 100 * np.arange(1, len(shown) + 1) / len(shown), where="post", color=ENGINE)
    p99 = float(np.quantile(values, 0.99))
    axes.axvline(p99, color="#344054", linewidth=1.4, label=f"99 % lie below {p99:.1e}")
    axes.axvline(bound, color=BAD, linewidth=1.2, linestyle=(0, (4, 3)),
                 label=f"their bound {bound:.1e}")  # fmt: skip
    axes.set_xscale("log")
    axes.set(xlabel="|Δ log p|", ylabel="tokens up to here, %", ylim=(0, 124))
    axes.legend(frameon=False, fontsize=9, loc="upper left")
