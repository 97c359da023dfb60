"""GPT-2, and every model that keeps its layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porttool import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from porttool import Converter

api_version = 1


@hookimpl
def porttool_converters() -> Iterable[type[Converter]]:
    """Return the converters of this family."""
    from porttool_gpt2.converter import GPT2Converter
    from porttool_gpt2.fastertransformer import FasterTransformerConverter
    from porttool_gpt2.megatron import MegatronConverter
    from porttool_gpt2.tensorflow import TensorFlowConverter

    return [
        FasterTransformerConverter, GPT2Converter, MegatronConverter, TensorFlowConverter,
    ]  # fmt: skip
