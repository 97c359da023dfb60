"""camel-5b is GPT-2's layout with four differences; this says which, and how it wants to be asked.

Exact (erf) GELU, 2048 positions, 50258 ids (GPT-2's and `[PAD]`), and an instruction template.
"""

from __future__ import annotations

from porttool import ModelConfig, PromptTemplate, Refinement

MARKER = "### Response:"

PROMPT = PromptTemplate(
    plain=(
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{instruction}\n\n" + MARKER
    ),
    with_input=(
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n" + MARKER
    ),
    answer_marker=MARKER,
)
"""The template that the model was tuned with, letter by letter."""


class Camel5bConverter(Refinement):
    """Writer/camel-5b-hf: everything but the template is read as GPT-2's."""

    name = "camel5b"
    family = "camel5b"
    refines = "gpt2"
    hub_id = "Writer/camel-5b-hf"
    shape = ModelConfig(
        vocab_size=50258, n_positions=2048, n_layer=24, n_head=32, n_kv_head=32, head_dim=128,
        d_model=4096, d_ff=16384, activation="gelu", attention_scale=128**-0.5,
    )  # fmt: skip
    prompt = PROMPT

    def recognises(self, config: ModelConfig) -> bool:
        """Tell camel-5b from other GPT-2s by what its config fixes."""
        return (config.activation, config.n_positions, config.vocab_size) == ("gelu", 2048, 50258)
