"""Tokenizers as people publish them beside GPT-2s, against transformers reading the same folder."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import tiny
from porttool.cli import invoke
from porttool.errors import CheckpointError, SourceError
from porttool.evaluators.vocabulary import SAMPLES, compare_tokenizers
from porttool.sources.tokenizer_files import added_tokens, tokenizer_paths
from porttool.text import TextStream, load_tokenizer

ROLES = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
    "mask_token": "<mask>",
}  # fmt: skip
PIECES = (
    *("[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<S>"),
    *map(chr, range(0x21, 0x5B)), *"abcdefghijklmnopqrstuvwxyz的一是不了在人有我他你好é",
    "the", "council", "did", "##a", "##n", "##t", "##ing", "##好", "##ï", "##ve", "na",
)  # fmt: skip
TEXTS = (
    "<s>The mayor</s> said[PAD] on<mask>  <mask> x", "The <unk> mayor", " x <mask>y<pad>",
    "council [MASK] met, 你好 naïve 的一 the council didn't [SEP]", *SAMPLES,
)  # fmt: skip


def flags(text: str, **changes) -> dict[str, object]:
    """What transformers writes of an added token."""
    said = {"content": text, "single_word": False, "lstrip": False, "rstrip": False}
    return {**said, "normalized": False, **changes}


def write(folder: Path, files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        file = folder / name
        file.write_bytes(content) if isinstance(content, bytes) else file.write_text(
            content if isinstance(content, str) else json.dumps(content)
        )
    return folder


@pytest.fixture(scope="module")
def bpe(tmp_path_factory, tokenizer_folder) -> Path:
    """Byte pairs in both forms, with tokens at the end of the vocabulary that only roles name."""
    values = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    vocab = values["model"]["vocab"]
    vocab |= {token: len(vocab) + i for i, token in enumerate(ROLES.values())}
    merges = [" ".join(m) if isinstance(m, list) else m for m in values["model"]["merges"]]
    return write(tmp_path_factory.mktemp("bpe"), {
        "tokenizer.json": values,
        "vocab.json": vocab,
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
    })  # fmt: skip


def sentencepiece_model(**changes) -> bytes:
    """A unigram model of Japanese and English with the pieces that rinna's have."""
    from sentencepiece import SentencePieceTrainer

    data = io.BytesIO()
    lines = ["吾輩は猫である。名前はまだ無い。", "The council met on Tuesday; it didn't vote."] * 30
    SentencePieceTrainer.train(**{
        "sentence_iterator": iter(lines), "model_writer": data, "vocab_size": 420,
        "hard_vocab_limit": False, "minloglevel": 2, "character_coverage": 1.0,
        "user_defined_symbols": ["[PAD]", "[CLS]", "[SEP]", "[MASK]"], **changes,
    })  # fmt: skip
    return data.getvalue()


def assert_as_transformers(folder: Path, kind: str) -> None:
    """Hold texts and the whole vocabulary to what transformers makes of a folder."""
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == kind
    found = compare_tokenizers(ours, folder, TEXTS, 10**6)
    assert getattr(found, "passed", found) is True, found


TWO = ("vocab.json", "merges.txt")
BPE_FOLDERS = {
    "roles in a map": (TWO, {"special_tokens_map.json": ROLES}),
    "roles with flags": (TWO, {"tokenizer_config.json": {
        role: flags(text, lstrip=text == "<mask>", __type="AddedToken")
        for role, text in ROLES.items()
    }}),
    "roles and added": (TWO, {"tokenizer_config.json": {**ROLES, "added_tokens_decoder": {
        "324": flags("<mask>", lstrip=True, special=True), "325": flags("[PAD]", special=False),
    }}}),
    "added beside tokenizer.json": (("tokenizer.json", *TWO), {
        "added_tokens.json": {"[PAD]": 325},
        "special_tokens_map.json": {"pad_token": "[PAD]"},
    }),
    "added, without a role": (("tokenizer.json",), {"added_tokens.json": {"[PAD]": 325}}),
    "a role without an id": (("tokenizer.json",), {
        "special_tokens_map.json": {"pad_token": "<|endoftext|>"},
    }),
    "Roberta's class": (TWO, {"tokenizer_config.json": {
        "tokenizer_class": "RobertaTokenizer", **ROLES,
    }}),
    "a space before": (("tokenizer.json",), {"tokenizer_config.json": {"add_prefix_space": True}}),
}  # fmt: skip


@pytest.mark.parametrize("name", BPE_FOLDERS)
def test_byte_pairs(tmp_path, bpe, name):
    files, settings = BPE_FOLDERS[name]
    for file in files:
        shutil.copy(bpe / file, tmp_path)
    write(tmp_path, {"config.json": {"model_type": "gpt2"}, **settings})
    if "tokenizer.json" in files:
        (tmp_path / "vocab.json").unlink(missing_ok=True)
        (tmp_path / "merges.txt").unlink(missing_ok=True)
    kind = "RobertaTokenizer" if name == "Roberta's class" else "GPT2Tokenizer"
    assert_as_transformers(tmp_path, kind)


