"""The tokenizer in a NeMo archive: a sentencepiece model, or GPT-2's vocabulary and merges."""

from __future__ import annotations

import json
from collections.abc import Mapping

from porttool.config import SpecialTokens
from porttool.errors import MissingExtra, SourceError
from porttool.sources.nemo import NemoFiles

BPE_FILES = {"vocab_file": "vocab.json", "merge_file": "merges.txt"}
END_OF_TEXT = "<|endoftext|>"


def read_tokenizer(files: NemoFiles, tokenizer: Mapping[str, object]) -> dict[str, bytes]:
    """Return the tokenizer's files under the names that they have elsewhere.

    A tokenizer that the YAML names by a hub id is not in the archive: then there is none.
    """
    model = files.artifact(tokenizer.get("model") or tokenizer.get("tokenizer_model"))
    if model is not None:
        return {"tokenizer.model": model}
    found = {new: files.artifact(tokenizer.get(key)) for key, new in BPE_FILES.items()}
    return {new: data for new, data in found.items() if data is not None}


def special_tokens(tokenizer: Mapping[str, bytes]) -> tuple[SpecialTokens, int | None]:
    """Return the ids with a meaning and the number of all ids, None where no tokenizer is."""
    if "tokenizer.model" in tokenizer:
        return sentencepiece_tokens(tokenizer["tokenizer.model"])
    if "vocab.json" not in tokenizer:
        return SpecialTokens(), None
    try:
        ids = json.loads(tokenizer["vocab.json"])
        end = ids.get(END_OF_TEXT)
        return SpecialTokens(bos=end, eos=() if end is None else (end,)), 1 + max(ids.values())
    except (ValueError, TypeError, AttributeError) as error:
        raise SourceError(f"the tokenizer's vocabulary is damaged: {error}") from error


def sentencepiece_tokens(data: bytes) -> tuple[SpecialTokens, int]:
    """Read the ids that a sentencepiece model itself declares."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise MissingExtra("gpt-next", "sentencepiece") from error
    try:
        model = SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise SourceError(f"the tokenizer's sentencepiece model is damaged: {error}") from error
    declared = (model.bos_id(), model.eos_id(), model.pad_id())
    bos, eos, pad = (None if i < 0 else i for i in declared)
    return SpecialTokens(bos=bos, eos=() if eos is None else (eos,), pad=pad), model.vocab_size()
