"""FasterTransformer's and early TensorRT-LLM's folders, read and written.

<tensor-parallel size>-gpu/
    config.ini                    sections [gpt] and, in ours, [porttool]
    model.wte.bin ...             raw little-endian arrays without a header
    model.layers.0.attention.query_key_value.weight.0.bin ...   one a rank
"""

from porttool.fastertransformer.config_file import CONFIG
from porttool.fastertransformer.reading import open_folder
from porttool.fastertransformer.writing import export, place_of

__all__ = ["CONFIG", "export", "open_folder", "place_of"]
