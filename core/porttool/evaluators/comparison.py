"""From two sides' summaries to verdicts and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from porttool.evaluator import Table, Verdict
from porttool.evaluators.agreement import (
    Agreement,
    Tolerance,
    compare_continuations,
    summarise_drift,
    tolerance_for,
)
from porttool.evaluators.dataset import Article
from porttool.evaluators.results import SideResult
from porttool.evaluators.rouge import KINDS, score_summaries
from porttool.evaluators.statistics import (
    MIN_ARTICLES,
    Estimate,
    articles_needed,
    bootstrap_mean,
    power_of,
    unseen_share,
)
from porttool.evaluators.vocabulary import judge_ends

DRIFT_FACTOR = 2.5
"""How many times the reference's own drift in the engine's type the engine's may be."""


@dataclass(frozen=True)
class Bounds:
    """What the verdicts are held to; None leaves a number to the types of the two sides."""

    margin: float | None = None
    min_agreement: float | None = None
    max_drift: float | None = None
    rouge1_threshold: float | None = None
    resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0

    def tolerance(self, *sides: SideResult) -> Tolerance:
        """Return the sides' tolerance with what was measured or asked for in place.

        A yardstick that is no number, for activations overflowed in it, is none.
        """
        found = tolerance_for(*(side.dtype for side in sides))
        drift = max(
            (DRIFT_FACTOR * s.rounding[o.dtype] for s in sides for o in sides
             if math.isfinite(s.rounding.get(o.dtype, math.nan))),
            default=found.drift,
        )  # fmt: skip
        return replace(
            found,
            margin=found.margin if self.margin is None else self.margin,
            share=found.share if self.min_agreement is None else self.min_agreement,
            drift=drift if self.max_drift is None else self.max_drift,
        )


Scores = dict[str, list[float]]
"""Kind of ROUGE → F of every article, 0 to 100."""


@dataclass(frozen=True)
class Comparison:
    """Everything that is known when the sides have run; either may be None."""

    articles: Sequence[Article]
    engine: SideResult | None
    reference: SideResult | None
    engine_scores: Scores
    reference_scores: Scores
    agreements: tuple[Agreement, ...]
    bounds: Bounds
    unit: str = "articles"

    @property
    def sides(self) -> list[SideResult]:
        """The sides that are there."""
        return [side for side in (self.engine, self.reference) if side]

    @property
    def both(self) -> bool:
        """True when there are two sides to compare."""
        return self.engine is not None and self.reference is not None

    @property
    def tolerance(self) -> Tolerance:
        """What the types of the sides allow."""
        return self.bounds.tolerance(*self.sides)

    @property
    def n_worded(self) -> int:
        """Different texts that a side has more than blanks for: the others show nothing."""
        pairs = zip(self.articles, *(s.continuations for s in self.sides), strict=True)
        return len({a.text for a, *c in pairs if any(each.text.strip() for each in c)})

    def means(self, kind: str) -> list[str]:
        """Each side's mean as text, a dash for a side that is not there."""
        sides = (self.engine_scores, self.reference_scores)
        return [f"{sum(side[kind]) / len(side[kind]):.2f}" if side else "-" for side in sides]

    def differences(self, kind: str) -> list[float]:
        """Engine minus reference, article by article."""
        pairs = zip(self.engine_scores[kind], self.reference_scores[kind], strict=True)
        return [a - b for a, b in pairs]

    def estimate(self, values: Sequence[float]) -> Estimate:
        """Bootstrap a mean as the bounds say."""
        b = self.bounds
        return bootstrap_mean(values, resamples=b.resamples, confidence=b.confidence, seed=b.seed)


def compare_sides(
    articles: Sequence[Article],
    engine: SideResult | None,
    reference: SideResult | None,
    bounds: Bounds,
) -> Comparison:
    """Score each side that is there, and compare them if both are."""
    highlights = [a.highlights for a in articles]
    scores = [
        score_summaries([c.text for c in side.continuations], highlights) if side else {}
        for side in (engine, reference)
    ]
    agreements: tuple[Agreement, ...] = ()
    if engine and reference:
        tolerance = bounds.tolerance(engine, reference)
        eos = engine.task.decoding.eos
        agreements = tuple(
            compare_continuations(ours, theirs, eos, tolerance)
            for ours, theirs in zip(engine.continuations, reference.continuations, strict=True)
        )
    return Comparison(articles, engine, reference, scores[0], scores[1], agreements, bounds)


