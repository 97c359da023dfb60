"""The same, a tie, or really different: told apart by the reference's own probabilities."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import cast

import pytest

from porttool.evaluators.agreement import (
    TOLERANCES,
    Agreement,
    Tolerance,
    compare_continuations,
    summarise_drift,
    tolerance_for,
)
from porttool.evaluators.comparison import Comparison, judge_drift
from porttool.evaluators.results import Candidate, Continuation

TOLERANCE = Tolerance(gap=0.01, drift=0.1, share=0.9)
EOS = (0,)


def reference(tokens, *, ended=False, runner_up=(9, -0.505), best=-0.5):
    steps = [(Candidate(t, best), Candidate(*runner_up)) for t in [*tokens, *([0] * ended)]]
    return Continuation(
        tokens=tuple(tokens), ended=ended, logprobs=(best,) * len(tokens), candidates=tuple(steps)
    )


def engine(tokens, *, ended=False, logprob=-0.5):
    return Continuation(tokens=tuple(tokens), ended=ended, logprobs=(logprob,) * len(tokens))


def compare(ours, theirs):
    return compare_continuations(ours, theirs, EOS, TOLERANCE)


def test_the_same_tokens():
    assert compare(engine([1, 2], ended=True), reference([1, 2], ended=True)).outcome == "same"


def test_a_tie_is_no_difference():
    found = compare(engine([1, 9, 4]), reference([1, 2, 3]))
    assert (found.outcome, found.position) == ("tie", 1)
    assert found.gap == pytest.approx(0.005)


def test_a_clear_preference_is():
    found = compare(engine([1, 9, 4]), reference([1, 2, 3], runner_up=(9, -2.0)))
    assert (found.outcome, found.position, found.gap) == ("different", 1, 1.5)


def test_a_token_that_is_no_candidate_is_different_however_near_the_candidates():
    found = compare(engine([1, 7]), reference([1, 2]))
    assert (found.outcome, found.at_least) == ("different", True)


def test_ending_too_early_and_too_late():
    early = compare(engine([1], ended=True), reference([1, 2], runner_up=(0, -3.0)))
    assert (early.outcome, early.position, early.gap) == ("different", 1, 2.5)
    late = compare(engine([1, 9]), reference([1], ended=True))
    assert (late.outcome, late.position) == ("tie", 1)


def test_stopping_without_an_end_token_is_different():
    found = compare(engine([1]), reference([1, 2]))
    assert (found.outcome, found.position, found.at_least) == ("different", 1, True)


def test_going_on_behind_the_reference_is_different():
    """There is nothing to hold the token to, and that is no tie."""
    found = compare(engine([1, 2, 3]), reference([1, 2]))
    assert (found.outcome, found.position, found.gap) == ("different", 2, math.inf)


def test_beams_are_compared_by_score():
    theirs = Continuation(tokens=(1, 2), ended=False, score=-1.0)
    for score, outcome in ((-1.005, "tie"), (-1.2, "different")):
        ours = Continuation(tokens=(1, 3), ended=False, score=score)
        assert compare(ours, theirs).outcome == outcome


def test_drift_is_of_the_common_tokens_alone():
    found = compare(engine([1, 9, 4], logprob=-0.7), reference([1, 2, 3]))
    assert found.drift == (pytest.approx(0.2),)
    whole = compare(engine([1, 2], logprob=-0.6), reference([1, 2]))
    assert whole.drift == (pytest.approx(0.1),) * 2


def test_drift_over_articles():
    found = summarise_drift([Agreement("same", drift=(0.1, 0.3)), Agreement("same", drift=(0.2,))])
    assert (found.n_tokens, found.mean, found.worst) == (3, pytest.approx(0.2), 0.3)
    assert summarise_drift([Agreement("same")]) is None


def test_drift_that_is_no_number_fails_in_words():
    found = Agreement("same", drift=(0.1, float("nan")))
    told = SimpleNamespace(agreements=[found], tolerance=TOLERANCES["float32"])
    verdict = judge_drift(cast("Comparison", told))
    assert (verdict.passed, verdict.found) == (False, "no numbers")
    assert verdict.detail.startswith("NaN among them, 2 tokens; the arithmetic differs")


def test_the_coarser_type_counts():
    assert tolerance_for("float32", "bfloat16") == TOLERANCES["bfloat16"]
    assert tolerance_for("float16", "float32") == TOLERANCES["float16"]
