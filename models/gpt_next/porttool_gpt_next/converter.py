"""NeMo's GPT models: GPT-2B-001 (GPT-Next) and every variant of the same decoder.

The YAML says what the tensors mean; they are joined over ranks and renamed by core.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from porttool import Activation, Converter, ModelConfig, Source, SourceConfig
from porttool.reading import (
    GATED,
    NemoModel,
    Norm,
    Position,
    Progress,
    SourceError,
    accounted_keys,
    is_gzip,
    locate_model,
    megatron_weight_map,
    read_nemo_config,
    tunes_prompts,
    unpacked,
    validated,
)

ACTIVATIONS: dict[str, tuple[Activation, bool]] = {
    "gelu": ("gelu", False),
    "squared-relu": ("relu2", False),
    **{name: (gate, True) for name, gate in GATED.items()},
}
"""Name in the YAML → what is computed, and whether it gates a second projection."""

NORMS: dict[str, Norm] = {
    "layernorm": "layernorm", "layernorm1p": "layernorm1p", "rmsnorm": "rmsnorm",
}  # fmt: skip
POSITIONS: dict[str, Position] = {"learned_absolute": "learned", "rope": "rotary"}


class NemoConverter(Converter):
    """A `.nemo` archive, or the folder that one was unpacked to."""

    name = "gpt_next"
    family = "gpt_next"
    source_format = "NeMo archive"
    hub_id = "nvidia/GPT-2B-001"
    shape = ModelConfig(
        vocab_size=256000, n_positions=4096, n_layer=24, n_head=16, n_kv_head=16, head_dim=128,
        d_model=2048, d_ff=5440, activation="silu", gated=True, norm="layernorm1p",
        position="rotary", rotary_fraction=0.5, attention_scale=128**-0.5, qkv_bias=False,
        out_bias=False, mlp_bias=False, tied_head=False,
    )  # fmt: skip

    def matches(self, source: Path) -> bool:
        """Tell a language model from NeMo's other archives by its YAML.

        A damaged archive is this family's by its name, so that reading it says what is wrong.
        """
        source = locate_model(source)
        try:
            values = read_nemo_config(source)
        except SourceError:
            return source.suffix == ".nemo" and source.exists()
        return "num_layers" in values and not tunes_prompts(values)

    def prepare(
        self, source: Path, scratch: Path, progress: Progress
    ) -> AbstractContextManager[Path]:
        """Unpack a compressed archive, once; anything else is read in place."""
        archive = locate_model(source)
        if archive.is_file() and is_gzip(archive):
            return unpacked(archive, scratch, progress)
        return nullcontext(archive)

    def open(self, source: Path) -> Source:
        """Index every rank's tensors and hold the YAML to them."""
        nemo = NemoModel(source)
        _, gated = read_activation(nemo.config)
        tensors = nemo.join(gated=gated)
        n_ids = nemo.count_ids(tensors)
        model = validated(nemo.config.file, lambda: self.read_config(nemo.config, n_ids))
        return Source(
            config=model,
            tokens=nemo.tokens,
            tensors=tensors,
            tokenizer_data=nemo.tokenizer,
            weight_map=megatron_weight_map(
                model, qkv=nemo.fused_order, two_matrices=nemo.two_matrices
            ),
        )

    def read_config(self, config: SourceConfig, vocab_size: int) -> ModelConfig:
        """Read every key that changes the arithmetic; a key that nothing knows is refused."""
        config.ignore(*accounted_keys(config.values, str(config.file)))
        d_model = config.integer("hidden_size")
        n_head = config.integer("num_attention_heads")
        head_dim = config.integer("kv_channels", max(1, d_model // n_head))
        norm = read_norm(config)
        bias = config.flag("bias", True)
        activation, gated = read_activation(config)
        model = ModelConfig(
            vocab_size=vocab_size,
            n_positions=config.integer("max_position_embeddings"),
            n_layer=config.integer("num_layers"),
            n_head=n_head,
            n_kv_head=config.integer("num_query_groups", n_head),
            head_dim=head_dim,
            d_model=d_model,
            d_ff=config.integer("ffn_hidden_size", 4 * d_model),
            activation=activation,
            gated=gated,
            norm=norm,
            norm_eps=config.number("layernorm_epsilon", 1e-5),
            norm_bias=norm != "rmsnorm",
            position=config.one_of("position_embedding_type", POSITIONS, "learned_absolute"),
            rotary_fraction=config.number("rotary_percentage", 1.0),
            rotary_base=config.number("rotary_base", 10000.0),
            attention_scale=head_dim**-0.5,
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=bias,
            tied_head=config.flag("share_embeddings_and_output_weights", True),
        )
        config.finish()
        return model


def read_norm(config: SourceConfig) -> Norm:
    """Return the kind of norm; a zero-centred weight is layernorm1p by another name."""
    norm = config.one_of("normalization", NORMS, "layernorm")
    if not config.flag("layernorm_zero_centered_gamma", norm == "layernorm1p"):
        return norm
    if norm == "rmsnorm":
        raise SourceError(f"{config.file}: porttool has no rmsnorm with a zero-centred weight")
    return "layernorm1p"


def read_activation(config: SourceConfig) -> tuple[Activation, bool]:
    """Return what is computed and whether it gates.

    NeMo's fused kernel, on unless the YAML says otherwise, computes GELU in its tanh form, and
    `openai_gelu` asks for that form too; without both GELU is exact.
    """
    activation, gated = config.one_of("activation", ACTIVATIONS, "gelu")
    fused = config.flag("bias_activation_fusion", config.flag("bias_gelu_fusion", True))
    openai = config.flag("openai_gelu", False)
    if activation == "gelu":
        return ("gelu_tanh" if fused or openai else "gelu"), gated
    if openai:
        raise SourceError(f"{config.file}: 'openai_gelu' contradicts the activation")
    return activation, gated