def judge(comparison: Comparison) -> tuple[Verdict, ...]:
    """Return every verdict that the sides allow."""
    verdicts: list[Verdict] = []
    engine, reference = comparison.engine, comparison.reference
    if engine and reference:
        verdicts += [judge_rouge(comparison, kind) for kind in KINDS]
        verdicts.append(judge_agreement(comparison))
        if engine.task.decoding.num_beams == 1:
            verdicts.append(judge_drift(comparison))
        if reference.ends and reference.counterpart is None:  # it is what was converted
            verdicts.append(judge_ends(engine.task.decoding.eos, reference.ends))
    if comparison.bounds.rouge1_threshold is not None:
        verdicts.append(judge_threshold(comparison, comparison.bounds.rouge1_threshold))
    return tuple(verdicts)


def judge_rouge(comparison: Comparison, kind: str) -> Verdict:
    """Non-inferiority: the lower bound of the mean paired difference lies above -margin."""
    differences = comparison.differences(kind)
    found, level = comparison.estimate(differences), comparison.bounds.confidence
    margin, unit = comparison.tolerance.margin, comparison.unit
    name, bound = f"{kind} not inferior", f"> {-margin:.2f}"
    if (n_worded := comparison.n_worded) < MIN_ARTICLES:
        return Verdict(
            name=name, passed=None, found=f"{n_worded} {unit}", bound=bound,
            detail=f"a verdict needs at least {MIN_ARTICLES} different {unit} that a side has "
            "words for",
        )  # fmt: skip
    detail = f"mean difference {found.mean:+.2f}, sd {found.sd:.2f}, n {found.n}"
    if not any(differences):
        detail += f"; of all {unit} up to {unseen_share(n_worded, level):.1%} may still differ"
    passed = found.low > -margin
    if not passed and found.high > -margin:
        needed = articles_needed(found.sd, margin, confidence=level)
        detail += f"; undecided: an equal port would need {needed} {unit}"
    return Verdict(name=name, passed=passed, found=f"{found.low:+.2f}", bound=bound, detail=detail)


def judge_agreement(comparison: Comparison) -> Verdict:
    """Enough articles have the same tokens, or part where the reference sees a tie."""
    found, tolerance = comparison.agreements, comparison.tolerance
    count = {o: sum(a.outcome == o for a in found) for o in ("same", "tie", "different")}
    share = (count["same"] + count["tie"]) / len(found) if found else 0.0
    worst = max((a for a in found if a.outcome == "different"), default=None,
                key=lambda a: a.gap or 0.0)  # fmt: skip
    detail = f"{count['same']} the same, {count['tie']} part at a tie, {count['different']} differ"
    if worst is not None:
        sign = "at least " if worst.at_least else ""
        detail += f", the widest gap {sign}{worst.gap:.3g} at token {worst.position}"
    return Verdict(
        name="token agreement",
        passed=share >= tolerance.share if found else None,
        found=f"{share:.1%}",
        bound=f"≥ {tolerance.share:.1%}, tie ≤ {tolerance.gap:g}",
        detail=detail,
    )


def judge_drift(comparison: Comparison) -> Verdict:
    """The chosen tokens' log-probabilities are those of the reference, but for rounding."""
    drift, bound = summarise_drift(comparison.agreements), comparison.tolerance.drift
    if drift is None:
        return Verdict(
            name="log-probability drift", passed=None, found="0 tokens", bound=f"≤ {bound:.2g}",
            detail="no token was chosen by both sides",
        )  # fmt: skip
    passed = drift.p99 <= bound
    hint = "" if passed else "; the arithmetic differs, `porttool verify` says where"
    number = not math.isnan(drift.p99)
    how_far = f"mean {drift.mean:.2g}, worst {drift.worst:.2g}" if number else "NaN among them"
    return Verdict(
        name="log-probability drift",
        passed=passed,
        found=f"{drift.p99:.2g}" if number else "no numbers",
        bound=f"99 % ≤ {bound:.2g}",
        detail=f"{how_far}, {drift.n_tokens} tokens{hint}",
    )


