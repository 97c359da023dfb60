"""Which of transformers' models computes a config, with which keys and names of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from porttool.config import ModelConfig
from porttool.errors import UsageError

GPT2_NAMES = {
    "embedding": "wte", "position": "wpe", "norm": "ln_f", "norm1": "ln_1", "norm2": "ln_2",
    "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}  # fmt: skip
LLAMA_NAMES = {
    "embedding": "embed_tokens", "norm": "norm", "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm", "attention.out": "self_attn.o_proj",
    "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
ACTIVATIONS = {"gelu_tanh": "gelu_new"}
"""Names that are not the same on both sides."""


@dataclass(frozen=True)
class Part:
    """One of their tensors: the first and the end of its rows in ours, and what is done to them."""

    name: str
    rows: tuple[int, int | None] = (0, None)
    transposed: bool = False
    plus_one: bool = False


@dataclass(frozen=True)
class Architecture:
    """A model of transformers: its name, the keys of its config, and the parts of a tensor."""

    name: str
    values: Mapping[str, Any]
    parts: Callable[[str], tuple[Part, ...]]


def architecture_of(config: ModelConfig) -> Architecture:
    """Return the model of transformers that computes a config; UsageError where none does."""
    learned, heads = config.position == "learned", config.n_head * config.head_dim
    biases = (config.qkv_bias, config.out_bias, config.mlp_bias)
    gpt2, scale = learned and not config.gated, config.head_dim**-0.5
    nemotron = not learned and not config.gated
    problems = {
        "learned positions with a gated MLP": learned and config.gated,
        "RMSNorm": config.norm == "rmsnorm",
        "norms without a bias": not config.norm_bias,
        "rotary positions with a plain MLP and norms stored as they act": (
            nemotron and config.norm == "layernorm"
        ),
        "heads that are not the model's width": not nemotron and heads != config.d_model,
        "grouped key heads": gpt2 and config.n_kv_head not in (1, config.n_head),
        "these biases": (gpt2 and not all(biases)) or (
            config.gated and (config.out_bias or config.mlp_bias)
        ) or (nemotron and config.qkv_bias != config.out_bias),
        "this scale of scores": config.attention_scale not in ((scale, 1.0) if gpt2 else (scale,)),
        "scores divided by the layer": config.inverse_layer_scale and not (
            gpt2 and config.n_kv_head == config.n_head
        ),
        "attention in float32": config.upcast_attention and not gpt2,
    }  # fmt: skip
    if found := [what for what, wrong in problems.items() if wrong]:
        raise UsageError(f"transformers' GPT models cannot express {' and '.join(found)}")
    if gpt2:
        return gpt2_of(config)
    return nemotron_of(config) if nemotron else stablelm_of(config)


def gpt2_of(config: ModelConfig) -> Architecture:
    """GPT2LMHeadModel, or GPTBigCode where all queries share one key head."""
    shared = config.n_kv_head < config.n_head
    values = {
        "model_type": "gpt_bigcode" if shared else "gpt2",
        "vocab_size": config.vocab_size, "n_positions": config.n_positions,
        "n_embd": config.d_model, "n_layer": config.n_layer, "n_head": config.n_head,
        "n_inner": config.d_ff, "layer_norm_epsilon": config.norm_eps,
        "activation_function": ACTIVATIONS.get(config.activation, config.activation),
        "scale_attn_weights": config.attention_scale != 1.0,
    }  # fmt: skip
    if shared:
        values["multi_query"] = True
    else:
        values["scale_attn_by_inverse_layer_idx"] = config.inverse_layer_scale
        values["reorder_and_upcast_attn"] = config.upcast_attention

    def parts(name: str) -> tuple[Part, ...]:
        layer, module, kind = split(name)
        place = f"transformer.{layer and f'h.{layer}.'}{GPT2_NAMES.get(module)}.{kind}"
        matrix = not shared and kind == "weight" and bool(layer) and "norm" not in module
        return (Part(place, transposed=matrix, plus_one=adds_one(config, name)),)

    return Architecture("GPTBigCodeForCausalLM" if shared else "GPT2LMHeadModel", values, parts)


def stablelm_of(config: ModelConfig) -> Architecture:
    """StableLM: rotary positions, a gated MLP, norms with biases."""
    values = {
        "model_type": "stablelm", "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps, "use_qkv_bias": config.qkv_bias, **llama_keys(config),
    }  # fmt: skip
    return Architecture("StableLmForCausalLM", values, lambda name: llama_parts(config, name))


def nemotron_of(config: ModelConfig) -> Architecture:
    """Nemotron: the same with a plain MLP and norms that are stored minus one."""
    values = {
        "model_type": "nemotron", "hidden_act": config.activation, "norm_eps": config.norm_eps,
        "attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias,
        "head_dim": config.head_dim, **llama_keys(config),
    }  # fmt: skip
    return Architecture("NemotronForCausalLM", values, lambda name: llama_parts(config, name))


def llama_keys(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that both have."""
    return {
        "vocab_size": config.vocab_size, "max_position_embeddings": config.n_positions,
        "hidden_size": config.d_model, "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base,
                            "partial_rotary_factor": config.rotary_fraction},
    }  # fmt: skip


def llama_parts(config: ModelConfig, name: str) -> tuple[Part, ...]:
    """Return what becomes of a tensor: query, key and value apart, and a gate from its MLP."""
    layer, module, kind = split(name)
    prefix = f"model.{layer and f'layers.{layer}.'}"
    if module == "attention.qkv":
        q, k = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        rows = {"q": (0, q), "k": (q, q + k), "v": (q + k, None)}
        return tuple(Part(f"{prefix}self_attn.{x}_proj.{kind}", r) for x, r in rows.items())
    if module == "mlp.up" and config.gated:
        halves = {"gate": (0, config.d_ff), "up": (config.d_ff, None)}
        return tuple(Part(f"{prefix}mlp.{x}_proj.{kind}", r) for x, r in halves.items())
    plus_one = config.gated and adds_one(config, name)
    return (Part(f"{prefix}{LLAMA_NAMES.get(module)}.{kind}", plus_one=plus_one),)


def adds_one(config: ModelConfig, name: str) -> bool:
    """Whether a tensor is a norm's weight that is stored minus one."""
    return config.norm == "layernorm1p" and bool(re.search(r"norm\d?\.weight$", name))


def split(name: str) -> tuple[str, str, str]:
    """Return a canonical name's layer, empty outside of the layers, its module, and its kind."""
    layer, module, kind = re.fullmatch(  # type: ignore[union-attr]
        r"(?:layers\.(\d+)\.)?(.+)\.(weight|bias)", name
    ).groups(default="")
    return layer, module, kind
