"""Megatron-LM's GPT: its arguments, its shapes, and how its versions order the fused projection.

Rows of query_key_value, by checkpoint version: 0 has queries | keys | values of a rank; 1 has
[head, head_dim, 3]; from 2 on it is [head, 3, head_dim].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from porttool.config import Activation, ModelConfig
from porttool.converter import validated
from porttool.errors import SourceError, UntoldError
from porttool.huggingface import SourceConfig
from porttool.sources.megatron import MegatronCheckpoint
from porttool.weights import WeightMap, as_is, concat, identity_rules, interleaved_qkv, take

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.weights import Via

ONLY = {
    "position_embedding_type": "learned_absolute", "normalization": "LayerNorm", "swiglu": False,
    "squared_relu": False, "apply_residual_connection_post_layernorm": False, "num_experts": None,
    "add_bias_linear": True, "apply_layernorm_1p": False, "use_rotary_position_embeddings": False,
    "add_position_embedding": True, "multi_latent_attention": False, "quick_geglu": False,
    "window_size": None, "softmax_type": "vanilla", "heterogeneous_layers_config_path": None,
    "heterogeneous_layers_config_encoded_json": None,
}  # fmt: skip
"""Training arguments that make another model unless they have this value or are absent."""


def read_megatron_config(
    found: MegatronCheckpoint, *, n_head: int | None, vocab_size: int | None
) -> ModelConfig:
    """Read the sizes from the tensors and the rest from the arguments, if the file has them.

    `n_head` is needed where it has none; `vocab_size` always, for the embedding is padded. Raises
    UntoldError where one is missing, SourceError where arguments and tensors disagree.
    """
    given = {name: value for name, value in (found.args or {}).items() if value is not None}
    args = SourceConfig(given, found.file)  # an argument that was not given is None
    if wrong := {k: args.take(k, v) for k, v in ONLY.items() if args.take(k, v) != v}:
        raise SourceError(f"{found.file}: not of GPT-2's shape: it was trained with {wrong}")
    shapes = {name: info.shape for name, info in found.tensors.infos().items()}
    check_layers(found, args, shapes)
    n_head = choose_heads(found, args, n_head)
    rows, d_model = shapes["embedding.weight"]
    known: dict[str, Any] = {
        "n_positions": shapes["position.weight"][0],
        "n_layer": count_layers(shapes),
        "d_model": d_model,
        "d_ff": shapes["layers.0.mlp.up.weight"][0],
        "activation": activation(args),
        "norm_eps": args.number("norm_epsilon", args.number("layernorm_epsilon", 1e-5)),
        "tied_head": not args.flag("untie_embeddings_and_output_weights", False),
    }
    check_told(found, rows, d_model, n_head, vocab_size)
    known |= {k: v for k, v in {"n_head": n_head, "vocab_size": vocab_size}.items() if v}
    if n_head is None or vocab_size is None:
        untold = ["how many heads it has; give --n-head (16 for the 345M model)"] * (not n_head)
        untold += [
            f"how many ids there are, for the embedding's {rows} rows are padded; give "
            "--vocab-size (50257 for GPT-2's), or the tokenizer's folder with --set tokenizer DIR"
        ] * (not vocab_size)
        said = "; nor ".join(untold)
        raise UntoldError(f"{found.file}: does not say {said}", found.tensors, known)
    head_dim = d_model // n_head
    return validated(found.file, lambda: ModelConfig(
        n_kv_head=(shapes["layers.0.attention.qkv.weight"][0] // head_dim - n_head) // 2,
        head_dim=head_dim,
        attention_scale=head_dim**-0.5,
        **known,
    ))  # fmt: skip


def check_told(
    found: MegatronCheckpoint, rows: int, d_model: int, n_head: int | None, vocab_size: int | None
) -> None:
    """Refuse what was told and cannot be of the embedding [rows, d_model]."""
    if vocab_size and vocab_size > rows:
        raise SourceError(
            f"{found.file}: the embedding has {rows} rows, fewer than the {vocab_size} ids of "
            "--vocab-size or of the tokenizer; they belong to different models"
        )
    if n_head and d_model % n_head:
        raise SourceError(f"{found.file}: its width {d_model} is not a multiple of {n_head} heads")


def check_layers(
    found: MegatronCheckpoint, args: SourceConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a checkpoint without the tensors that tell its sizes, or with ranks missing.

    The oldest files do not say how many ranks there were; their tensors do, put together.
    """
    for name in ("embedding.weight", "position.weight", "layers.0.attention.qkv.weight",
                 "layers.0.attention.out.weight", "layers.0.mlp.up.weight"):  # fmt: skip
        if len(shapes.get(name, ())) != 2:
            raise SourceError(f"{found.file}: there is no {name} in it; not a GPT of Megatron-LM")
    n_layer = count_layers(shapes)
    if args.integer("num_layers", n_layer) != n_layer:
        raise SourceError(
            f"{found.file}: its arguments say {args.integer('num_layers')} layers, the files hold "
            f"{n_layer}; a pipeline stage is missing, or of another checkpoint"
        )
    if "norm.weight" not in shapes:
        raise SourceError(
            f"{found.file}: the norm after the last layer is in none of the files; the last "
            "pipeline stage is missing, fetch it"
        )
    width, columns = shapes["layers.0.attention.out.weight"]
    if columns != width:
        raise SourceError(
            f"{found.file}: the files hold {columns} of the {width} columns of "
            "layers.0.attention.out.weight; a tensor-parallel rank is missing, fetch all of them"
        )


