"""SantaCoder's and GPTBigCode's conformance cases, both against transformers' GPTBigCode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porttool.testing import FamilyConformance, redraw, transformers_logits

if TYPE_CHECKING:
    from torch import Tensor

SIZES = {
    "vocab_size": 67, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "activation_function": "gelu_pytorch_tanh",
}  # fmt: skip


def tiny_bigcode(seed: int) -> Any:
    """Return a redrawn GPTBigCode with one key and value head."""
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    return redraw(GPTBigCodeForCausalLM(GPTBigCodeConfig(**SIZES)), seed)


class BigCodeConformance(FamilyConformance):
    """GPTBigCode as transformers saves it."""

    family = "santacoder"

    def write_source(self, path: Path, seed: int) -> None:
        """Write a Hugging Face folder."""
        tiny_bigcode(seed).save_pretrained(path)


class SantaCoderConformance(FamilyConformance):
    """SantaCoder as it was published: [in, out] matrices, the query apart from key and value."""

    family = "santacoder"

    def write_source(self, path: Path, seed: int) -> None:
        """Write the weights twice: as published, and beside it as transformers can read them."""
        from safetensors.torch import save_file

        model = tiny_bigcode(seed)
        model.save_pretrained(path.with_name("reference"))
        path.mkdir()
        kind = {"model_type": "gpt2", "attention_head_type": "multiquery"}
        (path / "config.json").write_text(json.dumps({**SIZES, **kind}))
        save_file(published(model), path / "model.safetensors")

    def reference_logits(self, path: Path, ids: list[int]) -> Tensor:
        """Ask transformers about the same weights."""
        return transformers_logits(path.with_name("reference"), ids)


def published(model: Any) -> dict[str, Tensor]:
    """Return GPTBigCode's tensors under the names and in the shapes of SantaCoder."""
    found = {}
    for name, tensor in model.state_dict().items():
        turned = tensor.t() if tensor.dim() == 2 and ".h." in name else tensor
        if ".c_attn." in name:
            query, rest = turned.tensor_split([model.config.n_embd], dim=-1)
            found[name.replace("c_attn", "q_attn")] = query.contiguous()
            found[name.replace("c_attn", "kv_attn")] = rest.contiguous()
        elif name != "lm_head.weight":
            found[name] = turned.contiguous()
    return found
