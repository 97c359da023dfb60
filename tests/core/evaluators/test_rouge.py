"""ROUGE by hand, and the sentences that rougeLsum is made of."""

from __future__ import annotations

import pytest

from porttool.evaluators.rouge import KINDS, score_summaries, split_sentences


def test_scores_by_hand():
    """4 of 4 and 4 of 6 words: F = 2 * 1 * 4/6 / (1 + 4/6) = 80; bigrams 2 of 3 and 2 of 5: 50."""
    found = score_summaries(["the cat on mat"], ["the cat sat on the mat"])
    assert found["rouge1"] == [pytest.approx(80)]
    assert found["rouge2"] == [pytest.approx(2 * (1 / 3) * (1 / 5) / (1 / 3 + 1 / 5) * 100)]
    assert found["rougeL"] == [pytest.approx(80)]
    assert found["rougeLsum"] == [pytest.approx(80)]


def test_sentence_order_matters_to_lsum_only_within_sentences():
    found = score_summaries(["Storm hits. Mayor resigns."], ["Mayor resigns.\nStorm hits."])
    assert found["rougeLsum"] == [pytest.approx(100)]
    assert found["rougeL"] == [pytest.approx(50)]


def test_words_are_not_stemmed():
    assert score_summaries(["running"], ["runs"])["rouge1"] == [0.0]


def test_an_empty_summary_scores_nothing():
    found = score_summaries(["", "a b"], ["a b", "a b"])
    assert {kind: found[kind][0] for kind in KINDS} == dict.fromkeys(KINDS, 0.0)
    assert found["rouge1"][1] == pytest.approx(100)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "no." Then he left.\n\nEnd', ['He said "no."', "Then he left.", "End"]),
        ("It cost 3.50 euros.", ["It cost 3.50 euros."]),
        ("  ", []),
    ],
)
def test_sentences(text, sentences):
    assert split_sentences(text).split("\n") == (sentences or [""])
