"""SantaCoder as it was published, and GPTBigCode: SantaCoder again, and StarCoder 1B to 15B.

Both are GPT-2's layout; the fused projection differs. Multi-query attention has one key and value
head (Shazeer 2019), which stays one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from porttool import (
    HuggingFaceConverter,
    ModelConfig,
    Refinement,
    SourceConfig,
    WeightMap,
    take,
    transpose,
)
from porttool.reading import (
    InfillTokens,
    SourceError,
    as_is,
    concat,
    gpt2_weight_map,
    interleaved_qkv,
    read_config,
    read_gpt2_config,
)

if TYPE_CHECKING:
    from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
"""Revisions of SantaCoder declare 50256 instead, GPT-2's, in a vocabulary of 49280."""

INFILL = (
    InfillTokens(prefix="<fim-prefix>", middle="<fim-middle>", suffix="<fim-suffix>"),
    InfillTokens(prefix="<fim_prefix>", middle="<fim_middle>", suffix="<fim_suffix>"),
)
"""SantaCoder spells its tokens with dashes, StarCoder with underscores."""

RUNNER_KEYS = (
    "inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length",
    "pre_allocate_kv_cache", "validate_runner_input", "runner_max_sequence_length",
    "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "fused_softmax",
)  # fmt: skip
"""Keys about how GPTBigCode was run and rounded; its softmax is in float32 whatever they say."""


FUSED = 2
"""Before transformers had GPTBigCode, `attention_type` said what `multi_query` says."""


class SantaCoderConverter(HuggingFaceConverter):
    """bigcode/santacoder: a config of type gpt2 and code of its own, with q_attn and kv_attn."""

    name = "santacoder"
    family = "santacoder"
    refines = "gpt2"
    hub_id = "bigcode/santacoder"
    shape = ModelConfig(
        vocab_size=49280, n_positions=2048, n_layer=24, n_head=16, n_kv_head=1, head_dim=128,
        d_model=2048, d_ff=8192, activation="gelu_tanh", attention_scale=128**-0.5,
    )  # fmt: skip
    model_types: ClassVar[frozenset[str]] = frozenset({"gpt2", "santacoder"})
    implements: ClassVar[frozenset[str]] = frozenset(
        {"configuration_gpt2_mq.GPT2CustomConfig", "modeling_gpt2_mq.GPT2LMHeadCustomModel"}
    )
    spellings = INFILL
    end_of_text = END_OF_TEXT

    def matches(self, source: Path) -> bool:
        """Tell it from GPT-2 by the key that only its own config has."""
        return super().matches(source) and "attention_head_type" in read_config(source)

    def read_config(self, config: SourceConfig) -> ModelConfig:
        """Read GPT-2's keys and the kind of attention."""
        heads = config.one_of("attention_head_type", {"multiquery": 1, "multihead": None})
        return read_gpt2_config(config, n_kv_head=heads)

    def weight_map(self, config: ModelConfig) -> WeightMap:
        """Return the table; multi-head revisions keep GPT-2's fused projection."""
        if config.n_kv_head == config.n_head:
            return gpt2_weight_map(config, transpose)
        attention = "h.{i}.attn."
        return gpt2_weight_map(config, transpose, {
            "weight": take(
                f"{attention}q_attn.weight", f"{attention}kv_attn.weight", via=joined_columns
            ),
            "bias": take(f"{attention}q_attn.bias", f"{attention}kv_attn.bias", via=concat),
        })  # fmt: skip


class BigCodeConverter(HuggingFaceConverter):
    """GPTBigCodeForCausalLM: the fused projection has q | k | v rows, or is ordered by head."""

    name = "santacoder/bigcode"
    family = "santacoder"
    hub_id = "bigcode/starcoderbase-1b"
    model_types: ClassVar[frozenset[str]] = frozenset({"gpt_bigcode"})
    spellings = INFILL
    end_of_text = END_OF_TEXT

    def read_config(self, config: SourceConfig) -> ModelConfig:
        """Read GPT-2's keys, as far as GPTBigCode heeds them, and the kind of attention."""
        config.ignore(*RUNNER_KEYS)
        if (kind := config.take("attention_type", FUSED)) != FUSED:
            raise SourceError(
                f"{config.file}: 'attention_type' is {kind!r:.80}; porttool knows {FUSED}, one key "
                "head and one fused projection"
            )
        heads = 1 if config.flag("multi_query", True) else config.integer("n_head")
        if config.integer("num_key_value_heads", heads) != heads:
            raise SourceError(f"{config.file}: 'num_key_value_heads' contradicts 'multi_query'")
        model = read_gpt2_config(config, n_kv_head=heads)
        return model.model_copy(update={"inverse_layer_scale": False, "upcast_attention": False})

    def weight_map(self, config: ModelConfig) -> WeightMap:
        """Return the table; without multi-query each head's q, k and v lie together."""
        fused = as_is if config.n_kv_head < config.n_head else interleaved_qkv
        names = {part: f"h.{{i}}.attn.c_attn.{part}" for part in ("weight", "bias")}
        return gpt2_weight_map(
            config, as_is, {part: take(name, via=fused) for part, name in names.items()}
        )


class StarCoderConverter(Refinement):
    """bigcode/starcoder and its kin: GPTBigCode with four times SantaCoder's positions."""

    name = "starcoder"
    family = "starcoder"
    refines = "santacoder/bigcode"
    hub_id = "bigcode/starcoder"
    shape = ModelConfig(
        vocab_size=49152, n_positions=8192, n_layer=40, n_head=48, n_kv_head=1, head_dim=128,
        d_model=6144, d_ff=24576, activation="gelu", attention_scale=128**-0.5,
    )  # fmt: skip

    def recognises(self, config: ModelConfig) -> bool:
        """Tell StarCoder 1B to 15B from SantaCoder by what all of their configs fix."""
        return (config.n_positions, config.n_kv_head) == (8192, 1)


def joined_columns(config: ModelConfig, tensors: Sequence[Tensor]) -> Tensor:
    """Turn [in, q] and [in, k | v] into [q | k | v, in]."""
    import torch

    return torch.cat([t.t() for t in tensors])
