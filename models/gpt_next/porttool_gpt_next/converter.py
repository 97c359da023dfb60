"""NeMo's GPT models: GPT-2B-001 (GPT-Next) and every variant of the same decoder.

The YAML says what the tensors mean; they are joined over ranks and renamed by core.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from porttool import Activation, Converter, ModelConfig, Source, SourceConfig, WeightMap, take
from porttool.reading import (
    CONFIG,
    NemoFiles,
    Norm,
    Position,
    Progress,
    SourceError,
    accounted_keys,
    as_is,
    concat,
    identity_rules,
    interleaved_qkv,
    is_gzip,
    join_ranks,
    locate_model,
    read_nemo_config,
    read_tokenizer,
    special_tokens,
    unpacked,
    validated,
)

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.reading import TensorSource, Via

ACTIVATIONS: dict[str, tuple[Activation, bool]] = {
    "gelu": ("gelu", False),
    "squared-relu": ("relu2", False),
    "geglu": ("gelu", True),
    "reglu": ("relu", True),
    "swiglu": ("silu", True),
    "fast-geglu": ("gelu", True),
    "fast-reglu": ("relu", True),
    "fast-swiglu": ("silu", True),
}
"""Name in the YAML → what is computed, and whether it gates a second projection."""

NORMS: dict[str, Norm] = {
    "layernorm": "layernorm", "layernorm1p": "layernorm1p", "rmsnorm": "rmsnorm",
}  # fmt: skip
POSITIONS: dict[str, Position] = {"learned_absolute": "learned", "rope": "rotary"}
UNUSED = ("*_extra_state", "*rotary_pos_emb.inv_freq")
"""State of kernels, and the rotary frequencies, which follow from the config."""


class NemoConverter(Converter):
    """A `.nemo` archive, or the folder that one was unpacked to."""

    name = "gpt_next"
    family = "gpt_next"
    source_format = "NeMo archive"
    hub_id = "nvidia/GPT-2B-001"

    def matches(self, source: Path) -> bool:
        """Tell a language model from NeMo's other archives by its YAML.

        A damaged archive is this family's by its name, so that reading it says what is wrong.
        """
        source = locate_model(source)
        try:
            values = read_nemo_config(source)
        except SourceError:
            return source.suffix == ".nemo" and source.exists()
        return "num_layers" in values and "virtual_prompt_style" not in values

    def prepare(
        self, source: Path, scratch: Path, progress: Progress
    ) -> AbstractContextManager[Path]:
        """Unpack a compressed archive, once; anything else is read in place."""
        archive = locate_model(source)
        if archive.is_file() and is_gzip(archive):
            return unpacked(archive, scratch, progress)
        return nullcontext(archive)

    def config(self, source: Path) -> ModelConfig:
        """Read the YAML, and the vocabulary from the tokenizer or the embedding."""
        return self.open(source).config

    def open(self, source: Path) -> Source:
        """Index every rank's tensors and hold the YAML to them."""
        source = locate_model(source)
        files = NemoFiles(source)
        config = SourceConfig(read_nemo_config(source), source / CONFIG)
        ranks = files.rank_files(
            config.integer("tensor_model_parallel_size", 1),
            config.integer("pipeline_model_parallel_size", 1),
        )
        parts = {place: files.tensors(name, UNUSED) for place, name in ranks.items()}
        two_matrices = any("dense_h_to_4h_2" in n for part in parts.values() for n in part.infos())
        gated = read_activation(config)[1]
        legacy = config.flag("megatron_legacy", False)
        tensors = join_ranks(
            parts, up_blocks=2 if gated and not two_matrices else 1, qkv_blocks=3 if legacy else 1
        )
        tokenizer = read_tokenizer(files, config.take("tokenizer", {}))
        tokens, n_tokens = special_tokens(tokenizer)
        n_ids = vocabulary(tensors, n_tokens, source)
        model = validated(config.file, lambda: self.read_config(config, n_ids))
        return Source(
            config=model,
            tokens=tokens,
            tensors=tensors,
            tokenizer_data=tokenizer,
            weight_map=self.table(
                model, as_is if legacy else interleaved_qkv, two_matrices=two_matrices
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

    def weight_map(self, config: ModelConfig) -> WeightMap:
        """Return the table of a model stored as megatron-core stores it."""
        return self.table(config, interleaved_qkv, two_matrices=False)

    def table(self, config: ModelConfig, qkv: Via, *, two_matrices: bool) -> WeightMap:
        """Return the table; q | k | v may be in any order, a gate's halves in two matrices.

        A tied head may be stored once more, on the last pipeline stage.
        """
        rules = identity_rules(self.module(config).state_dict())
        for name in ("embedding.weight", "head.weight"):
            rules[name] = take(name, via=vocabulary_rows)
        for part in ("weight", "bias"):
            fused, up = (f"layers.{{i}}.{m}.{part}" for m in ("attention.qkv", "mlp.up"))
            rules[fused] = take(fused, via=qkv)
            if two_matrices:
                rules[up] = take(up, f"layers.{{i}}.mlp.linear.{part}", via=concat)
        copies = {"head.weight": "embedding.weight"} if config.tied_head else {}
        return WeightMap(rules, duplicates=copies)


def vocabulary_rows(config: ModelConfig, tensors: Sequence[Tensor]) -> Tensor:
    """Leave out the rows beyond the vocabulary; training padded it to divide evenly."""
    return tensors[0][: config.vocab_size]


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


def vocabulary(tensors: TensorSource, n_tokens: int | None, source: Path) -> int:
    """Return the number of ids: the tokenizer's if it is known, else the padded embedding's."""
    info = tensors.infos().get("embedding.weight")
    if info is None or not info.shape:
        raise SourceError(f"{source}: no tensor is called embedding.word_embeddings.weight")
    if n_tokens is not None and n_tokens > info.shape[0]:
        raise SourceError(
            f"{source}: the tokenizer has {n_tokens} ids, but the embedding in {info.file} only "
            f"{info.shape[0]} rows; they do not belong together"
        )
    return n_tokens or info.shape[0]
