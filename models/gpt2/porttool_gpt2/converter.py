"""GPT-2 in Hugging Face's layout: fused q | k | v columns, Conv1D weights stored [in, out].

Its keys and its table of tensor names are `gpt2_layout` in core, because three more sources keep
them: SantaCoder, OpenAI's files and FasterTransformer's config.ini.
"""

from __future__ import annotations

from typing import ClassVar

from porttool import HuggingFaceConverter, ModelConfig, SourceConfig, WeightMap, transpose
from porttool.reading import gpt2_weight_map, read_gpt2_config


class GPT2Converter(HuggingFaceConverter):
    """GPT2LMHeadModel of any size."""

    name = "gpt2"
    family = "gpt2"
    hub_id = "openai-community/gpt2"
    shape = ModelConfig(  # the published 124M, for builds with random weights
        vocab_size=50257, n_positions=1024, n_layer=12, n_head=12, n_kv_head=12, head_dim=64,
        d_model=768, d_ff=3072, activation="gelu_tanh", attention_scale=0.125,
    )  # fmt: skip
    model_types: ClassVar[frozenset[str]] = frozenset({"gpt2"})
    default_end = 50256  # configs of 2019 say neither where text begins nor where it ends

    def read_config(self, config: SourceConfig) -> ModelConfig:
        """Read every key of GPT2Config that changes the arithmetic."""
        return read_gpt2_config(config)

    def weight_map(self, config: ModelConfig) -> WeightMap:
        """Return the table; a tied head may be stored once more, as an exact copy."""
        return gpt2_weight_map(config, transpose)
