from __future__ import annotations

import json
import shutil

import pytest
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

import nemo_writer
from porttool.config import PromptTemplate
from porttool.errors import CheckpointError
from porttool.text import TextStream, fill_template, load_tokenizer

TEXTS = [
    "The mayor said on Tuesday.", "  two  spaces\n\nand\ttabs ", "naïve café 東京 🌉🌊 ẞ",
    "don't 3,141.59 END<|endoftext|>", "", "\u200b\ufeff\x00",
]  # fmt: skip


@pytest.fixture(scope="module")
def byte_bpe(tmp_path_factory, tokenizer_folder):
    """The same tokenizer in GPT-2's two files."""
    folder = tmp_path_factory.mktemp("bpe")
    values = json.loads((tokenizer_folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(values["vocab"]))
    merges = [" ".join(m) if isinstance(m, list) else m for m in values["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_as_transformers(tokenizer_folder, text):
    ours = load_tokenizer(tokenizer_folder)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_folder / "tokenizer.json"))
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_two_files_as_transformers(byte_bpe, text):
    ours, theirs = load_tokenizer(byte_bpe), GPT2Tokenizer.from_pretrained(byte_bpe)
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_round_trip(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    plain = [t for t in TEXTS if "<|" not in t]
    assert [tokenizer.decode(tokenizer.encode(t)) for t in plain] == plain
    assert tokenizer.n_tokens == 320


def test_truncation_and_padding_in_the_file_are_not_obeyed(tmp_path, tokenizer_folder):
    import tokenizers

    asks = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    asks.enable_truncation(4)
    asks.enable_padding(length=8)
    asks.save(str(tmp_path / "tokenizer.json"))
    text = TEXTS[0]
    assert load_tokenizer(tmp_path).encode(text) == load_tokenizer(tokenizer_folder).encode(text)


def test_streaming_gives_the_same_text_in_whole_characters(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    for text in TEXTS[:3]:
        stream = TextStream(tokenizer)
        pieces = [stream.push(t) for t in tokenizer.encode(text)]
        assert not any("\N{REPLACEMENT CHARACTER}" in p for p in pieces)
        assert "".join(pieces) + stream.finish() == text


def test_a_character_that_never_ends_is_shown_at_the_end(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("a東")[:-1]
    assert "".join(stream.push(t) for t in ids) == "a"
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("file", "roles"),
    [
        ("special_tokens_map.json", {"pad_token": "[PAD]"}),
        ("special_tokens_map.json", {"pad_token": {"content": "[PAD]"}, "sep_token": None}),
        ("tokenizer_config.json", {"pad_token": "[PAD]", "tokenizer_class": "GPT2Tokenizer"}),
        ("tokenizer_config.json", {"additional_special_tokens": ["[PAD]"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {
            "320": {"content": "[PAD]", "special": True},
            "321": {"content": "<table>", "special": False},
        }}),
        ("special_tokens_map.json", {}),
    ],
)  # fmt: skip
def test_added_tokens_as_transformers_has_them(tmp_path, byte_bpe, file, roles):
    """Those with a role vanish from text, others are words like any."""
    folder = shutil.copytree(byte_bpe, tmp_path / "bpe")
    (folder / "added_tokens.json").write_text(json.dumps({"<table>": 321, "[PAD]": 320}))
    (folder / file).write_text(json.dumps(roles))
    tokenizer, theirs = load_tokenizer(folder), GPT2Tokenizer.from_pretrained(folder)
    assert tokenizer.n_tokens == 322
    ids = tokenizer.encode("a[PAD]b<table>")
    assert ids == theirs("a[PAD]b<table>").input_ids
    assert ids[-1] == 321
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids) == ("ab<table>" if roles else "a[PAD]b<table>")


def test_a_setting_that_is_true_is_no_token(tmp_path, byte_bpe):
    folder = shutil.copytree(byte_bpe, tmp_path / "bpe")
    (folder / "added_tokens.json").write_text(json.dumps({"True": 320}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": True, "added_tokens_decoder": None})
    )
    assert load_tokenizer(folder).decode([320]) == "True"


SLOW = {
    "add_prefix_space": {"add_prefix_space": True},
    "transformers 4": {"added_tokens_decoder": {
        "320": {"content": "[PAD]", "lstrip": False, "normalized": True, "special": True},
        "321": {"content": "<table>", "lstrip": False, "normalized": True, "special": False},
    }, "additional_special_tokens": [], "clean_up_tokenization_spaces": True,
        "chat_template": "{{ messages }}", "errors": "replace"},
    "a list": {"additional_special_tokens": ["[PAD]", {"__type": "AddedToken", "content": "<t>"}]},
    "extra, listed": {"extra_special_tokens": ["[PAD]"]},
    "extra, by role": {"extra_special_tokens": {"image_token": "[PAD]"}},
}  # fmt: skip
"""What tokenizer_config.json of two-file tokenizers says, by those who wrote it."""


@pytest.mark.parametrize("settings", SLOW.values(), ids=SLOW)
def test_settings_of_two_files_as_transformers_has_them(tmp_path, byte_bpe, settings):
    folder = shutil.copytree(byte_bpe, tmp_path / "bpe")
    if "added_tokens_decoder" not in settings:
        (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": 320, "<table>": 321}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = load_tokenizer(folder), GPT2Tokenizer.from_pretrained(folder)
    ids = ours.encode("The mayor[PAD] said<table> so")
    assert ids == theirs("The mayor[PAD] said<table> so", add_special_tokens=False).input_ids
    assert ours.decode(ids) == theirs.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_an_added_token_whose_id_is_not_the_next(tmp_path, byte_bpe):
    folder = shutil.copytree(byte_bpe, tmp_path / "bpe")
    (folder / "added_tokens.json").write_text(json.dumps({"<table>": 330}))
    with pytest.raises(
        CheckpointError, match="gives '<table>' the id 330, where the next one is 320"
    ):
        load_tokenizer(folder)


def test_no_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no tokenizer here \(tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": {"type": "Magic"}}'])
def test_a_damaged_tokenizer_names_its_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the tokenizer cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("damaged", ["vocab.json", "merges.txt", "added_tokens.json"])
def test_damaged_byte_bpe_names_its_folder(tmp_path, byte_bpe, damaged):
    folder = shutil.copytree(byte_bpe, tmp_path / "bpe")
    (folder / damaged).write_text("one\ntwo three four\n{")
    with pytest.raises(CheckpointError, match=r"bpe.*: the tokenizer cannot be read"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"type": "BPE", "vocab": {"T": 0}, "merges": [], "unk_token": "?"}, "Unk token `\\?`"),
        ({"type": "WordLevel", "vocab": {"T": 0}, "unk_token": "?"}, "Missing \\[UNK\\] token"),
        ({"type": "Unigram", "vocab": [["T", 0.0]], "unk_id": None}, "`unk_id` is missing"),
    ],
)
def test_a_vocabulary_without_a_piece_of_a_text_names_its_file(tmp_path, model, says):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    tokenizer = load_tokenizer(tmp_path)
    said = rf"tokenizer\.json: the tokenizer cannot encode 'The mayor': .*{says}.*--tokenizer"
    with pytest.raises(CheckpointError, match=said):
        tokenizer.encode("The mayor")


def test_a_vocabulary_of_nothing(tmp_path):
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": empty}))
    assert load_tokenizer(tmp_path).n_tokens == 0


def test_a_damaged_sentencepiece_model_names_its_file(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: the tokenizer cannot be read"):
        load_tokenizer(tmp_path)


def test_ids_that_a_tokenizer_lacks_are_no_text(tmp_path, tokenizer_folder):
    (tmp_path / "tokenizer.model").write_bytes(nemo_writer.sentencepiece_model(50))
    for tokenizer in (load_tokenizer(tmp_path), load_tokenizer(tokenizer_folder)):
        ids = tokenizer.encode("the cat")
        assert tokenizer.decode([*ids, tokenizer.n_tokens]) == "the cat"


def test_an_instruction_may_hold_the_names_of_a_template():
    template = PromptTemplate(
        plain="Do: {instruction}\nA:", with_input="Do: {instruction}\nIn: {input}\nA:",
        answer_marker="A:",
    )  # fmt: skip
    asked = "format {input} and {instruction}"
    assert fill_template(template, asked) == f"Do: {asked}\nA:"
    assert fill_template(template, asked, r"\1 {input}") == f"Do: {asked}\nIn: \\1 {{input}}\nA:"
