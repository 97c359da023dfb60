"""GPT-Next's conformance case: a tiny NeMo model whose arithmetic transformers has as Nemotron."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from porttool.testing import TransformersConformance

if TYPE_CHECKING:
    from torch import Tensor

NAMES = {
    "model.embed_tokens": "embedding.word_embeddings",
    "model.layers": "encoder.layers",
    "model.norm": "encoder.final_layernorm",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
    "lm_head": "output_layer",
}
"""Nemotron's names → NeMo's, each as a part of the whole."""


class NemoConformance(TransformersConformance):
    """An unpacked archive: layernorm1p, half-rotary grouped attention, squared ReLU."""

    family = "gpt_next"
    architecture = "NemotronForCausalLM"
    config_file = "model_config.yaml"  # every JSON is YAML
    sizes: ClassVar = {
        "vocab_size": 56, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
        "norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip

    def write_layout(self, path: Path, model: Any) -> None:
        """Write the YAML and one rank's weights."""
        import torch

        path.mkdir()
        (path / self.config_file).write_text(json.dumps({
            "max_position_embeddings": 32, "num_layers": 2, "hidden_size": 32,
            "ffn_hidden_size": 40, "num_attention_heads": 4, "num_query_groups": 2, "bias": False,
            "normalization": "layernorm1p", "layernorm_epsilon": 1e-5, "activation": "squared-relu",
            "position_embedding_type": "rope", "rotary_percentage": 0.5,
            "share_embeddings_and_output_weights": False,
        }))  # fmt: skip
        torch.save(nemo_tensors(model), path / "model_weights.ckpt")


def nemo_tensors(model: Any) -> dict[str, Tensor]:
    """Return Nemotron's tensors under NeMo's names; a key head's queries, key, value lie together.

    Both call the norms alike, and both store their weights minus one.
    """
    import torch

    found, groups = {}, model.config.num_key_value_heads
    for name, tensor in model.state_dict().items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        found[f"model.language_model.{name}"] = tensor
    for query in [name for name in found if "q_proj" in name]:
        parts = [found.pop(query.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        fused = torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)
        found[query.replace("self_attn.q_proj", "self_attention.query_key_value")] = fused
    return found
