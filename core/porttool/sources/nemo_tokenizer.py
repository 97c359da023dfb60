"""The tokenizer in a NeMo archive: a sentencepiece model, or GPT-2's vocabulary and merges."""

from __future__ import annotations

from collections.abc import Mapping

from porttool.sources.nemo import NemoFiles

BPE_FILES = {"vocab_file": "vocab.json", "merge_file": "merges.txt"}


def read_tokenizer(files: NemoFiles, tokenizer: Mapping[str, object]) -> dict[str, bytes]:
    """Return the tokenizer's files under the names that they have elsewhere.

    A tokenizer that the YAML names by a hub id is not in the archive: then there is none.
    """
    model = files.artifact(tokenizer.get("model") or tokenizer.get("tokenizer_model"))
    if model is not None:
        return {"tokenizer.model": model}
    found = {new: files.artifact(tokenizer.get(key)) for key, new in BPE_FILES.items()}
    return {new: data for new, data in found.items() if data is not None}
