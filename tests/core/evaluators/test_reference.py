"""The Hugging Face side: padding changes nothing, recorded numbers are true, nothing is noisy."""

from __future__ import annotations

import json
import logging
import shutil
import warnings

import pytest
import torch

from porttool.errors import SourceError, UsageError
from porttool.evaluators.reference import ReferenceModel, fingerprint_model, quiet
from porttool.evaluators.results import Decoding
from porttool.evaluators.vocabulary import SAMPLES, compare_tokenizers
from porttool.text import load_tokenizer

PROMPTS = [[5, 90, 211], [7] * 11, [300, 2, 8, 45, 6, 31], [19]]


@pytest.fixture(scope="module")
def model(writer):
    return ReferenceModel(writer, dtype="float64")


@pytest.mark.parametrize("num_beams", [1, 3])
def test_padding_and_batching_change_nothing(model, num_beams):
    decoding = Decoding(max_new_tokens=9, num_beams=num_beams)
    together = model.generate(PROMPTS, decoding, batch_size=4)
    alone = [model.generate([p], decoding)[0] for p in PROMPTS]
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert len({c.tokens for c in together}) > 1


def test_recorded_log_probabilities_are_those_of_teacher_forcing(model):
    for prompt, found in zip(PROMPTS, model.generate(PROMPTS, Decoding(max_new_tokens=7)),
                             strict=True):  # fmt: skip
        logits = model.logits([*prompt, *found.tokens])[len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        assert logits.argmax(-1).tolist() == list(found.tokens)
        wanted = logprobs[range(7), list(found.tokens)]
        assert torch.tensor(found.logprobs, dtype=torch.float64).allclose(wanted, atol=2e-7)
        for step, candidates in zip(logprobs, found.candidates, strict=True):
            best = step.topk(len(candidates))
            assert [c.token for c in candidates] == best.indices.tolist()
            assert len(candidates) >= 2


def test_rows_end_before_their_end_token(model):
    free = model.generate(PROMPTS, Decoding(max_new_tokens=9))
    end = free[0].tokens[4]
    cut = model.generate(PROMPTS, Decoding(max_new_tokens=9, eos=(end,)))
    first = free[0].tokens.index(end)
    assert cut[0].tokens == free[0].tokens[:first]
    assert cut[0].ended
    assert len(cut[0].candidates) == first + 1
    assert len(cut[0].logprobs) == first


def test_trace_is_of_the_modules_named(model):
    trace = model.trace([4, 5, 6], {"a": "h.1.attn.c_attn", "b": "nowhere", "c": "wte"})
    assert set(trace) == {"a.in", "a.out", "c.in", "c.out", "logits"}
    assert trace["a.out"].shape == (1, 3, 72)
    assert torch.equal(trace["logits"][0], model.logits([4, 5, 6]))


def test_the_checkpoints_own_sampling_does_not_reach_the_comparison(writer, tmp_path):
    copy = shutil.copytree(writer, tmp_path / "opinionated")
    (copy / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 9.0, "repetition_penalty": 3.0, "max_length": 5}'
    )
    decoding = Decoding(max_new_tokens=9)
    plain = ReferenceModel(writer).generate(PROMPTS, decoding)
    assert [c.tokens for c in ReferenceModel(copy).generate(PROMPTS, decoding)] == [
        c.tokens for c in plain
    ]


def test_quiet_is_put_back():
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    with quiet():
        assert theirs.get_verbosity() == logging.ERROR
        assert not theirs.is_progress_bar_enabled()
        warnings.warn("this must not be heard", stacklevel=1)
    assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == before


def test_loading_says_nothing(writer, capfd):
    ReferenceModel(writer).generate(PROMPTS[:1], Decoding(max_new_tokens=1))
    assert capfd.readouterr() == ("", "")


def test_fingerprint_covers_config_and_weights(writer, tmp_path):
    copy = shutil.copytree(writer, tmp_path / "copy")
    assert fingerprint_model(copy) == fingerprint_model(writer)
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert fingerprint_model(copy) != fingerprint_model(writer)


