"""SantaCoder as it was published, and GPTBigCode: SantaCoder again, and StarCoder 1B to 15B.

Both are GPT-2's layout; the fused projection differs. Multi-query attention has one key and value
head (Shazeer 2019), which stays one head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from porttool import (
    HuggingFaceConverter,
    ModelConfig,
    Source,
    SourceConfig,
    WeightMap,
    take,
    transpose,
)
from porttool.reading import (
    InfillTokens,
    SourceError,
    SpecialTokens,
    as_is,
    check_special_ids,
    concat,
    gpt2_weight_map,
    interleaved_qkv,
    read_config,
    read_gpt2_config,
    read_json,
    special_ids,
)

if TYPE_CHECKING:
    from torch import Tensor

END_OF_TEXT = "<|endoftext|>"

INFILL = (
    InfillTokens(prefix="<fim-prefix>", middle="<fim-middle>", suffix="<fim-suffix>"),
    InfillTokens(prefix="<fim_prefix>", middle="<fim_middle>", suffix="<fim_suffix>"),
)
"""SantaCoder spells its tokens with dashes, StarCoder with underscores."""

RUNNER_KEYS = (
    "inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length",
    "pre_allocate_kv_cache", "validate_runner_input", "runner_max_sequence_length",
    "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32",
)  # fmt: skip
"""Keys about how GPTBigCode was run and rounded; its softmax is in float32 whatever they say."""


class SantaCoderConverter(HuggingFaceConverter):
    """bigcode/santacoder: a config of type gpt2 and code of its own, with q_attn and kv_attn."""

    name = "santacoder"
    family = "santacoder"
    refines = "gpt2"
    hub_id = "bigcode/santacoder"
    model_types: ClassVar[frozenset[str]] = frozenset({"gpt2", "santacoder"})
    implements: ClassVar[frozenset[str]] = frozenset(
        {"configuration_gpt2_mq.GPT2CustomConfig", "modeling_gpt2_mq.GPT2LMHeadCustomModel"}
    )

    def matches(self, source: Path) -> bool:
        """Tell it from GPT-2 by the key that only its own config has."""
        return super().matches(source) and "attention_head_type" in read_config(source)

    def read_config(self, config: SourceConfig) -> ModelConfig:
        """Read GPT-2's keys and the kind of attention."""
        heads = config.one_of("attention_head_type", {"multiquery": 1, "multihead": None})
        return read_gpt2_config(config, n_kv_head=heads)

    def special_tokens(self, source: Path, model: ModelConfig) -> SpecialTokens:
        """Read the ids; old revisions declare GPT-2's, for which the tokenizer's go instead."""
        return special_tokens(source, model)

    def open(self, source: Path) -> Source:
        """Open the folder and find the infilling tokens in its tokenizer."""
        return replace(super().open(source), infill=infill_tokens(source))

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

    def read_config(self, config: SourceConfig) -> ModelConfig:
        """Read GPT-2's keys, as far as GPTBigCode heeds them, and the kind of attention."""
        config.ignore(*RUNNER_KEYS)
        heads = 1 if config.flag("multi_query", True) else config.integer("n_head")
        if config.integer("num_key_value_heads", heads) != heads:
            raise SourceError(f"{config.file}: 'num_key_value_heads' contradicts 'multi_query'")
        model = read_gpt2_config(config, n_kv_head=heads)
        return model.model_copy(update={"inverse_layer_scale": False, "upcast_attention": False})

    def special_tokens(self, source: Path, model: ModelConfig) -> SpecialTokens:
        """Read the ids, or find them in the tokenizer."""
        return special_tokens(source, model)

    def open(self, source: Path) -> Source:
        """Open the folder and find the infilling tokens in its tokenizer."""
        return replace(super().open(source), infill=infill_tokens(source))

    def weight_map(self, config: ModelConfig) -> WeightMap:
        """Return the table; without multi-query each head's q, k and v lie together."""
        fused = as_is if config.n_kv_head < config.n_head else interleaved_qkv
        names = {part: f"h.{{i}}.attn.c_attn.{part}" for part in ("weight", "bias")}
        return gpt2_weight_map(
            config, as_is, {part: take(name, via=fused) for part, name in names.items()}
        )


def joined_columns(config: ModelConfig, tensors: Sequence[Tensor]) -> Tensor:
    """Turn [in, q] and [in, k | v] into [q | k | v, in]."""
    import torch

    return torch.cat([t.t() for t in tensors])


def added_tokens(source: Path) -> Mapping[str, int]:
    """Return the ids of the tokens that the tokenizer's files add to the byte pairs."""
    found: dict[str, int] = {}
    if (source / "tokenizer.json").is_file():
        entries: list[dict[str, Any]] = read_json(source / "tokenizer.json").get("added_tokens", [])
        found.update({str(entry["content"]): int(entry["id"]) for entry in entries})
    if (source / "added_tokens.json").is_file():
        found.update(read_json(source / "added_tokens.json"))
    return found


def special_tokens(source: Path, model: ModelConfig) -> SpecialTokens:
    """Return the declared ids, with the tokenizer's end of text for those that cannot be.

    Revisions of SantaCoder declare 50256, GPT-2's end of text, in a vocabulary of 49280.
    """
    ids = special_ids(source)
    end = added_tokens(source).get(END_OF_TEXT)
    if end is not None:
        for key in ("bos", "eos"):
            declared = ids[key]
            if declared is None or (isinstance(declared, int) and declared >= model.vocab_size):
                ids[key] = end
    return check_special_ids(ids, model.vocab_size, source)


def infill_tokens(source: Path) -> InfillTokens | None:
    """Return the spelling that the tokenizer knows; None if it knows neither."""
    known = added_tokens(source)
    return next((t for t in INFILL if {t.prefix, t.middle, t.suffix} <= known.keys()), None)
