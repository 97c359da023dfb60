"""The transformers models whose arithmetic GPT-Next's is: somebody else's code, our tensors.

GPT-2B's is StableLM's with a norm's weight plus one; with squared ReLU it is Nemotron's, which
stores the weight minus one too.
"""

from __future__ import annotations

from typing import Any

import torch

import nemo_writer as nemo
from nemo_writer import Tensors


def stablelm(values: dict[str, Any], tensors: Tensors) -> torch.nn.Module:
    """Return the float64 model of `fast-swiglu`."""
    from transformers import StableLmConfig, StableLmForCausalLM

    config = configured(StableLmConfig, values, tensors, hidden_act="silu", layer_norm_eps=1e-5)
    return filled(StableLmForCausalLM(config), nemo.llama_names(values, tensors, plus=1.0))


def nemotron(values: dict[str, Any], tensors: Tensors) -> torch.nn.Module:
    """Return the float64 model of `squared-relu`."""
    from transformers import NemotronConfig, NemotronForCausalLM

    config = configured(NemotronConfig, values, tensors, hidden_act="relu2", norm_eps=1e-5)
    return filled(NemotronForCausalLM(config), nemo.llama_names(values, tensors, plus=0.0))


def configured(kind: type, values: dict[str, Any], tensors: Tensors, **more: Any) -> Any:
    """Return a transformers config of NeMo's values."""
    width, n_head, n_kv_head, _, d_ff = nemo.sizes(values)
    config = kind(
        vocab_size=len(tensors["output_layer.weight"]), hidden_size=width, intermediate_size=d_ff,
        num_hidden_layers=values["num_layers"], num_attention_heads=n_head,
        num_key_value_heads=n_kv_head, max_position_embeddings=values["encoder_seq_length"],
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0,
            "partial_rotary_factor": values["rotary_percentage"],
        },
        **more,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return config


def filled(model: torch.nn.Module, values: Tensors) -> torch.nn.Module:
    """Load every tensor into a transformers model in float64."""
    model = model.double().eval().requires_grad_(False)
    wanted = set(model.state_dict())
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert wanted - tied == set(values)
    model.load_state_dict({n: t.double() for n, t in values.items()}, strict=False)
    if hasattr(model, "model"):
        double_rotary(model)
    return model


def double_rotary(model: torch.nn.Module) -> None:
    """Replace the rotation's cosines, which transformers computes in float32, by float64 ones."""

    def angles(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dim = 2 * len(model.model.rotary_emb.inv_freq)
        frequency = 1 / 10000 ** (torch.arange(0, dim, 2, device=x.device).double() / dim)
        angle = position_ids[..., None].double() * frequency
        angle = torch.cat((angle, angle), -1)
        return angle.cos(), angle.sin()

    model.model.rotary_emb.forward = angles
