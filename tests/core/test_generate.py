"""The loop against transformers' generate, and against itself in other batches."""

from __future__ import annotations

import pytest
import torch

import tiny
from porttool.config import Limits, Sampling
from porttool.errors import UsageError
from porttool.generate import generate
from porttool.nn import Step
from porttool.text import Tokenizer, load_tokenizer
from tiny import PROMPTS, reference_logits

MANY = [[(7 * i + j) % 65 for j in range(1 + (5 * i) % 9)] for i in range(11)]


class Letters(Tokenizer):
    """Id i is a letter or two; 65 begins a character that 66 ends."""

    @property
    def n_tokens(self):
        return 67

    def encode(self, text):
        return [ord(c) - 97 for c in text]

    def decode(self, ids):
        pieces = {65: b"\xc3", 66: b"\xa9"}
        data = b"".join(pieces.get(i, bytes([97 + i % 26, 65 + i // 26])) for i in ids)
        return data.decode(errors="replace")


def run(runner, prompts, *, eos=(), **settings):
    tokenizer = settings.pop("tokenizer", None)
    found = generate(runner, prompts, Sampling(**settings), eos=eos, tokenizer=tokenizer)
    return [c for group in found for c in group]


def hf_greedy(model, prompt, n, eos=None, **settings):
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=n, do_sample=False, eos_token_id=eos, pad_token_id=0, **settings,
        )  # fmt: skip
    new = out[0, len(prompt) :].tolist()
    return new[:-1] if eos is not None and new[-1] in eos else new


@pytest.fixture(scope="module")
def greedy(talker):
    """What transformers generates, 20 tokens a prompt."""
    return [hf_greedy(talker, p, 20) for p in PROMPTS]


def test_greedy_tokens(runner, greedy):
    found = run(runner, PROMPTS, max_new_tokens=20)
    assert [list(c.tokens) for c in found] == greedy
    assert {c.finish for c in found} == {"length"}


def test_cached_decode_equals_full_prefill(runner, talker):
    """Every step's logits are those of one prefill over the whole row."""
    found = run(runner, PROMPTS, max_new_tokens=20, keep_logits=True)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        whole = reference_logits(talker, [*prompt, *completion.tokens])[len(prompt) - 1 : -1]
        assert completion.logits.dtype == torch.float32
        torch.testing.assert_close(completion.logits.double(), whole, atol=1e-5, rtol=0)


def test_logprobs_are_the_models_own(runner, talker):
    """Before penalties and temperature, as log_softmax of the reference's logits."""
    found = run(
        runner, PROMPTS, max_new_tokens=12, logprobs=True, temperature=1.5, repetition_penalty=1.4
    )
    for prompt, completion in zip(PROMPTS, found, strict=True):
        whole = reference_logits(talker, [*prompt, *completion.tokens])[len(prompt) - 1 : -1]
        tokens = torch.tensor(completion.tokens)[:, None]
        expected = whole.log_softmax(-1).gather(1, tokens)[:, 0]
        got = torch.tensor(completion.logprobs, dtype=torch.float64)
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)


def test_all_that_the_engine_takes_and_gives(runner):
    limits = runner.engine.manifest.limits
    [found] = run(runner, [[1] * limits.max_input_len], max_new_tokens=limits.max_output_len)
    assert (found.finish, len(found.tokens)) == ("length", limits.max_output_len)


def test_a_step_to_the_last_place_of_the_cache_and_one_beyond(runner):
    runner.step(Step.decode([1], [0], [runner.max_len - 1]))
    with pytest.raises(UsageError, match=f"reach {runner.max_len + 1} tokens, but the engine hold"):
        runner.step(Step.decode([1], [0], [runner.max_len]))


def test_an_end_token_takes_its_logprob_and_logits_with_it(runner, greedy):
    settings = {"logprobs": True, "keep_logits": True, "max_new_tokens": 12}
    found = run(runner, PROMPTS, eos=(greedy[0][3],), **settings)
    assert [found[0].finish, len(found[0].tokens)] == ["eos", 3]
    for completion in found:
        n = len(completion.tokens)
        assert len(completion.logprobs) == n
        assert completion.logits is None if n == 0 else len(completion.logits) == n


def test_rows_join_and_leave(runner, talker):
    """Eleven prompts through four slots, ending at different times by an end token."""
    ends = (43, 13)
    found = run(runner, MANY, max_new_tokens=20, eos=ends)
    expected = [hf_greedy(talker, p, 20, eos=list(ends)) for p in MANY]
    assert [list(c.tokens) for c in found] == expected
    assert len({len(c.tokens) for c in found}) > 3
    assert {c.finish for c in found} == {"eos", "length"}
    assert all((len(c.tokens) == 20) == (c.finish == "length") for c in found)


def test_order_and_batch_change_nothing(engine_folder, registry):
    runner = tiny.loaded(engine_folder, registry)
    together = run(runner, MANY, max_new_tokens=8, keep_logits=True)
    for i, prompt in enumerate(MANY):
        alone = run(runner, [prompt], max_new_tokens=8, keep_logits=True)[0]
        assert alone.tokens == together[i].tokens
        torch.testing.assert_close(alone.logits, together[i].logits, atol=1e-6, rtol=0)
    backwards = run(runner, MANY[::-1], max_new_tokens=8)[::-1]
    assert [c.tokens for c in backwards] == [c.tokens for c in together]


def test_padding_does_not_reach_a_row(runner):
    """A short row beside a long one, padded with different ids, gives the same logits."""

    def logits(fill):
        step = Step.prefill([[5, 9], [1, 60, 33, 4, 8, 19, 2]])
        step.tokens[0, 2:] = fill
        return runner.step(step)[0]

    torch.testing.assert_close(logits(0), logits(64), atol=0, rtol=0)


def test_seeds(runner):
    settings = {"max_new_tokens": 12, "temperature": 1.0}
    first = run(runner, PROMPTS, seed=5, **settings)
    again = run(runner, PROMPTS, seed=5, **settings)
    other = run(runner, PROMPTS, seed=6, **settings)
    assert [c.tokens for c in first] == [c.tokens for c in again]
    assert [c.tokens for c in first] != [c.tokens for c in other]


def test_a_seed_means_the_same_in_any_batch(runner):
    """A row's draws depend on the seed and its place, not on who runs beside it."""
    settings = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    together = [c.tokens for c in run(runner, MANY, **settings)]
    first = [c.tokens for c in run(runner, MANY[:1], **settings)]
    few = [c.tokens for c in run(runner, MANY[:5], **settings)]
    assert together[:1] == first
    assert together[:5] == few


def test_several_samples_of_a_prompt(runner):
    settings = {"max_new_tokens": 12, "temperature": 1.0, "num_return_sequences": 3}
    found = generate(runner, PROMPTS, Sampling(**settings), eos=())
    assert [len(group) for group in found] == [3] * len(PROMPTS)
    assert all(len({c.tokens for c in group}) == 3 for group in found)


def test_temperature_zero_is_greedy_and_top_k_one_too(runner, greedy):
    found = run(runner, PROMPTS, max_new_tokens=20, temperature=3.0, top_k=1)
    assert [list(c.tokens) for c in found] == greedy


def test_repetition_penalty_and_bad_words_as_transformers(runner, talker, greedy):
    words = [[greedy[0][0]], greedy[1][3:5]]
    found = run(
        runner, PROMPTS, max_new_tokens=20, repetition_penalty=1.4,
        bad_words=tuple(map(tuple, words)),
    )  # fmt: skip
    expected = [
        hf_greedy(talker, p, 20, repetition_penalty=1.4, bad_words_ids=words) for p in PROMPTS
    ]
    assert [list(c.tokens) for c in found] == expected
    assert expected != greedy


def test_minimum_length(runner, talker, greedy):
    end = greedy[0][0]
    found = run(runner, PROMPTS[:1], max_new_tokens=20, min_new_tokens=7, eos=(end,))[0]
    expected = hf_greedy(talker, PROMPTS[0], 20, eos=[end], min_new_tokens=7)
    assert list(found.tokens) == expected
    assert end not in found.tokens[:7]
    assert run(runner, PROMPTS[:1], max_new_tokens=20, eos=(end,))[0].tokens == ()


def test_ignoring_the_end(runner, greedy):
    found = run(runner, PROMPTS, max_new_tokens=20, eos=(greedy[0][2],), ignore_eos=True)
    assert [list(c.tokens) for c in found] == greedy


@pytest.mark.parametrize("end", [8, 27])
def test_a_stop_string_across_token_borders(runner, greedy, end):
    """From the end of one token's text to the beginning of the next's, or of one further on."""
    letters = Letters()
    text = letters.decode(greedy[0])
    stop = text[5:end]
    found = run(
        runner, PROMPTS[:1], max_new_tokens=20, stop=(stop, "not there"), tokenizer=letters
    )[0]
    assert found.finish == "stop"
    assert found.text == text[: text.index(stop)]
    n = (text.index(stop) + len(stop) + 1) // 2  # the tokens up to the one that completes it
    assert list(found.tokens) == greedy[0][:n]


def test_stop_strings_in_a_batch_stop_their_own_row(runner, greedy):
    letters = Letters()
    texts = [letters.decode(g) for g in greedy]
    stop = texts[0][2:6]
    found = run(runner, PROMPTS, max_new_tokens=20, stop=(stop,), tokenizer=letters)
    for completion, text in zip(found, texts, strict=True):
        assert completion.text == text.split(stop)[0]
        assert (completion.finish == "stop") == (stop in text)


def test_a_special_token_is_a_stop_string(runner, greedy):
    """StarChat's turns end with `<|end|>`, which no text shows and no file calls an end."""

    class Special(Letters):
        def encode(self, text):
            return [greedy[0][3]] if text == "<|end|>" else super().encode(text)

        def decode(self, ids):
            return super().decode([i for i in ids if i != greedy[0][3]])

    found = run(
        runner, PROMPTS, max_new_tokens=20, stop=("<|end|>", "not there"), tokenizer=Special()
    )
    for completion, whole in zip(found, greedy, strict=True):
        cut = whole.index(greedy[0][3]) if greedy[0][3] in whole else len(whole)
        assert list(completion.tokens) == whole[:cut]
        assert completion.finish == ("stop" if cut < len(whole) else "length")


def test_stop_strings_need_a_tokenizer(runner):
    with pytest.raises(UsageError, match="stop strings need a tokenizer"):
        run(runner, PROMPTS, stop=("x",), max_new_tokens=4)


def test_every_token_is_told_as_it_is_chosen(runner):
    told = []
    sampling = Sampling(max_new_tokens=9)
    found = generate(runner, MANY, sampling, eos=(4,), on_token=lambda *t: told.append(t))
    for i, (completion,) in enumerate(found):
        assert [t for row, t in told if row == i] == list(completion.tokens)
    rows = [row for row, _ in told]
    assert rows != sorted(rows)  # rows take turns: nobody waits for a neighbour's end


@pytest.mark.parametrize(
    ("prompts", "settings", "said"),
    [
        ([], {}, "there is no prompt"),
        ([[1], []], {}, "prompt 1 is empty; give it at least one token"),
        ([[1] * 25], {}, "prompt 0 has 25 tokens, the engine takes 24; shorten it, or build with"),
        ([[1, 67]], {}, "prompt 0 holds the id 67; ids run from 0 to 66"),
        ([[1, -1]], {}, "prompt 0 holds the id -1; ids run from 0 to 66"),
        ([[1]], {"max_new_tokens": 25}, "25 new tokens asked for, the engine gives at most 24"),
        ([[1]], {"num_beams": 5}, "max-batch-size"),
        ([[1]], {"bad_words": ((3, 90),)}, "bad word [3, 90] has an id outside 0 to 66"),
    ],
)  # fmt: skip
def test_limits_are_checked_before_anything_runs(runner, monkeypatch, prompts, settings, said):
    def never(*_, **__):
        raise AssertionError("it ran")

    monkeypatch.setattr(runner, "step", never)
    with pytest.raises(UsageError) as caught:
        run(runner, prompts, **{"max_new_tokens": 4, **settings})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_new_tokens": 9, "max_new_tokens": 4}, "min_new_tokens 9 exceeds max_new_tokens 4"),
        ({"num_beams": 2, "temperature": 1.0}, "beam search does not sample"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences exceeds num_beams"),
        ({"stop": ("",)}, "an empty bad word or stop string would match everywhere"),
        ({"bad_words": ((),)}, "an empty bad word or stop string would match everywhere"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"tempreature": 1.0}, "tempreature"),
    ],
)
def test_settings_that_contradict_each_other(settings, said):
    with pytest.raises(ValueError, match=said):
        Sampling(**settings)


def test_limits_hold_the_sum_of_both_lengths():
    assert Limits(max_input_len=3, max_output_len=4).max_len == 7


def test_a_real_tokenizer_gives_text(runner, tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    found = run(runner, PROMPTS, max_new_tokens=5, tokenizer=tokenizer)
    assert all(c.text == tokenizer.decode(c.tokens) for c in found)
