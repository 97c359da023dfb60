"""Text to token ids and back, with the files that travelled with a checkpoint."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from unicodedata import normalize

from porttool.errors import CheckpointError, UsageError, importing
from porttool.sources.tokenizer_files import (
    BYTE_PAIRS,
    KINDS,
    SENTENCEPIECE,
    SW3,
    SW3_TEXT,
    read_object,
    require_read_class,
    roles_in,
    tokenizer_class,
)

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
    """A sentencepiece model, with the ids that it was trained with and no others.

    Of its pieces those with a role in the settings beside it are special.
    """

    def __init__(self, path: Path) -> None:
        with importing("gpt-next", "sentencepiece"):
            from sentencepiece import SentencePieceProcessor
        self._inner = guarded(path, lambda file: SentencePieceProcessor(model_file=str(file)))
        self._of_sw3 = tokenizer_class(path.parent) == SW3
        self.unknown = int(self._inner.unk_id())
        ids = {text: int(self._inner.piece_to_id(text)) for text in roles_in(path.parent)}
        self._special = {t: i for t, i in ids.items() if self._inner.id_to_piece(i) == t}
        self._apart = re.compile(f"({'|'.join(map(re.escape, self._special)) or '(?!)'})")

    @property
    def n_tokens(self) -> int:
        """Pieces of the model."""
        return int(self._inner.vocab_size())

    def encode(self, text: str) -> list[int]:
        """Encode without bos or eos; a special piece is one id, what is around it is text."""
        if self._of_sw3:
            text = normalize("NFC", text.translate(SW3_TEXT))
        parts = self._apart.split(text)
        found = [[self._special[p]] if i % 2 else self._inner.encode_as_ids(p)
                 for i, p in enumerate(parts)]  # fmt: skip
        return [i for ids in found for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode pieces to text; a padded embedding has ids that are none."""
        hidden = self._special.values()
        kept = [i for i in ids if i < self.n_tokens and i not in hidden]
        return str(self._inner.decode_ids(kept))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load whatever tokenizer a folder holds; CheckpointError if there is none or it is damaged."""
    if (file := folder / "tokenizer.json").is_file():
        return BPETokenizer(guarded(file, load_json_tokenizer), file)
    if (file := folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        require_read_class(folder / "merges.txt")
        return BPETokenizer(guarded(folder, load_byte_bpe), file)
    for name in (*SENTENCEPIECE, "vocab.txt"):
        if not (file := folder / name).is_file():
            continue
        require_read_class(file)
        if name in SENTENCEPIECE:
            return SentencePieceTokenizer(file)
        return BPETokenizer(guarded(folder, load_wordpiece), file)
    raise CheckpointError(
        f"{folder}: there is no tokenizer here ({KINDS}); name another folder with --tokenizer"
    )


def guarded(path: Path, load: Callable[[Path], T]) -> T:
    """Turn a tokenizer library's bare exceptions into a CheckpointError naming the file."""
    try:
        return load(path)
    except Exception as error:
        raise CheckpointError(f"{path}: the tokenizer cannot be read: {error}") from error


def load_json_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Load tokenizer.json, without the truncation and padding it may ask for.

    The files beside it have their say, as in transformers: on a space before the text, and on
    tokens that were added after tokenizer.json was written.
    """
    import tokenizers
    from tokenizers import pre_tokenizers

    loaded = tokenizers.Tokenizer.from_file(str(path))
    loaded.no_truncation()
    loaded.no_padding()
    settings = read_object(path.parent / "tokenizer_config.json")
    prefixed = settings.get("add_prefix_space")
    as_it_is = settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
    of_bytes = isinstance(loaded.pre_tokenizer, pre_tokenizers.ByteLevel)
    if isinstance(prefixed, bool) and of_bytes and not as_it_is:
        loaded.pre_tokenizer.add_prefix_space = prefixed
    add_tokens(loaded, path.parent)
    return loaded


def load_byte_bpe(folder: Path) -> tokenizers.Tokenizer:
    """Build GPT-2's byte-level BPE from vocab.json and merges.txt, and what the folder adds."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    settings = read_object(folder / "tokenizer_config.json")
    model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    built = tokenizers.Tokenizer(model)
    prefixed = settings.get("add_prefix_space") is True
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefixed)
    built.decoder = decoders.ByteLevel()
    told = read_object(folder / "special_tokens_map.json").keys() | settings.keys()
    untold = {"bos_token", "eos_token", "unk_token"} - told
    default = untold and tokenizer_class(folder) in BYTE_PAIRS
    add_tokens(built, folder, *(["<|endoftext|>"] if default else []))
    return built


def load_wordpiece(folder: Path) -> tokenizers.Tokenizer:
    """Build BERT's pieces of words from vocab.txt, as the folder's settings want the text."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    settings = read_object(folder / "tokenizer_config.json")
    built = tokenizers.Tokenizer(models.WordPiece.from_file(str(folder / "vocab.txt")))
    built.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.decoder = decoders.WordPiece()
    add_tokens(built, folder, "[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
    return built


def add_tokens(built: tokenizers.Tokenizer, folder: Path, *special: str) -> None:
    """Add the tokens of a folder's settings that a tokenizer has not among its added ones.

    Those with a role or called special are special, as in transformers. A role alone makes no new
    id: the embedding has no row for it. ValueError for a token whose id would be another.
    """
    from tokenizers import AddedToken

    known = {token.content for token in built.get_added_tokens_decoder().values()}
    roles: dict[str, dict[str, Any]] = {**{t: {} for t in special}, **roles_in(folder)}
    added: dict[str, int] = {t: i for t in roles if (i := built.token_to_id(t)) is not None}
    added |= read_object(folder / "added_tokens.json")
    settings = read_object(folder / "tokenizer_config.json")
    for i, token in (settings.get("added_tokens_decoder") or {}).items():
        added[token["content"]] = int(i)
        if token.get("special") or token["content"] in roles:
            roles[token["content"]] = token
    for text, wanted in sorted(added.items(), key=lambda item: item[1]):
        if text in known:
            continue
        add = built.add_special_tokens if text in roles else built.add_tokens
        strips = {k: roles.get(text, {}).get(k, False) for k in ("lstrip", "rstrip", "single_word")}
        add([AddedToken(text, normalized=False, **strips)])
        if built.token_to_id(text) != wanted:
            raise ValueError(
                f"the folder gives {text!r} the id {wanted}, where the next one is "
                f"{built.token_to_id(text)}"
            )


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
        pairs = zip(self._shown, text, strict=False)  # some decoders join what came before
        same = next((i for i, (old, new) in enumerate(pairs) if old != new), len(self._shown))
        self._shown = text
        return text[same:]

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
