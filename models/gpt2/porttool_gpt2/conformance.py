"""GPT-2's conformance case: a tiny GPT2LMHeadModel as transformers saves it."""

from typing import ClassVar

from porttool.testing import TransformersConformance


class GPT2Conformance(TransformersConformance):
    """Three layers of four heads, tied head, tanh GELU."""

    family = "gpt2"
    architecture = "GPT2LMHeadModel"
    sizes: ClassVar = {
        "vocab_size": 67, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 4,
        "bos_token_id": 66, "eos_token_id": 66,
    }  # fmt: skip