def test_byte_pairs_of_another_kind(tmp_path, bpe, capsys):
    """CLIP's files have the same names; read as GPT-2's they gave other ids."""
    source = tiny.write_source(tmp_path / "source", tiny.gpt2(vocab_size=400))
    for file in TWO:
        shutil.copy(bpe / file, source)
    write(source, {"tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer"}})
    with pytest.raises(CheckpointError, match=r"merges\.txt: is a CLIPTokenizer's, which porttool"):
        load_tokenizer(source)
    assert invoke(["convert", str(source), "-o", str(tmp_path / "out")]) == 0
    assert "(CLIPTokenizer): if transformers" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "tokenizer").exists()


def test_a_tokenizer_of_transformers_that_fails_is_no_traceback(tmp_path, bpe):
    (tmp_path / "ours").mkdir()
    for file in TWO:
        shutil.copy(bpe / file, tmp_path)
        shutil.copy(bpe / file, tmp_path / "ours")
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    vocabulary["<other>"] = vocabulary.pop("<unk>")
    write(tmp_path, {"config.json": {"model_type": "gpt2"}, "vocab.json": vocabulary,
                     "tokenizer_config.json": {"tokenizer_class": "HerbertTokenizer"}})  # fmt: skip
    with pytest.raises(SourceError, match=r"HerbertTokenizer cannot encode every text: Unk token"):
        compare_tokenizers(load_tokenizer(tmp_path / "ours"), tmp_path, TEXTS, 325)


def test_a_class_that_takes_tokenizer_json_as_it_is(tmp_path, bpe):
    shutil.copy(bpe / "tokenizer.json", tmp_path)
    write(tmp_path, {"config.json": {"model_type": "gpt2"}, "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True,
    }})  # fmt: skip
    assert_as_transformers(tmp_path, "TokenizersBackend")


BERT_MAP = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]",
            "cls_token": "[CLS]", "mask_token": "[MASK]"}  # fmt: skip
BERT_FOLDERS = {
    "uer": {"config.json": {"model_type": "gpt2", "tokenizer_class": "BertTokenizer"},
            "tokenizer_config.json": {"do_lower_case": False}, "special_tokens_map.json": BERT_MAP},
    "ckip": {"tokenizer_config.json": {"tokenizer_class": "BertTokenizerFast", **BERT_MAP,
             "do_lower_case": False, "tokenize_chinese_chars": True, "strip_accents": None}},
    "bare": {"config.json": {"model_type": "gpt2", "tokenizer_class": "BertTokenizer"}},
    "added": {"tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "do_lower_case": True,
              "additional_special_tokens": ["<S>"], "tokenize_chinese_chars": False},
              "added_tokens.json": {"<q>": len(PIECES)}},
}  # fmt: skip


@pytest.mark.parametrize("name", BERT_FOLDERS)
def test_pieces_of_words(tmp_path, name):
    """Chinese GPT-2s have BERT's vocabulary."""
    vocabulary = "".join(f"{piece}\n" for piece in PIECES)
    write(tmp_path, {"config.json": {"model_type": "gpt2"}, "vocab.txt": vocabulary,
                     **BERT_FOLDERS[name]})  # fmt: skip
    assert_as_transformers(tmp_path, "BertTokenizer")
    assert tmp_path / "vocab.txt" in tokenizer_paths(tmp_path)


