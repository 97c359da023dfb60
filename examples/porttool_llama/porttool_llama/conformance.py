"""The proof of Llama: tiny models as transformers saves them, compared with transformers."""

from pathlib import Path

from porttool.testing import FamilyConformance, redraw


class LlamaConformance(FamilyConformance):
    """Grouped keys and values, heads wider than d_model / n_head, a head of its own."""

    family = "llama"
    tied = False

    def write_source(self, path: Path, seed: int) -> None:
        """Write a Hugging Face folder."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=67, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=32,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0}, attention_bias=self.tied,
            mlp_bias=self.tied, tie_word_embeddings=self.tied,
        )  # fmt: skip
        redraw(LlamaForCausalLM(config), seed).save_pretrained(path)


class TiedLlamaConformance(LlamaConformance):
    """The same with biases and a tied head."""

    tied = True
