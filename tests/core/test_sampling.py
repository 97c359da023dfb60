"""The same settings mean the same distribution as transformers' processors, on the same logits."""

from __future__ import annotations

import math
from statistics import NormalDist

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
from porttool.sampling import Choices, Penalties, Sampler, draw, filtered, shares

VOCAB = 50
PROMPTS = [[3, 7, 7, 1], [9, 2, 0, 4]]
OUTPUTS = [[5, 3], [4, 4]]


@pytest.fixture(params=range(3))
def logits(request):
    return torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(request.param)) * 3


def processed(processors, logits, *, history=True):
    rows = [p + o for p, o in zip(PROMPTS, OUTPUTS, strict=True)] if history else PROMPTS
    return LogitsProcessorList(processors)(torch.tensor(rows), logits.clone())


def adjusted(logits, prompts=PROMPTS, outputs=OUTPUTS, **settings):
    """The rows live in slots 2 and 0, where others lived before."""
    penalties = Penalties(Sampling(**settings), (6, 8), 3, logits)
    slots = torch.tensor([2, 0])
    for slot in range(3):
        penalties.begin(slot, [11, 12, 13])
    penalties.add(slots, torch.tensor([14, 15]))
    for slot, prompt in zip(slots.tolist(), prompts, strict=True):
        penalties.begin(slot, prompt)
    for tokens in zip(*outputs, strict=True):
        penalties.add(slots, torch.tensor(tokens))
    return penalties.apply(logits, slots, torch.tensor([len(o) for o in outputs]))


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_k": 5}, [TopKLogitsWarper(5)]),
        ({"temperature": 1.0, "top_k": VOCAB}, []),
        ({"temperature": 1.0, "top_k": VOCAB + 9}, []),
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


@pytest.mark.parametrize("settings", [
    {"temperature": 1e-38}, {"temperature": 1e-60}, {"repetition_penalty": 1e39},
    {"repetition_penalty": 1e-39}, {"presence_penalty": -1e39}, {"frequency_penalty": 1e39},
])  # fmt: skip
def test_settings_that_leave_no_probabilities_are_refused(settings):
    """Logits leave float32's range: a token was drawn all the same, the vocabulary's last."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampling(**settings)


@pytest.mark.parametrize("settings", [
    {"temperature": 1e-6}, {"repetition_penalty": 1e6, "temperature": 1.0},
    {"repetition_penalty": 1e-6, "presence_penalty": -1e6, "frequency_penalty": 1e6},
])  # fmt: skip
def test_the_widest_settings_leave_probabilities(logits, settings):
    changed = adjusted(logits * 1e3, **settings)
    if settings.get("temperature"):
        changed = filtered(changed, Sampling(**settings))
    assert changed.softmax(-1).sum(-1).allclose(torch.ones(2))


def test_filters_on_ties():
    logits = torch.zeros(1, 8)
    expected = processed([TopKLogitsWarper(3)], logits[:1].repeat(2, 1))[:1]
    assert filtered(logits, Sampling(temperature=1.0, top_k=3)).equal(expected)
    assert filtered(logits, Sampling(temperature=1.0, min_p=1.0)).equal(logits)


def test_a_nucleus_that_is_reached_exactly():
    """Half of eight equal tokens, and no fifth: which four is up to a library's way of sorting."""
    even = torch.zeros(2, 8)
    expected = processed([TopPLogitsWarper(0.5)], even)
    found = filtered(even, Sampling(temperature=1.0, top_p=0.5))
    assert found.isfinite().sum(-1).equal(expected.isfinite().sum(-1))
    assert found.isfinite().sum(-1).tolist() == [4, 4]


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
    settings = {"repetition_penalty": 2.0, "bad_words": ((1, VOCAB + 3), (VOCAB + 3, 4))}
    virtual = [[1, VOCAB + 3], [VOCAB + 7]]
    found = adjusted(logits, virtual, [[], []], **settings)
    expected = adjusted(logits, [[1], [0]], [[], []], repetition_penalty=2.0)
    expected[1, 0] = logits[1, 0]
    expected[0, 4] = -math.inf
    assert found.equal(expected)


