"""ROUGE of summaries, each article by itself: rouge-score without a stemmer, F in percent."""

from __future__ import annotations

import re
from collections.abc import Sequence

from porttool.errors import importing

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]])\s+|\n+")


def split_sentences(text: str) -> str:
    """Return a text with every sentence on a line of its own, as rougeLsum wants it.

    It splits at white space after `.`, `!` or `?` and a closing quote, and at line ends: without
    data files, and the same way for both sides and for the human summary.
    """
    parts = (part.strip() for part in _SENTENCE_END.split(text))
    return "\n".join(part for part in parts if part)


def score_summaries(summaries: Sequence[str], highlights: Sequence[str]) -> dict[str, list[float]]:
    """Return each kind's F of every summary, 0 to 100, in their order (Lin 2004)."""
    with importing("eval", "rouge_score"):
        from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer(list(KINDS), use_stemmer=False)
    scores: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for summary, target in zip(summaries, highlights, strict=True):
        found = scorer.score(split_sentences(target), split_sentences(summary))
        for kind in KINDS:
            scores[kind].append(100 * float(found[kind].fmeasure))
    return scores
