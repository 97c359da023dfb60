"""GPT-2 as Megatron-LM trained it: the 345M of 2019, and everything of that shape since."""

from __future__ import annotations

from pathlib import Path

from pydantic import PositiveInt

from porttool import Converter, Source
from porttool.reading import (
    Options,
    PathOption,
    fused_order,
    is_megatron,
    megatron_weight_map,
    open_megatron,
    read_megatron_config,
    renamed_files,
    special_tokens,
)

TOKENIZER = {"vocab.json": "vocab.json", "merges.txt": "merges.txt"}


class MegatronOptions(Options):
    """What a file cannot tell; `tokenizer` is a folder with vocab.json and merges.txt."""

    n_head: PositiveInt | None = None
    vocab_size: PositiveInt | None = None
    tokenizer: PathOption | None = None


class MegatronConverter(Converter):
    """A training checkpoint of any version, of one rank or many."""

    name = "gpt2/megatron"
    family = "gpt2"
    source_format = "Megatron-LM checkpoint"
    Options = MegatronOptions
    options: MegatronOptions

    def matches(self, source: Path) -> bool:
        """Return true for rank folders with Megatron's files, or for one such file."""
        return is_megatron(source)

    def open(self, source: Path) -> Source:
        """Join the ranks; the version decides how the fused projection is read."""
        found = open_megatron(source)
        folder = self.options.tokenizer
        tokenizer = renamed_files(folder, TOKENIZER) if folder else {}
        tokens, n_tokens = special_tokens(tokenizer)
        model = read_megatron_config(
            found, n_head=self.options.n_head, vocab_size=self.options.vocab_size or n_tokens
        )
        return Source(
            config=model,
            tokens=tokens,
            tensors=found.tensors,
            tokenizer_data=tokenizer,
            weight_map=megatron_weight_map(model, qkv=fused_order(found.version)),
        )