def test_penalties_follow_copied_rows(logits):
    penalties = Penalties(Sampling(frequency_penalty=0.5, bad_words=((3, 9, 20),)), (), 2, logits)
    penalties.begin(0, [1])
    penalties.begin(1, [2])
    both = torch.tensor([0, 1])
    penalties.add(both, torch.tensor([3, 4]))
    penalties.copy(torch.tensor([1, 0]), torch.tensor([0, 1]))
    penalties.add(both, torch.tensor([9, 9]))
    found = penalties.apply(logits, both, torch.tensor([2, 2])) - logits
    assert found.isinf().nonzero().tolist() == [[1, 20]]
    found = found.nan_to_num(neginf=0)
    assert found.nonzero().tolist() == [[0, 4], [0, 9], [1, 3], [1, 9]]


def chi_square_quantile(level, freedom):
    """By Wilson and Hilferty's cube root (1931), good to a per cent here."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + NormalDist().inv_cdf(level) * math.sqrt(part)) ** 3


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.05, "top_k": 30}], ids=str
)
def test_draws_follow_the_distribution(settings):
    """40 000 draws: chi-square below its 99.99 % quantile, and nothing that is excluded."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, VOCAB, generator=generator) * 2
    logits[0, ::9] = -math.inf
    logits = filtered(logits, Sampling(temperature=1.3, **settings))
    n = 40_000
    numbers = torch.rand(n, generator=generator, dtype=torch.float64)
    found = draw(logits.expand(n, -1), numbers).bincount(minlength=VOCAB).double()
    expected = n * logits.double().softmax(-1)[0]
    assert not found[expected == 0].any()
    likely = expected > 5
    square = ((found - expected)[likely].square() / expected[likely]).sum().item()
    assert square < chi_square_quantile(0.9999, int(likely.sum()) - 1)


def test_a_number_at_a_border_belongs_to_the_token_above():
    """Two tokens of one half each between tokens of none: 0, just below, at and above 0.5, 1."""
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    numbers = torch.tensor([0.0, 0.5 - 2.0**-40, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(logits.expand(4, -1), numbers).tolist() == [1, 1, 3, 3]


def test_the_last_number_never_finds_what_is_impossible():
    """Totals that are one, less, and more."""
    last = torch.full((200,), 1 - 2.0**-53, dtype=torch.float64)
    logits = torch.randn(200, 1000, generator=torch.Generator().manual_seed(0)) * 4
    logits[:, 900:] = -math.inf
    assert len(shares(logits).sum(-1).unique()) > 20
    assert (draw(logits, last) < 900).all()
    assert shares(logits).gather(1, draw(logits, last)[:, None]).all()
    thirds = torch.tensor([[0.0, 0.0, 0.0, -math.inf]])
    assert int(shares(thirds).sum()) > 2**40
    assert draw(thirds, last[:1]).tolist() == [2]


def test_broken_logits_give_a_token_of_the_vocabulary():
    logits = torch.full((2, VOCAB), math.nan)
    assert (draw(logits, torch.tensor([0.0, 0.99], dtype=torch.float64)) < VOCAB).all()


def test_a_row_draws_the_same_in_any_slot_batch_and_chunk():
    """Its numbers are its own and in order: a row alone, and beside others that come and go."""
    sampling = Sampling(temperature=1.0, max_new_tokens=9, repetition_penalty=1.2, logprobs=True)
    logits = torch.randn(9, 1, VOCAB, generator=torch.Generator().manual_seed(2))

    def tokens(slot, others, chunk):
        sampler = Sampler(sampling, (), 4, logits[0])
        sampler.begin(slot, [4, 5], 1)
        for other in others:
            sampler.begin(other, [6], 2 + other)
        found, kept = [], []
        for first in range(0, 9, chunk):
            choices = Choices(sampler, [*others, slot], [0] * len(others) + [first])
            for i in range(min(chunk, 9 - first)):
                rows = logits[first + i].expand(1 + len(others), -1)
                found.append(choices(rows, i)[-1].item())
            kept += [part[-1] for part in choices.logprobs]
        return found, torch.stack(kept)

    wanted, likely = tokens(0, [], 1)
    assert len(set(wanted)) > 5
    for arrangement in [(3, [0, 1], 4), (1, [2], 9), (2, [3, 0, 1], 2)]:
        found, same = tokens(*arrangement)
        assert found == wanted
        assert same.equal(likely)


def test_a_longer_request_begins_with_the_same_numbers():
    def numbers(most):
        sampler = Sampler(
            Sampling(temperature=1.0, seed=-5, max_new_tokens=most), (), 1, torch.zeros(1, 3)
        )
        sampler.begin(0, [1], 7)
        return sampler.numbers[0]

    assert numbers(100)[:7].equal(numbers(7))
