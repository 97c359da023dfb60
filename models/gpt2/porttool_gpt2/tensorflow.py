"""GPT-2 as OpenAI published it: a TensorFlow checkpoint, hparams.json and the byte-pair files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from porttool import Converter, ModelConfig, Source, WeightMap
from porttool.reading import (
    Renamed,
    SourceError,
    TensorBundle,
    find_bundle,
    gpt2_config,
    gpt2_weight_map,
    openai_name,
    read_json,
    renamed_files,
    special_tokens,
    squeezed,
)

KEYS = {
    "n_vocab": "vocab_size", "n_ctx": "n_positions", "n_embd": "n_embd", "n_head": "n_head",
    "n_layer": "n_layer",
}  # fmt: skip
"""hparams.json's keys → GPT2Config's. Everything else is as in every GPT-2."""

TOKENIZER = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
"""The same files under the names that they have elsewhere."""

TRAINING = ("*[Aa]dam*", "*global_step*", "beta*_power*", "*OBJECT_GRAPH*")
"""What training leaves beside the weights."""


class TensorFlowConverter(Converter):
    """OpenAI's 124M, 355M, 774M and 1558M, and what was fine-tuned from them in TensorFlow."""

    name = "gpt2/tensorflow"
    family = "gpt2"
    source_format = "TensorFlow checkpoint folder"

    def matches(self, source: Path) -> bool:
        """Return true for a hparams.json with GPT-2's keys beside an index of tensors.

        If one of the two is missing or damaged, the folder still matches, so that `open` names it.
        """
        if source.is_file() and source.suffix != ".index":
            return False
        folder = source if source.is_dir() else source.parent
        has_index = any(folder.glob("*.index"))
        is_hugging_face = (folder / "config.json").exists()
        try:
            is_gpt2 = read_json(folder / "hparams.json").keys() >= KEYS.keys()
        except SourceError:
            return has_index and not is_hugging_face and (folder / "encoder.json").is_file()
        return is_gpt2 and (has_index or not is_hugging_face)

    def config(self, source: Path) -> ModelConfig:
        """Read hparams.json."""
        values = read_json(file := hparams(source))
        if missing := KEYS.keys() - values.keys():
            raise SourceError(f"{file}: the keys {sorted(missing)} are missing")
        return gpt2_config({KEYS.get(key, key): value for key, value in values.items()}, file)

    def open(self, source: Path) -> Source:
        """Index the checkpoint and take the byte-pair files under their usual names."""
        tokenizer = renamed_files(hparams(source).parent, TOKENIZER)
        return Source(
            config=self.config(source),
            tokens=special_tokens(tokenizer)[0],
            tensors=Renamed.by(TensorBundle(find_bundle(source)), openai_name),
            tokenizer_data=tokenizer,
        )

    def weight_map(self, config: ModelConfig) -> WeightMap:
        """Return GPT-2's table; matrices are convolutions of width one, [1, in, out]."""
        return replace(gpt2_weight_map(config, squeezed), unused=TRAINING)


def hparams(source: Path) -> Path:
    """Return the config's path, beside the checkpoint that a folder or an index names."""
    return find_bundle(source).with_name("hparams.json")
