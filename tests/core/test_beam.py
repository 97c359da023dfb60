"""Beam search against transformers, on the same weights."""

from __future__ import annotations

import pytest
import torch

from porttool.config import Sampling
from porttool.errors import UsageError
from porttool.generate import generate
from tiny import PROMPTS

ENDS = (11, 30)


def hf_beams(model, prompt, eos, **settings):
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False, eos_token_id=list(eos) or None, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True, **settings,
        )  # fmt: skip
    beams = []
    for row in out.sequences[:, len(prompt) :].tolist():
        end = next((i for i, t in enumerate(row) if t in eos), len(row))
        beams.append(tuple(row[:end]))
    return beams, out.sequences_scores.tolist()


@pytest.mark.parametrize(
    "eos", [(), ENDS, tuple(range(0, 67, 5)), tuple(i for i in range(67) if i % 4)],
    ids=["none", "two", "many", "most"],
)  # fmt: skip
@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("num_beams", [2, 3])
def test_beams_and_scores(runner, talker, num_beams, length_penalty, early_stopping, eos):
    settings = {
        "num_beams": num_beams, "num_return_sequences": num_beams,
        "length_penalty": length_penalty, "early_stopping": early_stopping, "max_new_tokens": 8,
    }  # fmt: skip
    found = generate(runner, PROMPTS[::2], Sampling(**settings), eos=eos)
    for prompt, group in zip(PROMPTS[::2], found, strict=True):
        beams, scores = hf_beams(talker, prompt, eos, **settings)
        assert [c.tokens for c in group] == beams
        got = torch.tensor([c.score for c in group])
        torch.testing.assert_close(got, torch.tensor(scores), atol=1e-6, rtol=1e-6)


def test_the_search_ends_where_transformers_ends_it(runner, talker):
    """By an estimate over the length so far: one token more or less would let others win."""
    settings = {"num_beams": 2, "length_penalty": 2.0, "max_new_tokens": 3}
    eos = tuple(i for i in range(67) if i % 3)
    prompts = [[i] for i in range(67)]
    found = generate(runner, prompts, Sampling(**settings), eos=eos)
    expected = [hf_beams(talker, prompt, eos, **settings)[0][0] for prompt in prompts]
    assert [group[0].tokens for group in found] == expected


def test_with_penalties_and_minimum_length(runner, talker):
    settings = {
        "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 10, "min_new_tokens": 4,
        "repetition_penalty": 1.3,
    }  # fmt: skip
    eos = tuple(range(0, 67, 5))
    words = {"bad_words_ids": [[1], [2, 3]]}
    found = generate(runner, PROMPTS, Sampling(**settings, bad_words=((1,), (2, 3))), eos=eos)
    for prompt, group in zip(PROMPTS, found, strict=True):
        beams, _ = hf_beams(talker, prompt, eos, **settings, **words)
        assert [c.tokens for c in group] == beams


def test_the_best_beam_is_at_least_as_likely_as_greedy(runner):
    """What beam search is for, in the one measure that it optimises."""
    n = 10
    beams = generate(runner, PROMPTS, Sampling(num_beams=4, max_new_tokens=n), eos=())
    greedy = generate(runner, PROMPTS, Sampling(logprobs=True, max_new_tokens=n), eos=())
    scores = [(b[0].score * n, sum(g[0].logprobs)) for b, g in zip(beams, greedy, strict=True)]
    assert all(beam >= alone - 1e-6 for beam, alone in scores)
    assert any(beam > alone + 1e-3 for beam, alone in scores)


def test_more_prompts_than_room(runner):
    """Two beams of nine prompts through four slots: the same as one by one."""
    prompts = [[i, i + 1] for i in range(9)]
    settings = Sampling(num_beams=2, max_new_tokens=6)
    together = generate(runner, prompts, settings, eos=ENDS)
    alone = [generate(runner, [p], settings, eos=ENDS)[0] for p in prompts]
    assert [[c.tokens for c in g] for g in together] == [[c.tokens for c in g] for g in alone]


def test_what_beam_search_does_not_report(runner):
    with pytest.raises(UsageError, match="reports a score for each beam, not log-probabilities"):
        generate(runner, PROMPTS, Sampling(num_beams=2, logprobs=True, max_new_tokens=4), eos=())
