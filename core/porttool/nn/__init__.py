"""The canonical decoder in plain torch: the arithmetic that every engine is held against."""

from porttool.nn.cache import KVCache
from porttool.nn.decoder import Decoder, Step, meta_decoder, require_shapes

__all__ = ["Decoder", "KVCache", "Step", "meta_decoder", "require_shapes"]