@pytest.mark.parametrize(
    "config",
    [
        '{"model_type": "gpt2", "activation_function": null}',
        '{"model_type": "gpt2", "n_embd": "wide"}',
    ],
)
def test_a_config_that_transformers_does_not_know(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(SourceError, match=r"config\.json: transformers cannot load it"):
        ReferenceModel(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_to_be_missing(writer):
    with pytest.raises(UsageError, match="torch sees no GPU; use device cpu"):
        ReferenceModel(writer, device="cuda")


def test_a_folder_that_is_none_of_transformers_says_what_to_name(tmp_path):
    """A family that transformers has not is nobody's mistake: no advice to update helps."""
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    said = r"config\.json: transformers [\d.]+ has no model of type 'no_such_model'; name with --hf"
    with pytest.raises(UsageError, match=said):
        ReferenceModel(tmp_path)
    with pytest.raises(UsageError, match="there is no such folder; correct --hf-model"):
        ReferenceModel(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match=r"config\.json.*damaged JSON"):
        ReferenceModel(tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "there is no tokenizer in"),
        ({"tokenizer.json": '{"broken": 1}'}, "transformers loads no tokenizer from"),
    ],
)
def test_a_tokenizer_that_is_not_there_or_damaged_is_no_verdict(tmp_path, writer, files, said):
    (tmp_path / "config.json").write_text((writer / "config.json").read_text())
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = compare_tokenizers(load_tokenizer(writer), tmp_path, ["some text"], 320)
    assert f"{said} {tmp_path}" in found


def test_a_tokenizer_of_two_files_is_compared(tmp_path, writer):
    values = json.loads((writer / "tokenizer.json").read_text())["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in values["merges"]]
    (tmp_path / "config.json").write_text((writer / "config.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(values["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    found = compare_tokenizers(load_tokenizer(tmp_path), tmp_path, ["some text"], 320)
    assert getattr(found, "passed", found) is True


def swapped_ids(values):
    vocab = values["model"]["vocab"]
    first, second = list(vocab)[-3:-1]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def lost_merge(values):
    del values["model"]["merges"][-7]


def shown_end(values):
    values["added_tokens"][0]["special"] = False


def lost_token(values):
    values["added_tokens"].clear()
    values["model"]["vocab"].pop("<|endoftext|>")


def reversed_merges(values):
    values["model"]["merges"][40:] = values["model"]["merges"][:39:-1]


def swapped_bytes(values):
    """Two continuation bytes of UTF-8."""
    vocab = values["model"]["vocab"]
    vocab["\u0123"], vocab["\u0124"] = vocab["\u0124"], vocab["\u0123"]


@pytest.mark.parametrize(
    "change",
    [swapped_ids, lost_merge, shown_end, lost_token, reversed_merges, swapped_bytes],
)
def test_a_tokenizer_that_is_a_little_wrong(tmp_path, writer, change):
    """No text of prose shows that: every id is looked at."""
    values = json.loads((writer / "tokenizer.json").read_text())
    change(values)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert compare_tokenizers(load_tokenizer(writer), writer, ["The mayor."], 320).passed is True
    found = compare_tokenizers(load_tokenizer(tmp_path), writer, ["The mayor."], 320)
    assert (found.passed, bool(found.detail)) == (False, True)


def joined_spaces(values):
    """Right for every id, and for what it is encoded from."""
    merging = {"type": "Replace", "pattern": {"String": "  "}, "content": " "}
    values["decoder"] = {"type": "Sequence", "decoders": [values["decoder"], merging]}


def renamed_orphan(values):
    """A token that no merge makes: no text leads to it, and a model may say it all the same."""
    vocab = values["model"]["vocab"]
    vocab["QZ"] = vocab.pop("ZQ")


@pytest.mark.parametrize(
    ("change", "said"),
    [(joined_spaces, "for example ' Leading and "), (renamed_orphan, "the id 320 is 'QZ', should")],
)
def test_a_tokenizer_that_encodes_right_and_decodes_wrong(tmp_path, writer, change, said):
    source = shutil.copytree(writer, tmp_path / "source")
    values = json.loads((writer / "tokenizer.json").read_text())
    values["model"]["vocab"]["ZQ"] = 320
    for folder in (source, tmp_path):
        (folder / "tokenizer.json").write_text(json.dumps(values))
    assert compare_tokenizers(load_tokenizer(tmp_path), source, SAMPLES, 321).passed is True
    change(values)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    found = compare_tokenizers(load_tokenizer(tmp_path), source, SAMPLES, 321)
    assert (found.passed, found.detail.startswith(said)) == (False, True), found.detail
