"""The shapes that the GPU measurements run, and the same weights in both engines' names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from porttool.config import ModelConfig


def _gpt2(n_layer: int, d_model: int, n_head: int, n_positions: int = 1024) -> dict[str, Any]:
    return {
        "vocab_size": 50257, "n_positions": n_positions, "n_layer": n_layer, "n_head": n_head,
        "n_kv_head": n_head, "head_dim": d_model // n_head, "d_model": d_model,
        "d_ff": 4 * d_model, "activation": "gelu_tanh",
        "attention_scale": (d_model // n_head) ** -0.5,
    }  # fmt: skip


def _multi_query(
    n_layer: int, d_model: int, n_head: int, vocab_size: int, n_positions: int
) -> dict[str, Any]:
    return _gpt2(n_layer, d_model, n_head, n_positions) | {
        "n_kv_head": 1, "vocab_size": vocab_size,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "santacoder": _multi_query(24, 2048, 16, 49280, 2048),
    "gpt-next-2b": _gpt2(24, 2048, 16, 2048) | {
        "vocab_size": 256000, "d_ff": 5440, "activation": "silu", "gated": True,
        "norm": "layernorm1p", "position": "rotary", "rotary_fraction": 0.5, "qkv_bias": False,
        "out_bias": False, "mlp_bias": False, "tied_head": False,
    },
    "camel-5b": _gpt2(24, 4096, 32, 2048),
    "starcoder": _multi_query(40, 6144, 48, 49152, 8192),
}  # fmt: skip

REQUIRED: dict[str, tuple[float, float, float]] = {
    "gpt2": (0.16, 0.45, 1.1), "gpt2-xl": (1.10, 2.6, 6.8), "santacoder": (0.70, 0.85, 1.4),
    "gpt-next-2b": (1.00, 2.0, 4.6), "camel-5b": (2.65, 4.5, 9.8),
    "starcoder": (7.60, 8.0, 9.0),
}  # fmt: skip
"""Milliseconds a decoded step should take at most, of 1, 32 and 128 rows at 512 tokens."""


def config(name: str) -> ModelConfig:
    """Return a shape by name."""
    return ModelConfig(**SHAPES[name])


def peer(name: str) -> torch.nn.Module | None:
    """Return the transformers model of a shape with random weights on the GPU, if it has one."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPTBigCodeConfig, GPTBigCodeForCausalLM

    c = config(name)
    if c.gated:
        return None
    shape = {
        "vocab_size": c.vocab_size, "n_positions": c.n_positions, "n_embd": c.d_model,
        "n_layer": c.n_layer, "n_head": c.n_head, "n_inner": c.d_ff,
        "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("cuda"):
            if c.n_kv_head == 1:
                made = GPTBigCodeForCausalLM(GPTBigCodeConfig(**shape, multi_query=True))
            else:
                made = GPT2LMHeadModel(GPT2Config(**shape))
    finally:
        torch.set_default_dtype(before)
    return made.eval().requires_grad_(False)


def weights_of(model: torch.nn.Module, *, transposed: bool) -> dict[str, Tensor]:
    """Return canonical tensors from a transformers model; GPT-2's matrices are transposed."""
    state = model.state_dict()

    def matrix(name: str) -> Tensor:
        weight = state[f"{name}.weight"]
        return weight.t().contiguous() if transposed else weight

    out = {
        "embedding.weight": state["transformer.wte.weight"],
        "position.weight": state["transformer.wpe.weight"],
        "norm.weight": state["transformer.ln_f.weight"],
        "norm.bias": state["transformer.ln_f.bias"],
    }
    parts = {
        "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }  # fmt: skip
    for layer in range(len(model.transformer.h)):
        ours, theirs = f"layers.{layer}", f"transformer.h.{layer}"
        for mine, name in parts.items():
            out[f"{ours}.{mine}.weight"] = matrix(f"{theirs}.{name}")
            out[f"{ours}.{mine}.bias"] = state[f"{theirs}.{name}.bias"]
        for mine, name in (("norm1", "ln_1"), ("norm2", "ln_2")):
            out[f"{ours}.{mine}.weight"] = state[f"{theirs}.{name}.weight"]
            out[f"{ours}.{mine}.bias"] = state[f"{theirs}.{name}.bias"]
    return out
