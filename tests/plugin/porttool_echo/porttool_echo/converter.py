"""The family: GPT-2s of one layer with one head, which this plugin claims before gpt2 does."""

from __future__ import annotations

from porttool import ModelConfig, PromptTemplate, Refinement


class EchoConverter(Refinement):
    """Reads what gpt2 reads, and gives it a template."""

    name = "echo"
    family = "echo"
    refines = "gpt2"
    prompt = PromptTemplate(
        plain="Say: {instruction}", with_input="Say: {instruction} {input}", answer_marker="Say:"
    )

    def recognises(self, config: ModelConfig) -> bool:
        """Tell the family by its one layer and one head."""
        return (config.n_layer, config.n_head) == (1, 1)
