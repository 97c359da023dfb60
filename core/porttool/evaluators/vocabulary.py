"""Does text become the same token ids as in transformers, and end at the same ones?"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from porttool.errors import SourceError, importing
from porttool.evaluator import Verdict
from porttool.evaluators.transformers_folder import quiet
from porttool.sources.tokenizer_files import is_tokenizer
from porttool.text import SentencePieceTokenizer, Tokenizer

SAMPLES = (
    "The council met on Tuesday; it didn't vote.",
    " Leading and  doubled   spaces\tand tabs\nand lines\n\n",
    "Prices rose 3.75% to €1,204.50 (a record!) in 2026.",
    "naïve façade, Ελληνικά, русский, 漢字かな, 🙂👩‍🔬",
    "def f(x):\n    return x ** 2  # comment\n",
    "",
)
"""Texts with what tokenizers get wrong: spaces, apostrophes, numbers, scripts, joined emoji."""

CHARACTERS = "".join(map(chr, (*range(0x20, 0x7F), *range(0xA1, 0x800), *range(0x800, 0xD800, 997),
                               *range(0xE000, 0x110000, 0xFFD))))  # fmt: skip
"""Characters of every length in UTF-8, with nearly every byte that it uses."""

JOINED = 4
"""Tokens, drawn by lot, whose texts are joined to a word that nobody wrote."""


def compare_tokenizers(
    tokenizer: Tokenizer, source: Path, texts: Sequence[str], vocab_size: int
) -> Verdict | str:
    """Decode every id and encode what it stands for, and texts, on both sides.

    transformers 5 makes a GPT2Tokenizer of a tokenizer.json whatever that says of dividing texts;
    where that is in another way the file as it is counts, too. Returns why not where transformers
    has no tokenizer.
    """
    with importing("reference", "transformers"):
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    if not is_tokenizer(file.name for file in source.iterdir()):
        return f"there is no tokenizer in {source}"  # transformers would make an empty one
    with quiet():
        try:
            theirs = AutoTokenizer.from_pretrained(
                source, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            return f"transformers loads no tokenizer from {source}: {' '.join(str(error).split())}"
        verdict = judge_tokenizer(tokenizer, theirs, texts, vocab_size)
        if verdict.passed or not (source / "tokenizer.json").is_file():
            return verdict
        plain = PreTrainedTokenizerFast.from_pretrained(
            source, local_files_only=True, trust_remote_code=False
        )
        if divides(theirs) == divides(plain):  # settings beside the file hold, then
            return verdict
        again = judge_tokenizer(tokenizer, plain, texts, vocab_size)
    kind = type(theirs).__name__
    detail = f"beside tokenizer.json as it is, of which transformers' {kind} makes another"
    return again.model_copy(update={"detail": detail}) if again.passed else verdict


def divides(theirs: Any) -> list[str]:
    """Return the kinds of steps in which a tokenizer of transformers divides a text into words.

    None of one that is written in Python, which has no such steps.
    """
    backend = getattr(theirs, "backend_tokenizer", None)
    step = (json.loads(backend.to_str())["pre_tokenizer"] if backend else None) or {}
    return [part["type"] for part in step.get("pretokenizers", [step] if step else [])]


def judge_tokenizer(
    tokenizer: Tokenizer, theirs: Any, texts: Sequence[str], vocab_size: int
) -> Verdict:
    """Compare with one of transformers' tokenizers."""
    decode = partial(theirs.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    spelt = {i: decode([i]) for i in comparable_ids(tokenizer, theirs) if i < vocab_size}
    wrong_ids = [i for i, text in spelt.items() if tokenizer.decode([i]) != text]
    drawn = (*added_texts(tokenizer, theirs), *spelt.values(), *joined(spelt.values()))
    cases = list(dict.fromkeys((*texts, CHARACTERS, *drawn)))
    try:
        found = theirs(cases, add_special_tokens=False).input_ids
    except Exception as error:  # the tokenizers library raises nothing narrower
        said = f"transformers' {type(theirs).__name__} cannot encode every text"
        raise SourceError(f"{said}: {error}") from error
    wanted = {
        text: ids
        for text, ids in zip(cases, found, strict=True)
        if max(ids, default=0) < vocab_size and not unknown_to_both(tokenizer, theirs, text, ids)
    }
    wrong = [
        text
        for text, ids in wanted.items()
        if tokenizer.encode(text) != ids or tokenizer.decode(ids) != decode(ids)
    ]
    detail = [f"the id {wrong_ids[0]} is {tokenizer.decode([wrong_ids[0]])!r:.60}, should be "
              f"{spelt[wrong_ids[0]]!r:.60}"] if wrong_ids else []  # fmt: skip
    detail += [f"for example {wrong[0]!r:.60}"] if wrong else []
    return Verdict(
        name="tokenizer",
        passed=not (wrong or wrong_ids),
        found=f"{len(spelt) - len(wrong_ids)} of {len(spelt)} ids, {len(wanted) - len(wrong)} of "
        f"{len(wanted)} texts",
        bound="all",
        detail="; ".join(detail),
    )


def comparable_ids(tokenizer: Tokenizer, theirs: Any) -> Iterable[int]:
    """Return the ids that mean something on both sides.

    sentencepiece has no added tokens, and shows the unknown piece, where transformers hides it.
    """
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return range(len(theirs))
    ids = range(min(tokenizer.n_tokens, len(theirs)))
    return (i for i in ids if i != theirs.unk_token_id)


def unknown_to_both(tokenizer: Tokenizer, theirs: Any, text: str, ids: Sequence[int]) -> bool:
    """Whether a text holds what sentencepiece does not know: transformers' T5 ends the text there.

    ids: the other side's.
    """
    return (
        isinstance(tokenizer, SentencePieceTokenizer)
        and not {theirs.unk_token_id, theirs.eos_token_id}.isdisjoint(ids)
        and tokenizer.unknown in tokenizer.encode(text)
    )


def added_texts(tokenizer: Tokenizer, theirs: Any) -> Iterable[str]:
    """Return the added tokens as they are written: special ones are decoded to nothing."""
    return () if isinstance(tokenizer, SentencePieceTokenizer) else theirs.get_added_vocab()


def joined(spelt: Iterable[str]) -> Iterator[str]:
    """Yield as many words of a few tokens each: what is merged first shows where pieces meet."""
    pieces, random = [text.strip() for text in spelt], Random(0)
    return ("".join(random.choices(pieces, k=JOINED)) for _ in pieces)


def judge_ends(ours: Collection[int], theirs: Collection[int]) -> Verdict:
    """The ids that end a text: both sides of `summarize` are given the engine's, whatever it has.

    A wrong one changes no logit, only where texts stop.
    """
    said = [", ".join(map(str, sorted(ids))) or "none" for ids in (ours, theirs)]
    return Verdict(
        name="end tokens", passed=set(ours) == set(theirs), found=said[0], bound=said[1],
        detail="the ids at which texts end, beside transformers' own",
    )  # fmt: skip
