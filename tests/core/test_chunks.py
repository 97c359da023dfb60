"""Runners that choose several tokens on their own: nothing that is asked for changes."""

from __future__ import annotations

import pytest
import torch

import tiny
from porttool.config import Sampling
from porttool.engines.torch.device_decoder import CanonicalDecoder
from porttool.generate import CHUNK, generate
from porttool.nn import Step
from porttool.text import Tokenizer

MANY = [[(7 * i + j) % 65 for j in range(1 + (5 * i) % 9)] for i in range(11)]
ENDS = (13, 43, 50, 61)
NEW = CHUNK + 6

SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 3},
    "filtered": {"temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "forbidden": {"bad_words": ((5,), (60, 33), (3, 3, 3)), "min_new_tokens": 19},
    "all": {
        "temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2, "frequency_penalty": 0.2,
        "bad_words": ((9,), (12, 20)), "min_new_tokens": 3, "stop": ("7 3", "19 "),
    },
}  # fmt: skip


class Numbers(Tokenizer):
    """Says every id as a number."""

    n_tokens = 67

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return "".join(f"{i} " for i in ids)


class Chained(CanonicalDecoder):
    """Chooses as a GPU does: the logits of every token lie where those of the last one lay."""

    decodes_on_device = samples_on_device = True

    def decode(self, step, n_tokens):
        return self.sample(step, n_tokens, lambda logits, i: logits.argmax(-1))

    def sample(self, step, n_tokens, choose):
        tokens, place = [], torch.empty(len(step.slots), self.config.vocab_size, dtype=self.dtype)
        for i in range(n_tokens):
            place.copy_(self.step(step, all_positions=False))
            tokens.append(choose(place, i))
            step = Step(step.slots, tokens[-1][:, None], step.starts + 1, step.lengths)
        place.fill_(float("nan"))
        self.calls = [*getattr(self, "calls", []), n_tokens]
        return torch.stack(tokens, 1)


@pytest.fixture(scope="module")
def alone(engine_folder, registry):
    """A runner that comes back to the host for every token."""
    return tiny.loaded(engine_folder, registry)


@pytest.fixture
def chained(engine_folder, registry):
    runner = tiny.loaded(engine_folder, registry)
    plain = runner._decoder
    runner._decoder = Chained(
        plain.config, plain.module.state_dict(), dtype=plain.dtype, limits=plain.limits
    )
    return runner


def run(runner, prompts=MANY, *, name, **changes):
    settings = {"max_new_tokens": NEW, "logprobs": True, "keep_logits": True, **SETTINGS[name]}
    return generate(
        runner, prompts, Sampling(**{**settings, **changes}), eos=ENDS, tokenizer=Numbers()
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_several_tokens_at_a_time_are_the_tokens_one_by_one(alone, chained, name):
    """Eleven prompts through four slots: rows end inside chunks, and others take their slots."""
    together, single = run(chained, name=name), run(alone, name=name)
    for (found,), (wanted,) in zip(together, single, strict=True):
        assert (found.tokens, found.finish, found.text) == (
            wanted.tokens, wanted.finish, wanted.text
        )  # fmt: skip
        torch.testing.assert_close(found.logprobs, wanted.logprobs, atol=1e-12, rtol=0)
        if wanted.tokens:
            torch.testing.assert_close(found.logits, wanted.logits, atol=1e-6, rtol=0)
    assert CHUNK in chained._decoder.calls
    assert len({len(c.tokens) for (c,) in single}) > 1


@pytest.mark.parametrize("name", ["sampled", "all"])
def test_neighbours_change_no_draw(chained, name):
    together = run(chained, name=name, num_return_sequences=2)
    for n in (1, 3):
        few = run(chained, MANY[:n], name=name, num_return_sequences=2)
        assert [[c.tokens for c in group] for group in few] == [
            [c.tokens for c in group] for group in together[:n]
        ]


def test_what_is_kept_alone_changes_no_token(chained):
    for extra in ("logprobs", "keep_logits"):
        found = run(
            chained, name="greedy", **{"logprobs": False, "keep_logits": False, extra: True}
        )
        plain = run(chained, name="greedy", logprobs=False, keep_logits=False)
        assert [c.tokens for (c,) in found] == [c.tokens for (c,) in plain]
