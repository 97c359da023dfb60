"""The same settings mean the same distribution as transformers' processors, on the same logits."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from porttool.config import Sampling
from porttool.sampling import adjust, draw, filtered

VOCAB = 50
PROMPTS = [[3, 7, 7, 1], [9, 2, 0, 4]]
OUTPUTS = [[5, 3], [4, 4]]


@pytest.fixture(params=range(3))
def logits(request):
    return torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(request.param)) * 3


def processed(processors, logits, *, history=True):
    rows = [p + o for p, o in zip(PROMPTS, OUTPUTS, strict=True)] if history else PROMPTS
    return LogitsProcessorList(processors)(torch.tensor(rows), logits.clone())


def adjusted(logits, **settings):
    return adjust(logits, Sampling(**settings), PROMPTS, OUTPUTS, (6, 8))


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_k": 5}, [TopKLogitsWarper(5)]),
        ({"temperature": 1.0, "top_k": VOCAB}, []),
        ({"temperature": 1.0, "top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"temperature": 1.0, "top_p": 0.05}, [TopPLogitsWarper(0.05)]),
        ({"temperature": 1.0, "min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
         [TemperatureLogitsWarper(1.7), TopKLogitsWarper(20), TopPLogitsWarper(0.9),
          MinPLogitsWarper(0.05)]),
    ],
)  # fmt: skip
def test_filters(logits, settings, warpers):
    expected = processed(warpers, logits)
    torch.testing.assert_close(filtered(logits, Sampling(**settings)), expected)


def test_filters_on_ties():
    logits = torch.zeros(1, 8)
    expected = processed([TopKLogitsWarper(3)], logits[:1].repeat(2, 1))[:1]
    assert filtered(logits, Sampling(temperature=1.0, top_k=3)).equal(expected)


@pytest.mark.parametrize("penalty", [1.3, 0.5])
def test_repetition_penalty(logits, penalty):
    expected = processed([RepetitionPenaltyLogitsProcessor(penalty)], logits)
    torch.testing.assert_close(adjusted(logits, repetition_penalty=penalty), expected)


def test_presence_and_frequency_count_the_output_alone(logits):
    expected = logits.clone()
    expected[0, [5, 3]] -= 0.5 + 0.25
    expected[1, 4] -= 0.5 + 2 * 0.25
    found = adjusted(logits, presence_penalty=0.5, frequency_penalty=0.25)
    torch.testing.assert_close(found, expected)


def test_bad_words(logits):
    """One token, a word begun in the output, one begun in the prompt, one longer than all."""
    words = ((11,), (3, 20), (2, 0, 4, 4, 4, 21), (4, 4, 22), tuple(range(30)))
    processor = NoBadWordsLogitsProcessor([list(w) for w in words], eos_token_id=None)
    found = adjusted(logits, bad_words=words)
    assert found.equal(processed([processor], logits))
    banned = [sorted(found[r].isinf().nonzero()[:, 0].tolist()) for r in range(2)]
    assert banned == [[11, 20], [11, 21, 22]]


@pytest.mark.parametrize(("least", "banned"), [(2, False), (3, True)])
def test_minimum_length_forbids_every_end(logits, least, banned):
    processor = MinNewTokensLengthLogitsProcessor(4, least, [6, 8])
    found = adjusted(logits, min_new_tokens=least, max_new_tokens=9)
    assert found.equal(processed([processor], logits))
    assert bool(found[:, [6, 8]].isinf().all()) == banned


def test_the_callers_logits_are_not_changed(logits):
    before = logits.clone()
    adjusted(logits, repetition_penalty=2.0, bad_words=((1,),))
    assert logits.equal(before)


def test_ids_of_a_prompt_table_have_no_logit(logits):
    found = adjust(logits, Sampling(repetition_penalty=2.0), [[VOCAB + 3, 1], [0]], [[], []], ())
    expected = adjust(logits, Sampling(repetition_penalty=2.0), [[1], [0]], [[], []], ())
    assert found.equal(expected)


def test_draws_follow_the_distribution():
    """20 000 draws: each frequency within 4.5 standard errors of its probability."""
    logits = torch.tensor([[0.0, 1.0, 2.0, float("-inf"), -1.0]])
    generator = torch.Generator().manual_seed(1)
    n = 20_000
    tokens = torch.cat([draw(logits, [generator]) for _ in range(n)])
    for token, p in enumerate(logits.softmax(-1)[0].tolist()):
        error = math.sqrt(p * (1 - p) / n)
        assert abs((tokens == token).float().mean().item() - p) <= 4.5 * error
