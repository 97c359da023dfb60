"""SantaCoder's and GPTBigCode's conformance cases, both against transformers' GPTBigCode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from porttool.testing import TransformersConformance

if TYPE_CHECKING:
    from torch import Tensor


class BigCodeConformance(TransformersConformance):
    """GPTBigCode as transformers saves it, with one key and value head."""

    family = "santacoder"
    architecture = "GPTBigCodeForCausalLM"
    sizes: ClassVar = {
        "vocab_size": 67, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
        "activation_function": "gelu_pytorch_tanh",
    }  # fmt: skip


class StarCoderConformance(BigCodeConformance):
    """The same with StarCoder's positions and the exact GELU of the 7B and 15B."""

    family = "starcoder"
    sizes: ClassVar = {
        **BigCodeConformance.sizes, "n_positions": 8192, "activation_function": "gelu",
    }  # fmt: skip


class SantaCoderConformance(BigCodeConformance):
    """SantaCoder as it was published: [in, out] matrices, the query apart from key and value."""

    def write_layout(self, path: Path, model: Any) -> None:
        """Write a folder of the type gpt2 with the key that only SantaCoder has."""
        from safetensors.torch import save_file

        path.mkdir()
        kind = {"model_type": "gpt2", "attention_head_type": "multiquery"}
        (path / "config.json").write_text(json.dumps({**self.sizes, **kind}))
        save_file(published(model), path / "model.safetensors")


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
