"""Finding the modules of a reference that no rules name: by what their weights are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from porttool.config import ModelConfig
from porttool.evaluators.stages import Place, StageMap
from porttool.weights import as_is, concat, interleaved_qkv

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.evaluators.accounting import Derivation
    from porttool.weights import Via


def match_by_weights(derivation: Derivation, theirs: Iterator[tuple[str, Tensor]]) -> StageMap:
    """Find each canonical module of a source in a reference's named weights, in float32.

    What the source's config and rules make of its weights is looked for whole, turned, stored
    plus one, ordered by head, and in pieces. Weights that several modules share tell nothing.
    """
    known = index_weights(theirs, derivation.config)
    places = {}
    for name in derivation.shapes:
        module, _, kind = name.rpartition(".")
        if kind != "weight":
            continue
        place = find_place(derivation.tensor(name).float(), module, derivation.config, known)
        if place is not None:
            places[module] = place
    return StageMap(places)


def index_weights(theirs: Iterator[tuple[str, Tensor]], config: ModelConfig) -> Mapping[str, Place]:
    """Return every form of every weight, by its digest."""
    found: dict[str, Place] = {}
    seen: set[str] = set()
    for name, weight in theirs:
        for key, place in forms(name, weight.float(), config):
            found[key] = place
            if key in seen:
                del found[key]
            seen.add(key)
    return found


def forms(name: str, weight: Tensor, config: ModelConfig) -> Iterator[tuple[str, Place]]:
    """Yield a weight's digests: as it is, turned, and with rows that are ordered by head."""
    lays: dict[str, Via] = {digest(weight): as_is}
    if weight.ndim == 2:
        lays[digest(weight.t())] = as_is
        for matrix in (weight, weight.t()):
            if len(matrix) == config.qkv_dim:
                lays.setdefault(digest(interleaved_qkv(config, [matrix])), interleaved_qkv)
    for key, order in lays.items():
        yield key, Place((name,), order)


def find_place(
    weight: Tensor, module: str, config: ModelConfig, known: Mapping[str, Place]
) -> Place | None:
    """Look a canonical weight up, whole or in the pieces that others keep apart."""
    for whole in (weight, weight + 1) if weight.ndim == 1 else (weight,):
        if (place := known.get(digest(whole))) is not None:
            return place
    places = [known.get(digest(piece)) for piece in pieces(weight, module, config)]
    names = [place.names[0] for place in places if place is not None and place.order is as_is]
    return Place(tuple(names), concat) if names and len(names) == len(places) else None


def pieces(weight: Tensor, module: str, config: ModelConfig) -> tuple[Tensor, ...]:
    """Cut a fused projection into query, key and value, and a gated MLP's into its halves."""
    if module.endswith("attention.qkv"):
        return tuple(weight.split(config.qkv_rows))
    if module.endswith("mlp.up") and config.gated:
        return tuple(weight.chunk(2))
    return ()


def digest(tensor: Tensor) -> str:
    """Return a hash of a float32 tensor's shape and values."""
    data = hashlib.blake2b(str(tuple(tensor.shape)).encode())
    data.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return data.hexdigest()
