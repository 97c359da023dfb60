"""What a tokenizer's files say of ids, without the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from porttool.config import InfillTokens, SpecialTokens
from porttool.errors import CheckpointError, SourceError, importing
from porttool.sources.json_file import read_json
from porttool.sources.places import is_present, refuse_pointer

END_OF_TEXT = "<|endoftext|>"
MAX_FILE = 1 << 28
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "spiece.model", "vocab.txt",
    "chat_template.jinja",
)  # fmt: skip
SENTENCEPIECE = ("tokenizer.model", "spiece.model")
TOKENIZERS = (
    {"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"tokenizer.model"}, {"spiece.model"},
    {"vocab.txt"},
)  # fmt: skip
"""Files that are a tokenizer together; any others only say something of one."""
SW3 = "GPTSw3Tokenizer"
SW3_TEXT = {
    **dict.fromkeys(map(ord, "\u2002\u2003\u2005\u2008\u2009\u200a\u202f\u3000\ufffc"), " "),
    **dict.fromkeys((*range(9), *range(11, 32), *range(127, 161), 0xAD, 0x200B)),
}
"""What this class makes a space of, and what it drops, before its model sees a text."""
BYTE_PAIRS = (None, "GPT2Tokenizer", "CodeGenTokenizer", "PreTrainedTokenizer")
"""Classes whose `<|endoftext|>` is special unless the settings say otherwise; or none is named."""
CLASSES: dict[str, tuple[str | None, ...]] = {
    "merges.txt": (
        *BYTE_PAIRS,
        "RobertaTokenizer",
        "BartTokenizer",
        "LongformerTokenizer",
        "LEDTokenizer",
        "DebertaTokenizer",
    ),
    "spiece.model": ("T5Tokenizer", SW3),
    "vocab.txt": ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer"),
}
"""Files that tokenizers of several kinds have, and those of transformers that are read.

The others shift ids, change the text or divide it in another way.
"""
KINDS = (
    "tokenizer.json, vocab.json with merges.txt, tokenizer.model, T5's spiece.model or BERT's "
    "vocab.txt"
)
MORE = ("*.model", "*.txt", "*.tiktoken", "vocab.json")
"""Where tokenizers lie that porttool does not read."""


def read_tokenizer(
    paths: Iterable[Path], data: Mapping[str, bytes], vocab_size: int
) -> dict[str, bytes]:
    """Return the tokenizer's files, if they are one; more ids than the embedding are refused."""
    files = {**read_files(paths), **data}
    check_tokenizer(files, vocab_size)
    return files if is_tokenizer(files) else {}


def check_tokenizer(files: Mapping[str, bytes], vocab_size: int) -> None:
    """Refuse a tokenizer with an id that the embedding has no row for, naming file and id."""
    for name, data in files.items():
        ids = list(ids_of(name, data))
        if ids and max(ids) >= vocab_size:
            raise SourceError(
                f"{name}: the tokenizer has the id {max(ids)}, but the embedding only {vocab_size} "
                "rows; it belongs to another model, or the vocabulary's size is wrong. Where a "
                "token was added that never got a row, take it out of a copy of the file"
            )


def ids_of(name: str, data: bytes) -> Iterable[int]:
    """Return the ids that a file gives; none for files that give none."""
    if name == "vocab.txt":
        return [data.rstrip(b"\n").count(b"\n")]  # a line for each
    if name not in ("vocab.json", "added_tokens.json", "tokenizer.json"):
        return []
    try:
        values: Any = json.loads(data)
        if name != "tokenizer.json":
            return [int(i) for i in values.values()]
        added = [int(token["id"]) for token in values.get("added_tokens") or []]
        vocabulary = values["model"].get("vocab") or {}
        if isinstance(vocabulary, list):  # a unigram model lists its pieces
            return [*added, len(vocabulary) - 1]
        return [*added, *map(int, vocabulary.values())]
    except (
        ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError,
    ) as error:  # fmt: skip
        raise SourceError(f"{name}: the tokenizer's file is damaged: {error}") from error


def is_tokenizer(names: Iterable[str]) -> bool:
    """Return true if files of these names hold a tokenizer, not only its settings."""
    found = set(names)
    return any(needed <= found for needed in TOKENIZERS)


def tokenizer_paths(folder: Path) -> tuple[Path, ...]:
    """Return a folder's files that are of its tokenizer, as far as porttool reads its kind."""
    kind = tokenizer_class(folder)
    found = (n for n in TOKENIZER_FILES if is_present(folder / n))
    return tuple(folder / n for n in found if n not in CLASSES or kind in CLASSES[n])


def tokenizer_class(folder: Path) -> str | None:
    """Return the class of transformers that a folder's configs name for its tokenizer.

    Classes of older versions had a second form in Rust: `BertTokenizerFast`.
    """
    for name in ("tokenizer_config.json", "config.json"):
        if isinstance(told := read_object(folder / name).get("tokenizer_class"), str):
            return told.removesuffix("Fast")
    return None


def require_read_class(file: Path) -> None:
    """Raise CheckpointError for a tokenizer's file that a class reads as porttool does not."""
    kind = tokenizer_class(file.parent)
    if kind and kind not in CLASSES.get(file.name, (kind,)):
        raise CheckpointError(
            f"{file}: is a {kind}'s, which porttool does not read; let transformers make a "
            "tokenizer.json of it, and name its folder with --tokenizer"
        )


