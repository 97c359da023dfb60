"""camel-5b's conformance case: what its config fixes, at a tiny width."""

from typing import ClassVar

from porttool.testing import TransformersConformance


class Camel5bConformance(TransformersConformance):
    """Exact GELU, 2048 positions, 50258 ids."""

    family = "camel5b"
    architecture = "GPT2LMHeadModel"
    sizes: ClassVar = {
        "vocab_size": 50258, "n_positions": 2048, "n_embd": 16, "n_layer": 2, "n_head": 4,
        "activation_function": "gelu", "bos_token_id": 50256, "eos_token_id": 50256,
    }  # fmt: skip
