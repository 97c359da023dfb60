"""Megatron's names for a decoder's tensors, old and new, and how its ranks divide them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from porttool.sources.ranks import JoinedRanks, Renamed, ShardedTensors, Split, number_stages
from porttool.weights import TensorSource

MODULES = {
    "embedding.word_embeddings": "embedding",
    "embedding.position_embeddings": "position",
    "word_embeddings": "head",
    "output_layer": "head",
    "final_layernorm": "norm",
    "final_norm": "norm",
    "input_layernorm": "norm1",
    "input_norm": "norm1",
    "self_attention.linear_qkv.layer_norm": "norm1",
    "self_attention.query_key_value": "attention.qkv",
    "self_attention.linear_qkv": "attention.qkv",
    "self_attention.dense": "attention.out",
    "self_attention.linear_proj": "attention.out",
    "post_attention_layernorm": "norm2",
    "post_attention_norm": "norm2",
    "pre_mlp_layernorm": "norm2",
    "mlp.linear_fc1.layer_norm": "norm2",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_h_to_4h_2": "mlp.linear",
    "mlp.linear_fc1": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
    "mlp.linear_fc2": "mlp.down",
}
"""Module names → canonical ones. `mlp.linear` is the second matrix of a gate stored in two.

The last pipeline stage of a model with a tied head holds the embedding again as `word_embeddings`.
"""

ROWS = ("embedding", "head", "attention.qkv", "mlp.up", "mlp.linear")
COLUMNS = ("attention.out.weight", "mlp.down.weight")

_PREFIX = re.compile(
    r"^(model\.)?(module\.)?(language_model\.)?(encoder\.|decoder\.|transformer\.)?"
)
_PARTS = re.compile(r"^(layers\.\d+\.)?(.+)[._](weight|bias)$")


def canonical_name(name: str) -> str:
    """Return the canonical name of a tensor; one that is not known comes back as it is."""
    short = _PREFIX.sub("", name).replace(".attention.", ".self_attention.")
    parts = _PARTS.match(short)
    if parts is None or parts[2] not in MODULES:
        return name
    return f"{parts[1] or ''}{MODULES[parts[2]]}.{parts[3]}"


def join_ranks(
    parts: Mapping[tuple[int, int], TensorSource], *, up_blocks: int, qkv_blocks: int
) -> TensorSource:
    """Return the whole model's tensors, by canonical name, from those of every rank and stage.

    `up_blocks` is 2 where one matrix holds both halves of a gate, `qkv_blocks` 3 where it holds
    all queries before all keys.
    """
    blocks = {"mlp.up": up_blocks, "attention.qkv": qkv_blocks}

    def split_of(name: str) -> Split | None:
        module, _, _ = re.sub(r"^layers\.\d+\.", "", name).rpartition(".")
        if module in ROWS:
            return Split(0, blocks.get(module, 1))
        return Split(1) if name.endswith(COLUMNS) else None

    n_stages = 1 + max(stage for _, stage in parts)
    stages = [
        JoinedRanks(
            {f"rank {tp}": Renamed.by(part, canonical_name)
             for (tp, pp), part in sorted(parts.items()) if pp == stage},
            split_of,
        )
        for stage in range(n_stages)
    ]  # fmt: skip
    numbered = number_stages(stages)
    return ShardedTensors({f"stage {i}": stage for i, stage in enumerate(numbered)})
