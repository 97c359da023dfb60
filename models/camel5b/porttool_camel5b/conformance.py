"""camel-5b's conformance case: what its config fixes, at a tiny width."""

from __future__ import annotations

from pathlib import Path

from porttool.testing import FamilyConformance, redraw


class Camel5bConformance(FamilyConformance):
    """Exact GELU, 2048 positions, 50258 ids."""

    family = "camel5b"

    def write_source(self, path: Path, seed: int) -> None:
        """Write a Hugging Face folder."""
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=50258, n_positions=2048, n_embd=16, n_layer=2, n_head=4,
            activation_function="gelu", bos_token_id=50256, eos_token_id=50256,
        )  # fmt: skip
        redraw(GPT2LMHeadModel(config), seed).save_pretrained(path)
