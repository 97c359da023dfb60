"""GPT-Next's conformance case: a tiny NeMo model whose arithmetic transformers has as Nemotron."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from porttool.testing import FamilyConformance, redraw, transformers_logits

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE = "reference"
"""Folder, beside a source, of the same weights as Nemotron."""

YAML = """\
max_position_embeddings: 32
num_layers: 2
hidden_size: 32
ffn_hidden_size: 40
num_attention_heads: 4
num_query_groups: 2
normalization: layernorm1p
layernorm_epsilon: 1.0e-05
bias: false
activation: squared-relu
position_embedding_type: rope
rotary_percentage: 0.5
share_embeddings_and_output_weights: false
"""

ENCODER = "model.language_model.encoder."
LINEARS = {
    "self_attn.o_proj": "self_attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}


class NemoConformance(FamilyConformance):
    """An unpacked archive: layernorm1p, half-rotary grouped attention, squared ReLU."""

    family = "gpt_next"

    def write_source(self, path: Path, seed: int) -> None:
        """Write the weights twice: as NeMo does, and beside it as transformers reads them."""
        import torch
        from transformers import NemotronConfig, NemotronForCausalLM

        config = NemotronConfig(
            vocab_size=56, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
            norm_eps=1e-5, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = redraw(NemotronForCausalLM(config), seed)
        model.save_pretrained(path.with_name(REFERENCE))
        path.mkdir()
        (path / "model_config.yaml").write_text(YAML)
        torch.save(nemo_tensors(model), path / "model_weights.ckpt")

    def reference_logits(self, path: Path, ids: list[int]) -> Tensor:
        """Ask transformers about the same weights."""
        return transformers_logits(path.with_name(REFERENCE), ids)

    def add_config_key(self, path: Path, key: str) -> None:
        """Add a line to the YAML."""
        file = path / "model_config.yaml"
        file.write_text(f"{file.read_text()}{key}: 1\n")


def nemo_tensors(model: Any) -> dict[str, Tensor]:
    """Return Nemotron's tensors under NeMo's names; each key head follows its queries."""
    import torch

    theirs: dict[str, Tensor] = model.state_dict()
    found = {
        "model.language_model.embedding.word_embeddings.weight": theirs[
            "model.embed_tokens.weight"
        ],
        "model.language_model.output_layer.weight": theirs["lm_head.weight"],
        f"{ENCODER}final_layernorm.weight": theirs["model.norm.weight"],
        f"{ENCODER}final_layernorm.bias": theirs["model.norm.bias"],
    }
    for i in range(model.config.num_hidden_layers):
        layer = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            for part in ("weight", "bias"):
                found[f"{ENCODER}layers.{i}.{norm}.{part}"] = theirs[f"{layer}{norm}.{part}"]
        for hugging, nemo in LINEARS.items():
            found[f"{ENCODER}layers.{i}.{nemo}.weight"] = theirs[f"{layer}{hugging}.weight"]
        groups = [
            theirs[f"{layer}self_attn.{name}_proj.weight"].unflatten(0, (2, -1)) for name in "qkv"
        ]  # [group, rows, d_model] each
        fused = torch.cat(groups, dim=1).flatten(0, 1)
        found[f"{ENCODER}layers.{i}.self_attention.query_key_value.weight"] = fused
    return found