SPIECE_FOLDERS = {
    "T5Tokenizer": ({"bos_id": 1, "eos_id": 2, "unk_id": 0}, {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "[PAD]",
        "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "extra_ids": 0,
    }),
    "GPTSw3Tokenizer": ({
        "model_type": "bpe", "byte_fallback": True, "pad_id": 0, "unk_id": 1, "bos_id": 2,
        "eos_id": 3, "user_defined_symbols": ["<|endoftext|>"], "vocab_size": 340,
    }, {"eos_token": "<|endoftext|>", "bos_token": "<s>", "unk_token": "<unk>",
        "pad_token": "<pad>"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPIECE_FOLDERS)
def test_sentencepiece_models(tmp_path, kind):
    trained, roles = SPIECE_FOLDERS[kind]
    write(tmp_path, {
        "config.json": {"model_type": "gpt2"}, "spiece.model": sentencepiece_model(**trained),
        "tokenizer_config.json": {"tokenizer_class": kind, **roles},
    })  # fmt: skip
    assert_as_transformers(tmp_path, kind)
    tokenizer = load_tokenizer(tmp_path)
    ends = tokenizer.encode(f"猫である{roles['eos_token']}")
    assert tokenizer.decode(ends) == "猫である"
    assert tokenizer.decode(ends[-1:]) == ""
    if tokenizer.unknown == 0:  # a text that only one side does not know still counts
        encode = tokenizer.encode
        tokenizer.encode = lambda text: [0] if text == "猫である" else encode(text)
        found = compare_tokenizers(tokenizer, tmp_path, ["猫である"], 10**6)
        assert (found.passed, found.detail) == (False, "for example '猫である'")


@pytest.mark.parametrize(
    ("file", "kind"),
    [("spiece.model", "AlbertTokenizer"), ("vocab.txt", "BertJapaneseTokenizer"),
     ("spiece.model", None), ("vocab.txt", None)],
)  # fmt: skip
def test_a_kind_that_is_not_read_is_named(tmp_path, capsys, file, kind):
    """Its ids would be others; the model is converted without it."""
    source = tiny.write_source(tmp_path / "source", tiny.gpt2())
    write(source, {file: sentencepiece_model() if kind is None else "x"})
    if kind:
        write(source, {"tokenizer_config.json": {"tokenizer_class": kind}})
        with pytest.raises(CheckpointError, match=rf"{file}: is a {kind}'s, which porttool does n"):
            load_tokenizer(source)
    assert invoke(["convert", str(source), "-o", str(tmp_path / "out")]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "no tokenizer that porttool reads" in told
    assert f"There is {file} ({kind or 'no tokenizer_class is named'}): if transformers" in told
    assert not (tmp_path / "out" / "tokenizer").exists()


def test_a_vocabulary_of_lines_that_the_embedding_has_no_rows_for(tmp_path, capsys):
    source = tiny.write_source(tmp_path / "source", tiny.gpt2())
    write(source, {"vocab.txt": "".join(f"{i}\n" for i in range(68)),
                   "tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}})  # fmt: skip
    assert invoke(["convert", str(source), "-o", str(tmp_path / "out")]) == 1
    assert "vocab.txt: the tokenizer has the id 67, but the embedding" in capsys.readouterr().err


def test_a_vocabulary_of_lines_is_streamed(tmp_path):
    """Its decoder joins a mark with the word before it, whose space may have been shown."""
    write(tmp_path, {"vocab.txt": "".join(f"{piece}\n" for piece in PIECES)})
    tokenizer = load_tokenizer(tmp_path)
    for text in ("the council, did n't. na", "你好, the 的!"):
        ids = tokenizer.encode(text)
        stream = TextStream(tokenizer)
        shown = "".join(map(stream.push, ids)) + stream.finish()
        assert shown.replace(" ", "") == tokenizer.decode(ids).replace(" ", "").replace("''", "'")


def test_tokens_for_infilling_of_a_folder_without_tokenizer_json(tmp_path, bpe):
    for file in TWO:
        shutil.copy(bpe / file, tmp_path)
    assert added_tokens(tmp_path) == {"<|endoftext|>": 0}
    write(tmp_path, {"tokenizer_config.json": {
        "additional_special_tokens": ["<mask>"], "added_tokens_decoder": {"325": flags("<fim>")},
    }})  # fmt: skip
    assert added_tokens(tmp_path) == {"<|endoftext|>": 0, "<mask>": 324, "<fim>": 325}
    encoded = load_tokenizer(tmp_path).encode("<mask>x<fim>")
    assert (encoded[0], encoded[-1], len(encoded)) == (324, 325, 3)


def test_tokenizer_json_counts_as_it_is(tmp_path):
    """transformers 5 makes a byte-level one of it where the model is a GPT-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {c: i for i, c in enumerate("▁abcdefghijklmnopqrstuvwxyz ")}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, {"config.json": {"model_type": "gpt2"}})
    found = compare_tokenizers(load_tokenizer(tmp_path), tmp_path, ["the mayor"], len(vocabulary))
    assert found.passed is True, found
    assert "transformers' GPT2Tokenizer makes another" in found.detail
    write(tmp_path / "other", {"config.json": {"model_type": "gpt2"}})
    shifted = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    shifted.add_tokens(["may"])
    shifted.save(str(tmp_path / "other" / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert compare_tokenizers(ours, tmp_path / "other", ["the mayor"], 100).passed is False


def test_a_setting_beside_tokenizer_json_holds(tmp_path, bpe):
    """Only another way of dividing texts lets the file count as it is."""
    shutil.copy(bpe / "tokenizer.json", tmp_path)
    write(tmp_path, {"config.json": {"model_type": "gpt2"}})
    heedless = load_tokenizer(tmp_path)
    write(tmp_path, {"tokenizer_config.json": {"add_prefix_space": True}})
    assert compare_tokenizers(heedless, tmp_path, TEXTS, 325).passed is False
    assert compare_tokenizers(load_tokenizer(tmp_path), tmp_path, TEXTS, 325).passed is True


def test_texts_whose_ids_have_no_row_are_not_compared(tmp_path, bpe):
    """A role makes transformers give a token the next id, which no embedding was trained for."""
    shutil.copy(bpe / "tokenizer.json", tmp_path)
    write(tmp_path, {"config.json": {"model_type": "gpt2"},
                     "special_tokens_map.json": {"pad_token": "[NEW]"}})  # fmt: skip
    ours = load_tokenizer(tmp_path)
    assert compare_tokenizers(ours, tmp_path, TEXTS, 325).passed is True
    assert compare_tokenizers(ours, tmp_path, TEXTS, 326).passed is False
