"""Does text become the same token ids as in transformers, and end at the same ones?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from porttool.errors import MissingExtra
from porttool.evaluator import Verdict
from porttool.evaluators.transformers_folder import quiet
from porttool.sources.tokenizer_files import is_tokenizer
from porttool.text import Tokenizer

SAMPLES = (
    "The council met on Tuesday; it didn't vote.",
    " Leading and  doubled   spaces\tand tabs\nand lines\n\n",
    "Prices rose 3.75% to €1,204.50 (a record!) in 2026.",
    "naïve façade, Ελληνικά, русский, 漢字かな, 🙂👩‍🔬",
    "def f(x):\n    return x ** 2  # comment\n",
    "",
)
"""Texts with what tokenizers get wrong: spaces, apostrophes, numbers, scripts, joined emoji."""


def compare_tokenizers(tokenizer: Tokenizer, source: Path, texts: Sequence[str]) -> Verdict | str:
    """Encode and decode texts on both sides; return why not where transformers has no tokenizer."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtra("reference", "transformers") from error
    if not is_tokenizer(file.name for file in source.iterdir()):
        return f"there is no tokenizer in {source}"  # transformers would make an empty one
    with quiet():
        try:
            theirs = AutoTokenizer.from_pretrained(
                source, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            return f"transformers loads no tokenizer from {source}: {' '.join(str(error).split())}"
        wrong = []
        for text in texts:
            wanted = theirs(text, add_special_tokens=False).input_ids
            back = theirs.decode(
                wanted, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            if tokenizer.encode(text) != wanted or tokenizer.decode(wanted) != back:
                wrong.append(text)
    right = len(texts) - len(wrong)
    detail = f"for example {wrong[0]!r:.60}" if wrong else ""
    return Verdict(
        name="tokenizer", passed=not wrong, found=f"{right} of {len(texts)} texts", bound="all",
        detail=detail,
    )  # fmt: skip


def judge_ends(ours: Collection[int], theirs: Collection[int]) -> Verdict:
    """The ids that end a text: both sides of `summarize` are given the engine's, whatever it has.

    A wrong one changes no logit, only where texts stop.
    """
    said = [", ".join(map(str, sorted(ids))) or "none" for ids in (ours, theirs)]
    return Verdict(
        name="end tokens", passed=set(ours) == set(theirs), found=said[0], bound=said[1],
        detail="the ids at which texts end, beside transformers' own",
    )  # fmt: skip
