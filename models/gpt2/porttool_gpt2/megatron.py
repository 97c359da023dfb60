"""GPT-2 as Megatron-LM trained it: the 345M of 2019, and everything of that shape since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from porttool import Converter, ModelConfig, Source, WeightMap
from porttool.reading import (
    MegatronCheckpoint,
    Options,
    check_special_ids,
    is_megatron,
    megatron_weight_map,
    open_megatron,
    read_json,
    read_megatron_config,
)


class MegatronOptions(Options):
    """What a file cannot tell; `tokenizer` is a folder with vocab.json and merges.txt."""

    n_head: PositiveInt | None = None
    vocab_size: PositiveInt | None = None
    tokenizer: Path | None = None


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

    def config(self, source: Path) -> ModelConfig:
        """Read the shape from the tensors, the rest from the arguments and the options."""
        return self._config(open_megatron(source))

    def open(self, source: Path) -> Source:
        """Join the ranks; the version decides how the fused projection is read."""
        found = open_megatron(source)
        model = self._config(found)
        end = self._vocabulary().get("<|endoftext|>")
        folder = self.options.tokenizer
        return Source(
            config=model,
            tokens=check_special_ids(
                {"bos": end, "eos": end, "pad": None}, model.vocab_size, source
            ),
            tensors=found.tensors,
            tokenizer=(folder / "vocab.json", folder / "merges.txt") if folder else (),
            weight_map=megatron_weight_map(
                model, found.version, list(self.module(model).state_dict())
            ),
        )

    def weight_map(self, config: ModelConfig) -> WeightMap:
        """Return the table of today's versions."""
        return megatron_weight_map(config, 3.0, list(self.module(config).state_dict()))

    def _config(self, found: MegatronCheckpoint) -> ModelConfig:
        asked = self.options.vocab_size or len(self._vocabulary()) or None
        return read_megatron_config(found, n_head=self.options.n_head, vocab_size=asked)

    def _vocabulary(self) -> dict[str, Any]:
        folder = self.options.tokenizer
        return read_json(folder / "vocab.json") if folder else {}
