"""A checkpoint as a folder that transformers runs: for tools that want one, and for the proof.

A source that transformers cannot run (TensorFlow, Megatron-LM, NeMo, FasterTransformer) has nothing
that `verify` and `summarize` could set an engine beside. The folder has the weights as porttool
read them; what transformers computes of them is its own.
"""

from porttool.huggingface_export.writing import MARK, export

__all__ = ["MARK", "export"]
