"""Text to token ids and back, with the files that travelled with a checkpoint."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from porttool.errors import CheckpointError, MissingExtra, UsageError

if TYPE_CHECKING:
    import tokenizers

    from porttool.config import InfillTokens, PromptTemplate

T = TypeVar("T")

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(ABC):
    """Encodes text without adding anything, and decodes ids."""

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """Ids run from 0 to n_tokens - 1."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return a text's ids, none of them added; CheckpointError if there are none for it."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special ids vanish, and those that the tokenizer lacks."""


class BPETokenizer(Tokenizer):
    """A tokenizer of the tokenizers library, whose vocabulary is in `file`."""

    def __init__(self, inner: tokenizers.Tokenizer, file: Path) -> None:
        self._inner = inner
        self._file = file

    @property
    def n_tokens(self) -> int:
        """Ids with the added ones; a gap below the highest counts as ids."""
        return 1 + max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> list[int]:
        """Encode without special ids; a vocabulary that lacks a piece may refuse that."""
        try:
            ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        except Exception as error:
            raise CheckpointError(
                f"{self._file}: the tokenizer cannot encode {text!r:.80}: {error}; name another "
                "folder with --tokenizer"
            ) from error
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode, leaving special ids out."""
        return self._inner.decode(list(ids), skip_special_tokens=True)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, with the ids that it was trained with and no others."""

    def __init__(self, path: Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise MissingExtra("gpt-next", "sentencepiece") from error
        self._inner = guarded(path, lambda file: SentencePieceProcessor(model_file=str(file)))

    @property
    def n_tokens(self) -> int:
        """Pieces of the model."""
        return int(self._inner.vocab_size())

    def encode(self, text: str) -> list[int]:
        """Encode without bos or eos."""
        return list(self._inner.encode_as_ids(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Decode pieces to text; a padded embedding has ids that are none."""
        return str(self._inner.decode_ids([i for i in ids if i < self.n_tokens]))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load whatever tokenizer a folder holds; CheckpointError if there is none or it is damaged."""
    if (file := folder / "tokenizer.json").is_file():
        return BPETokenizer(guarded(file, load_json_tokenizer), file)
    if (file := folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return BPETokenizer(guarded(folder, load_byte_bpe), file)
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(folder / "tokenizer.model")
    raise CheckpointError(
        f"{folder}: there is no tokenizer here (tokenizer.json, vocab.json with merges.txt, or "
        "tokenizer.model); name another folder with --tokenizer"
    )


def guarded(path: Path, load: Callable[[Path], T]) -> T:
    """Turn a tokenizer library's bare exceptions into a CheckpointError naming the file."""
    try:
        return load(path)
    except Exception as error:
        raise CheckpointError(f"{path}: the tokenizer cannot be read: {error}") from error


def load_json_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Load tokenizer.json, without the truncation and padding it may ask for."""
    import tokenizers

    loaded = tokenizers.Tokenizer.from_file(str(path))
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def load_byte_bpe(folder: Path) -> tokenizers.Tokenizer:
    """Build GPT-2's byte-level BPE from vocab.json and merges.txt, and what the folder adds.

    Of the added tokens those with a role or called special are special, as in transformers.
    """
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    settings = read_object(folder / "tokenizer_config.json")
    model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    built = tokenizers.Tokenizer(model)
    prefixed = settings.get("add_prefix_space") is True
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefixed)
    built.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    special = {end, *roles_in(folder)}
    added = read_object(folder / "added_tokens.json")
    for i, token in (settings.get("added_tokens_decoder") or {}).items():
        added[token["content"]] = int(i)
        special |= {token["content"]} if token.get("special") else set()
    known = {end: i} if (i := built.token_to_id(end)) is not None else {}
    for text, wanted in sorted({**known, **added}.items(), key=lambda item: item[1]):
        add = built.add_special_tokens if text in special else built.add_tokens
        add([AddedToken(text, normalized=False)])
        if built.token_to_id(text) != wanted:
            raise ValueError(
                f"the folder gives {text!r} the id {wanted}, where the next one is "
                f"{built.token_to_id(text)}"
            )
    return built


def roles_in(folder: Path) -> set[str]:
    """Return the tokens that a folder's settings give a role, such as `pad_token`.

    Lists of further ones count in tokenizer_config.json alone, as in transformers 5.
    `add_bos_token` and the like are no tokens: they are true or false.
    """
    settings = read_object(folder / "tokenizer_config.json")
    roles = [*read_object(folder / "special_tokens_map.json").items(), *settings.items()]
    said = [value for key, value in roles if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key) or []
        said += more.values() if isinstance(more, dict) else more
    texts = [value["content"] if isinstance(value, dict) else value for value in said]
    return {text for text in texts if isinstance(text, str)}


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one where there is no such file."""
    return dict(json.loads(file.read_bytes())) if file.is_file() else {}


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return where the first stop string begins, or None."""
    found = [i for i in (text.find(s) for s in stop) if i >= 0]
    return min(found) if found else None


class TextStream:
    """Turns a growing list of ids into pieces of text that are safe to show.

    Nothing is shown from the first stop string on, nor what may yet become one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """Add an id; return the new text, or nothing while a character is incomplete."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(REPLACEMENT) or find_stop(text, self._stop) is not None:
            return ""
        return self._show(text[: len(text) - self._undecided(text)])

    def finish(self) -> str:
        """Return what was held back."""
        return self._show(self._tokenizer.decode(self._ids))

    def _show(self, text: str) -> str:
        """Return what follows the text shown so far, up to a stop string."""
        text = text[: find_stop(text, self._stop)]
        if not text.startswith(self._shown):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece

    def _undecided(self, text: str) -> int:
        """Return the length of the longest end of a text that a stop string begins with."""
        ends = [n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])]
        return max(ends, default=0)


def infill_prompt(tokens: InfillTokens | None, before: str, after: str) -> str:
    """Return the prompt for what belongs between two texts; UsageError if the model has none."""
    if tokens is None:
        raise UsageError(
            "this model was not converted with tokens for infilling: give `run` its prompt with "
            "--input-text, and `infill` --kind completion"
        )
    return tokens.prompt(before, after)


def fill_template(template: PromptTemplate | None, instruction: str, given: str = "") -> str:
    """Return the prompt for an instruction; UsageError if the model has no template.

    Braces in the texts themselves are text.
    """
    if template is None:
        raise UsageError("this model has no instruction template; pass plain text instead")
    texts = {"{instruction}": instruction, "{input}": given}
    asked = template.with_input if given else template.plain
    # At once: what is put in may hold a name in braces, too.
    return re.sub("|".join(map(re.escape, texts)), lambda name: texts[name[0]], asked)