def judge_threshold(comparison: Comparison, threshold: float) -> Verdict:
    """ROUGE-1 itself lies above a number: the ancestor's check."""
    scores = comparison.engine_scores or comparison.reference_scores
    side = "engine" if comparison.engine else "Hugging Face"
    mean = sum(scores["rouge1"]) / len(scores["rouge1"])
    return Verdict(
        name="rouge1 threshold", passed=mean > threshold, found=f"{mean:.2f}",
        bound=f"> {threshold:g}", detail=f"of the {side}",
    )  # fmt: skip


def power_note(n: int, sd: float, margin: float, confidence: float, what: str) -> str:
    """Say what a run of n articles can show."""
    needed = articles_needed(sd, margin, confidence=confidence) if sd else MIN_ARTICLES
    return (
        f"{n} articles, margin {margin:g} ROUGE points, {what} sd of the differences {sd:.2f}: an "
        f"equal port passes with a chance of {power_of(n, sd, margin, confidence):.0%} "
        f"(80 % needs {needed} articles)"
    )


def tables_of(comparison: Comparison) -> tuple[Table, ...]:
    """Return what a console or a page shows: ROUGE and speed."""
    return (rouge_table(comparison), speed_table(comparison))


def rouge_table(comparison: Comparison) -> Table:
    """Return each kind's mean on both sides and the difference between its bounds."""
    rows = []
    for kind in KINDS:
        between = ("-", "-", "-")
        if comparison.both:
            d = comparison.estimate(comparison.differences(kind))
            between = (f"{d.mean:+.2f}", f"{d.low:+.2f}", f"{d.high:+.2f}")
        rows.append((kind, *comparison.means(kind), *between))
    level = f"{comparison.bounds.confidence:.0%}"
    columns = ("", "engine", "Hugging Face", "difference", f"{level} low", f"{level} high")
    return Table(title=f"ROUGE F, {len(comparison.articles)} {comparison.unit}", columns=columns,
                 rows=tuple(rows))  # fmt: skip


def speed_table(comparison: Comparison) -> Table:
    """Return how fast each side was."""
    rows = [
        (
            name,
            f"{side.speed.tokens_per_second:.1f}",
            f"{side.speed.articles_per_second:.2f}",
            f"{1000 * side.speed.first_token_seconds:.1f}",
            f"{side.speed.seconds:.1f}",
            side.description,
        )
        for name, side in (("engine", comparison.engine), ("Hugging Face", comparison.reference))
        if side is not None
    ]
    columns = ("", "tokens/s", f"{comparison.unit}/s", "first token ms", "seconds", "how")
    return Table(title="Speed", columns=columns, rows=tuple(rows))


def measurements_of(comparison: Comparison) -> Mapping[str, Any]:
    """Return the numbers behind the verdicts, article by article, as JSON."""
    return {
        "speed": {side.side: side.speed.model_dump() for side in comparison.sides},
        "rouge": {"engine": comparison.engine_scores, "reference": comparison.reference_scores},
        "articles": [article_entry(comparison, i) for i in range(len(comparison.articles))],
    }


def article_entry(comparison: Comparison, index: int) -> dict[str, Any]:
    """Return one article's record, texts and agreement."""
    article = comparison.articles[index]
    entry: dict[str, Any] = {**article.record.model_dump(), "highlights": article.highlights}
    for side in comparison.sides:
        entry[side.side] = side.continuations[index].text
    if comparison.agreements:
        found = comparison.agreements[index]
        finite = found.gap if found.gap is not None and found.gap < float("inf") else None
        entry["agreement"] = {"outcome": found.outcome, "position": found.position, "gap": finite}
    return entry
