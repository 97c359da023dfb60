"""GPT-2's conformance case: a tiny GPT2LMHeadModel as transformers saves it."""

from __future__ import annotations

from pathlib import Path

from porttool.testing import FamilyConformance, redraw


class GPT2Conformance(FamilyConformance):
    """Three layers of four heads, tied head, tanh GELU."""

    family = "gpt2"

    def write_source(self, path: Path, seed: int) -> None:
        """Write a Hugging Face folder."""
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=67, n_positions=32, n_embd=32, n_layer=3, n_head=4,
            bos_token_id=66, eos_token_id=66,
        )  # fmt: skip
        redraw(GPT2LMHeadModel(config), seed).save_pretrained(path)