def count_layers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the number of layers among the tensors."""
    return sum(name.endswith("attention.qkv.weight") for name in shapes)


def choose_heads(found: MegatronCheckpoint, args: SourceConfig, asked: int | None) -> int | None:
    """Return the number of heads that the arguments or the user say; they may not disagree."""
    known = args.take("num_attention_heads", None) is not None
    stored = args.integer("num_attention_heads") if known else None
    if None not in (asked, stored) and asked != stored:
        raise SourceError(f"{found.file}: has {stored} heads, not the {asked} of --n-head")
    return asked or stored


def activation(args: SourceConfig) -> Activation:
    """Return what was trained: fused and OpenAI's GELU are the tanh form, torch's is exact."""
    tanh = (
        not args.values or args.flag("bias_gelu_fusion", False) or args.flag("openai_gelu", False)
    )
    return "gelu_tanh" if tanh else "gelu"


def fused_order(version: float) -> Via:
    """Return what turns the rows of a checkpoint version's fused projection into q | k | v."""
    return as_is if version < 1 else columns_first if version < 2 else interleaved_qkv


def megatron_weight_map(
    config: ModelConfig, *, qkv: Via = interleaved_qkv, two_matrices: bool = False
) -> WeightMap:
    """Return the table of tensors that have canonical names, but are stored as Megatron does.

    `qkv` orders the fused projection's rows; with `two_matrices` a gate's halves lie apart. A tied
    head may be stored once more, on the last pipeline stage.
    """
    from porttool.nn import canonical_shapes

    rules = identity_rules(canonical_shapes(config))
    for name in {"embedding.weight", "head.weight"} & rules.keys():
        rules[name] = take(name, via=unpadded)
    for part in ("weight", "bias"):
        fused, up = (f"layers.{{i}}.{module}.{part}" for module in ("attention.qkv", "mlp.up"))
        rules[fused] = take(fused, via=qkv)
        if two_matrices:
            rules[up] = take(up, f"layers.{{i}}.mlp.linear.{part}", via=concat)
    return WeightMap(
        rules, duplicates={"head.weight": "embedding.weight"} if config.tied_head else {}
    )


def columns_first(config: ModelConfig, tensors: Sequence[Tensor]) -> Tensor:
    """Turn rows ordered [head, head_dim, 3] into q | k | v."""
    whole = tensors[0].reshape(config.n_head, config.head_dim, 3, *tensors[0].shape[1:])
    return whole.movedim(2, 0).flatten(0, 2)


def unpadded(config: ModelConfig, tensors: Sequence[Tensor]) -> Tensor:
    """Take the rows of ids that exist; training padded the others to divide evenly."""
    return tensors[0][: config.vocab_size]
