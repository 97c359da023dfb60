"""The canonical decoder in plain torch: the arithmetic that every engine is held against."""

from porttool.nn.cache import KVCache
from porttool.nn.decoder import (
    Decoder,
    Step,
    canonical_shapes,
    meta_decoder,
    n_parameters,
    randomise,
    require_shapes,
)

__all__ = [
    "Decoder",
    "KVCache",
    "Step",
    "canonical_shapes",
    "meta_decoder",
    "n_parameters",
    "randomise",
    "require_shapes",
]
