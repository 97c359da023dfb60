"""camel-5b is chosen by what its config fixes, and asked as it was tuned."""

from __future__ import annotations

import pytest

import tiny
from porttool.cli import invoke
from porttool.errors import SourceError, UsageError
from porttool.plugins import choose_converter
from porttool.text import fill_template

CAMEL = {
    "activation_function": "gelu", "n_positions": 2048, "vocab_size": 50258, "n_embd": 8,
    "n_head": 2, "n_layer": 2, "eos_token_id": 50256, "bos_token_id": 50256,
    "pad_token_id": 50257,
}  # fmt: skip


@pytest.fixture(scope="module")
def camel():
    return tiny.gpt2(**CAMEL)


@pytest.fixture(scope="module")
def camel_source(tmp_path_factory, camel):
    form = tiny.Form(file="pytorch_model.bin", shards=3, masks=False)
    return tiny.write_source(tmp_path_factory.mktemp("camel") / "source", camel, form)


def test_it_is_recognised_before_gpt2(registry, camel_source, source):
    assert choose_converter(registry, camel_source).name == "camel5b"
    assert choose_converter(registry, source).name == "gpt2"
    assert choose_converter(registry, camel_source, "gpt2").name == "gpt2"


def test_another_gpt2_is_not_camel5b(registry, source):
    with pytest.raises(UsageError, match=r"not a source of 'camel5b'.*it looks like gpt2"):
        choose_converter(registry, source, "camel5b")


def test_logits_and_manifest(tmp_path, camel, camel_source):
    checkpoint = tiny.converted(camel_source, tmp_path / "checkpoint")
    manifest = checkpoint.manifest
    assert (manifest.family, manifest.plugin.component) == ("camel5b", "camel5b")
    assert (manifest.tokens.eos, manifest.tokens.pad) == ((50256,), 50257)
    assert (manifest.config.activation, manifest.config.n_positions) == ("gelu", 2048)
    limits = tiny.choose_limits(checkpoint.config, max_batch_size=1, max_input_len=20)
    runner = tiny.in_float64(checkpoint, tmp_path, limits=limits)
    tiny.assert_same(runner, camel, [[50257, 50256, 17, 4, 40000]])


def test_the_template_travels_with_the_checkpoint(tmp_path, camel_source):
    prompt = tiny.converted(camel_source, tmp_path / "checkpoint").manifest.prompt
    assert fill_template(prompt, "Name a colour.") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nName a colour.\n\n### Response:"
    )
    assert "### Instruction:\nWhat is {input}?\n" in fill_template(
        prompt, "What is {input}?", "text"
    )
    assert fill_template(prompt, "Sum up.", "Some text {instruction}") == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request\n\n"
        "### Instruction:\nSum up.\n\n### Input:\nSome text {instruction}\n\n### Response:"
    )


def test_another_family_says_that_it_loses_the_template(tmp_path, camel_source, source, capsys):
    said = "looks like camel5b, whose instruction template is lost when it is converted as gpt2"
    for i, (folder, told, expected) in enumerate((
        (camel_source, ["--model", "gpt2"], True), (camel_source, ["--model", "camel5b"], False),
        (camel_source, [], False), (source, ["--model", "gpt2"], False),
    )):  # fmt: skip
        assert invoke(["convert", str(folder), "-o", str(tmp_path / str(i)), *told]) == 0
        shown = " ".join(capsys.readouterr().err.split())
        assert (said in shown) is expected
        assert ("--model camel5b keeps it" in shown) is expected


def test_a_model_without_a_template_says_so():
    with pytest.raises(UsageError, match="no instruction template"):
        fill_template(None, "Name a colour.")


def test_a_missing_shard_is_named(tmp_path, camel):
    source = tiny.write_source(
        tmp_path / "source", camel, tiny.Form(file="pytorch_model.bin", shards=3)
    )
    (source / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(SourceError, match=r"pytorch_model-00002-of-00003\.bin: the shard is miss"):
        tiny.converted(source, tmp_path / "checkpoint")
