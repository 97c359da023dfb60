"""Tensor parallelism in one process: every rank of a checkpoint, and sums for reductions."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from porttool.builder import Rank
from porttool.checkpoint import Checkpoint
from porttool.sharding import rank_config, shard

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.nn import Decoder


def load_rank(checkpoint: Checkpoint, rank: Rank) -> Decoder:
    """Build the decoder of one tensor-parallel rank in float64 from its slices of a checkpoint."""
    import torch

    from porttool.nn import meta_decoder

    module = meta_decoder(rank_config(checkpoint.config, rank.world_size))
    weights = {}
    for name in checkpoint.names():
        file = checkpoint.file_of(name)
        rows = partial(file.load_rows, name)
        part = shard(name, checkpoint.config, rank, rows, file.infos()[name].shape[0])
        weights[name] = part.to(torch.float64)
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)


def parallel_logits(checkpoint: Checkpoint, world_size: int, ids: list[int]) -> Tensor:
    """Logits [len(ids), vocab_size] of `world_size` ranks whose partial results are summed here.

    Sums stand where real ranks reduce: after the embedding, the attention and the MLP of every
    layer (Shoeybi et al. 2019, section 3); the bias of a row-parallel projection counts once.
    """
    import torch

    from porttool.nn import Step

    ranks = [load_rank(checkpoint, Rank(i, world_size)) for i in range(world_size)]
    first, again = ranks[0], world_size - 1
    step = Step.prefill([ids])
    positions = step.positions  # [1, width]
    x = embedded(ranks, step.tokens)  # [1, width, d_model]
    if checkpoint.config.position == "learned":
        x = x + first.position(positions)
    for i in range(checkpoint.config.n_layer):
        layers: list[Any] = [rank.layers[i] for rank in ranks]
        normed = layers[0].norm1(x)
        parts = [layer.attention(normed, positions, None, step) for layer in layers]
        x = x + sum(parts) - again * bias_of(layers[0].attention.out)
        normed = layers[0].norm2(x)
        x = x + sum(layer.mlp(normed) for layer in layers) - again * bias_of(layers[0].mlp.down)
    parts = [rank.logits(first.norm(x)) for rank in ranks]
    return torch.cat(parts, -1)[0, :, : checkpoint.config.vocab_size]


def embedded(ranks: list[Decoder], tokens: Tensor) -> Tensor:
    """Sum each rank's embeddings [1, width, d_model] of the tokens whose rows it holds."""
    import torch

    rows = ranks[0].config.vocab_size
    total = torch.zeros(())
    for index, rank in enumerate(ranks):
        mine = (tokens // rows == index)[..., None]
        total = total + rank.embedding(tokens % rows) * mine
    return total


def bias_of(linear: Any) -> Any:
    """Return a projection's bias, or zero if it has none."""
    return 0 if linear.bias is None else linear.bias