def without_tokenizer(source: Path) -> str:
    """Return what to tell of a source without a tokenizer: what there is, and what to do."""
    said = f"the source has no tokenizer that porttool reads ({KINDS}): only token ids can be fed"
    folder = source if source.is_dir() else source.parent
    others = [p.name for pattern in MORE for p in sorted(folder.glob(pattern))]
    others = [n for n in others if not n.startswith(("README", "LICENSE", "requirements"))]
    if not others or not (folder / "config.json").is_file():
        return said
    kind = tokenizer_class(folder) or "no tokenizer_class is named"
    return (
        f"{said}. There is {', '.join(others[:3])} ({kind}): if transformers makes a "
        "tokenizer.json of it (AutoTokenizer.from_pretrained(SOURCE).save_pretrained(SOURCE)), "
        "convert again"
    )


def read_files(paths: Iterable[Path]) -> dict[str, bytes]:
    """Read files by their names."""
    return {path.name: read_file(path) for path in paths}


def read_file(path: Path) -> bytes:
    """Read a tokenizer's file; one that is missing or far too large is a SourceError."""
    if not path.is_file():
        raise SourceError(f"{path}: the file is missing; it is the tokenizer's")
    refuse_pointer(path)
    if (size := path.stat().st_size) > MAX_FILE:
        raise SourceError(f"{path}: {size} bytes is no tokenizer's file")
    return path.read_bytes()


def renamed_files(folder: Path, names: Mapping[str, str]) -> dict[str, bytes]:
    """Read a tokenizer's files under other names (theirs → ours); none of them may be missing.

    GPT-2's may be called `gpt2-vocab.json` and so on, as Megatron-LM has them fetched.
    """
    places = {new: (folder / old, folder / f"gpt2-{old}") for old, new in names.items()}
    return {
        new: read_file(fetched if fetched.is_file() and not usual.is_file() else usual)
        for new, (usual, fetched) in places.items()
    }


def special_tokens(files: Mapping[str, bytes]) -> tuple[SpecialTokens, int | None]:
    """Return the ids with a meaning and the number of all ids, None where no tokenizer is.

    Known are a sentencepiece model, which declares its own, and GPT-2's byte pairs.
    """
    if "tokenizer.model" in files:
        return sentencepiece_tokens(files["tokenizer.model"])
    if "vocab.json" not in files:
        return SpecialTokens(), None
    ids = list(ids_of("vocab.json", files["vocab.json"]))
    if not ids or min(ids) < 0:
        raise SourceError("vocab.json: the tokenizer's file is damaged: no ids, or negative ones")
    end = json.loads(files["vocab.json"]).get(END_OF_TEXT)
    eos = () if end is None else (int(end),)
    return SpecialTokens(bos=eos[0] if eos else None, eos=eos), 1 + max(ids)


def sentencepiece_tokens(data: bytes) -> tuple[SpecialTokens, int]:
    """Read the ids that a sentencepiece model itself declares."""
    with importing("gpt-next", "sentencepiece"):
        from sentencepiece import SentencePieceProcessor
    try:
        model = SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise SourceError(f"the tokenizer's sentencepiece model is damaged: {error}") from error
    declared = (model.bos_id(), model.eos_id(), model.pad_id())
    bos, eos, pad = (None if i < 0 else i for i in declared)
    return SpecialTokens(bos=bos, eos=() if eos is None else (eos,), pad=pad), model.vocab_size()


def added_tokens(folder: Path) -> Mapping[str, int]:
    """Return the ids of the tokens that a folder's tokenizer takes for one, whatever is around."""
    file = folder / "tokenizer.json"
    try:
        entries: list[Any] = read_object(file).get("added_tokens") or []
        found = {str(entry["content"]): int(entry["id"]) for entry in entries}
        if not file.is_file():  # what is special lies in the vocabulary, too
            vocabulary = read_object(file := folder / "vocab.json")
            ids = {token: vocabulary.get(token) for token in (END_OF_TEXT, *roles_in(folder))}
            found = {token: int(i) for token, i in ids.items() if i is not None}
        settings = read_object(file := folder / "tokenizer_config.json")
        more = settings.get("added_tokens_decoder") or {}
        found |= {str(token["content"]): int(i) for i, token in more.items()}
        more = read_object(file := folder / "added_tokens.json")
        return found | {token: int(i) for token, i in more.items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SourceError(f"{file}: the tokenizer's file is damaged: {error}") from error


def known_spelling(folder: Path, spellings: Iterable[InfillTokens]) -> InfillTokens | None:
    """Return the infilling tokens that a folder's tokenizer knows; None if it knows none."""
    known = added_tokens(folder).keys()
    return next((s for s in spellings if {s.prefix, s.middle, s.suffix} <= known), None)


def roles_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the tokens that a folder's settings give a role, such as `pad_token`.

    Beside each is what the settings say of it, which may be nothing. Lists of further ones count
    in tokenizer_config.json alone, as in transformers 5. `add_bos_token` and the like are no
    tokens: they are true or false.
    """
    settings = read_object(folder / "tokenizer_config.json")
    roles = [*read_object(folder / "special_tokens_map.json").items(), *settings.items()]
    said = [value for key, value in roles if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key) or []
        said += more.values() if isinstance(more, dict) else more
    told = [value if isinstance(value, dict) else {"content": value} for value in said]
    return {t["content"]: t for t in told if isinstance(t.get("content"), str)}


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one where there is no such file."""
    return read_json(file) if is_present(file) else {}
