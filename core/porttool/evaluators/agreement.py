"""Do two sides choose the same tokens, for the same reasons? Ties and drift told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from porttool.config import Dtype
from porttool.evaluators.results import Continuation

if TYPE_CHECKING:
    from torch import Tensor

Outcome = Literal["same", "tie", "different"]


@dataclass(frozen=True)
class Tolerance:
    """What rounding in a type can do to the probabilities of a correct port.

    gap     at the first differing token, how much less likely (natural log) the engine's choice
            may be than the reference's, in the reference's own eyes
    drift   |difference| of the chosen tokens' log-probabilities: 99 % of them lie below it
    share   of the articles, how many must agree or part at a tie, at least
    margin  of ROUGE, in points, that the port may lose, at most
    """

    gap: float
    drift: float
    share: float
    margin: float = 0.5


TOLERANCES: dict[Dtype, Tolerance] = {
    "float64": Tolerance(gap=1e-6, drift=1e-9, share=1.0),
    "float32": Tolerance(gap=1e-3, drift=1e-4, share=0.99),
    "float16": Tolerance(gap=0.05, drift=5e-2, share=0.95),
    "bfloat16": Tolerance(gap=0.4, drift=4e-1, share=0.9),
}
"""Calibrated as docs/validation.md describes; the coarser of the two sides' types counts."""


def tolerance_for(*dtypes: Dtype) -> Tolerance:
    """Return the widest tolerance among types."""
    return max((TOLERANCES[d] for d in dtypes), key=lambda t: t.gap)


@dataclass(frozen=True)
class Agreement:
    """How one article's two continuations compare.

    `position` is that of the first differing token. `gap` is how much less likely the engine's
    token is there, or, in beam search, how much worse its beam's score; a lower bound if
    `at_least`. `drift` holds |difference in log-probability| of every token before that.
    """

    outcome: Outcome
    position: int | None = None
    gap: float | None = None
    at_least: bool = False
    drift: tuple[float, ...] = ()


def compare_continuations(
    engine: Continuation, reference: Continuation, eos: tuple[int, ...], tolerance: Tolerance
) -> Agreement:
    """Find where two continuations part, and whether the reference calls it a tie."""
    ours, theirs = ended_tokens(engine), ended_tokens(reference)
    position = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if position is None and len(ours) != len(theirs):
        position = min(len(ours), len(theirs))
    drift = drift_before(engine, reference, position)
    if position is None:
        return Agreement("same", drift=drift)
    if reference.score is not None and engine.score is not None:
        gap, at_least = abs(reference.score - engine.score), False
    else:
        token = ours[position] if position < len(ours) else None
        gap, at_least = gap_at(reference, position, token, eos)
    outcome: Outcome = "tie" if gap <= tolerance.gap and not at_least else "different"
    return Agreement(outcome, position, gap, at_least, drift)


END = -1


def ended_tokens(continuation: Continuation) -> list[int]:
    """Return the tokens, with a mark where the end token was."""
    return [*continuation.tokens, *([END] if continuation.ended else [])]


def gap_at(
    reference: Continuation, position: int, token: int | None, eos: tuple[int, ...]
) -> tuple[float, bool]:
    """Return how much less likely a token is than the reference's best, or that it is at least so.

    Without candidates for the step, or for a token that is not among them, it is a lower bound.
    """
    if position >= len(reference.candidates):
        return float("inf"), True
    step = reference.candidates[position]
    wanted = set(eos) if token == END else {token}
    found = [c.logprob for c in step if c.token in wanted]
    if found:
        return step[0].logprob - found[0], False
    return step[0].logprob - step[-1].logprob, True


def drift_of(logits: Tensor, found: Continuation) -> list[float]:
    """|difference in log-probability| of a continuation's tokens and of logits at their places.

    Logits are [len(tokens), vocab_size]; the continuation knows its own log-probabilities.
    """
    chosen = logits.log_softmax(-1)[range(len(found.tokens)), list(found.tokens)]
    pairs = zip(chosen.tolist(), found.logprobs or (), strict=True)
    return [abs(a - b) for a, b in pairs]


def drift_before(
    engine: Continuation, reference: Continuation, position: int | None
) -> tuple[float, ...]:
    """Return |difference in log-probability| of the tokens that both chose before they part."""
    if engine.logprobs is None or reference.logprobs is None:
        return ()
    pairs = zip(engine.logprobs, reference.logprobs, strict=False)
    return tuple(abs(a - b) for a, b in list(pairs)[:position])


@dataclass(frozen=True)
class Drift:
    """|difference in log-probability| of the chosen tokens, over all articles."""

    n_tokens: int
    mean: float
    p99: float
    worst: float


def summarise_drift(agreements: Sequence[Agreement]) -> Drift | None:
    """Return the drift over all articles, or None if no token could be compared."""
    values = np.array([v for a in agreements for v in a.drift])
    if not values.size:
        return None
    return Drift(
        values.size, float(values.mean()), float(np.quantile(values, 0.99)), float(values.max())
    )
