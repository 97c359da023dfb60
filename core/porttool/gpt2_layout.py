"""GPT-2's keys and tensor names in Hugging Face's folders, which several families keep."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porttool.config import Activation, ModelConfig
from porttool.converter import validated
from porttool.huggingface import SourceConfig
from porttool.weights import Take, WeightMap, take

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.weights import Via

ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
"""Names in the config → what they compute. `gelu` is the exact form, `gelu_new` the tanh form."""

GATED: dict[str, Activation] = {
    "swiglu": "silu", "fast-swiglu": "silu", "geglu": "gelu", "fast-geglu": "gelu",
    "reglu": "relu", "fast-reglu": "relu",
}  # fmt: skip
"""Names of gated activations as NeMo spells them, and others after it → what the gate computes."""

MASKS = ("h.*.attn.bias", "h.*.attn.masked_bias")
"""Causal-mask buffers that old checkpoints carry; they hold no weights."""


def read_gpt2_config(
    config: SourceConfig,
    *,
    n_kv_head: int | None = None,
    activations: Mapping[str, Activation] = ACTIVATIONS,
) -> ModelConfig:
    """Read every key of GPT2Config that changes the arithmetic; key heads are n_head if not told.

    Raises SourceError for a key that is missing or impossible.
    """
    d_model = config.integer("n_embd")
    n_head = config.integer("n_head")
    scaled = config.flag("scale_attn_weights", True)
    return ModelConfig(
        vocab_size=config.integer("vocab_size"),
        n_positions=config.integer("n_positions"),
        n_layer=config.integer("n_layer"),
        n_head=n_head,
        n_kv_head=n_kv_head or n_head,
        head_dim=config.quotient("n_embd", "n_head"),
        d_model=d_model,
        d_ff=config.integer("n_inner", 4 * d_model),
        activation=config.one_of("activation_function", activations, "gelu_new"),
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        attention_scale=(d_model // n_head) ** -0.5 if scaled else 1.0,
        inverse_layer_scale=config.flag("scale_attn_by_inverse_layer_idx", False),
        upcast_attention=config.flag("reorder_and_upcast_attn", False),
        tied_head=config.flag("tie_word_embeddings", True),
    )


def gpt2_config(values: Mapping[str, Any], file: Path) -> ModelConfig:
    """Read a whole config in GPT2Config's keys; one that nothing accounts for is refused."""
    config = SourceConfig(values, file)
    model = validated(file, lambda: read_gpt2_config(config))
    config.finish()
    return model


def gpt2_weight_map(
    config: ModelConfig, linear: Via, qkv: Mapping[str, Take] | None = None
) -> WeightMap:
    """Return the table; `linear` turns a stored matrix into [out, in].

    `qkv` gives the rules for `weight` and `bias` of the fused projection where they are not those
    of `c_attn`. A tied head may be stored once more, as an exact copy.
    """
    attention = qkv or {
        "weight": take("h.{i}.attn.c_attn.weight", via=linear),
        "bias": take("h.{i}.attn.c_attn.bias"),
    }
    rules = {
        "embedding.weight": take("wte.weight"),
        "position.weight": take("wpe.weight"),
        "layers.{i}.norm1.weight": take("h.{i}.ln_1.weight"),
        "layers.{i}.norm1.bias": take("h.{i}.ln_1.bias"),
        "layers.{i}.attention.qkv.weight": attention["weight"],
        "layers.{i}.attention.qkv.bias": attention["bias"],
        "layers.{i}.attention.out.weight": take("h.{i}.attn.c_proj.weight", via=linear),
        "layers.{i}.attention.out.bias": take("h.{i}.attn.c_proj.bias"),
        "layers.{i}.norm2.weight": take("h.{i}.ln_2.weight"),
        "layers.{i}.norm2.bias": take("h.{i}.ln_2.bias"),
        "layers.{i}.mlp.up.weight": take("h.{i}.mlp.c_fc.weight", via=linear),
        "layers.{i}.mlp.up.bias": take("h.{i}.mlp.c_fc.bias"),
        "layers.{i}.mlp.down.weight": take("h.{i}.mlp.c_proj.weight", via=linear),
        "layers.{i}.mlp.down.bias": take("h.{i}.mlp.c_proj.bias"),
        "norm.weight": take("ln_f.weight"),
        "norm.bias": take("ln_f.bias"),
        "head.weight": take("lm_head.weight"),
    }
    copies = {"lm_head.weight": "wte.weight"} if config.tied_head else {}
    return WeightMap(rules, unused=MASKS, duplicates=copies)


def openai_name(variable: str) -> str:
    """Turn TensorFlow's `model/h0/ln_1/g` into `h.0.ln_1.weight`."""
    name = re.sub(r"^h(\d+)/", r"h.\1.", variable.removeprefix("model/")).replace("/", ".")
    if name in ("wte", "wpe"):
        return f"{name}.weight"
    return re.sub(r"\.[gw]$", ".weight", re.sub(r"\.b$", ".bias", name))


def squeezed(config: ModelConfig, tensors: Sequence[Tensor]) -> Tensor:
    """Turn a convolution of width one, [1, in, out], into [out, in]."""
    return tensors[0].squeeze(0).t()
