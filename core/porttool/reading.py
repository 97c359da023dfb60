"""Everything that a converter may need beyond the names in `porttool`, each from its home.

Families import from here, from `porttool` and from `porttool.testing`, and from nowhere else; what
lies behind these names may move.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from porttool.component import Options, PathOption
    from porttool.config import InfillTokens, Norm, Position, SpecialTokens
    from porttool.converter import validated
    from porttool.errors import SourceError
    from porttool.fastertransformer import open_folder
    from porttool.gpt2_layout import (
        gpt2_config,
        gpt2_weight_map,
        openai_name,
        read_gpt2_config,
        squeezed,
    )
    from porttool.huggingface import check_special_ids, open_weight_file, read_config, special_ids
    from porttool.megatron_layout import fused_order, megatron_weight_map, read_megatron_config
    from porttool.nemo_layout import NemoModel
    from porttool.progress import Progress
    from porttool.prompt_table import TableConverter
    from porttool.sources.archive import Archive, is_gzip, unpacked
    from porttool.sources.json_file import read_json
    from porttool.sources.megatron import flatten, is_megatron, open_megatron
    from porttool.sources.nemo import CONFIG, WEIGHTS, locate_model, read_nemo_config, tunes_prompts
    from porttool.sources.nemo_keys import accounted_keys
    from porttool.sources.npy_file import read_npy
    from porttool.sources.ranks import Renamed
    from porttool.sources.tf_bundle import TensorBundle, find_bundle
    from porttool.sources.tokenizer_files import renamed_files, special_tokens
    from porttool.sources.torch_file import load_bytes, only_tensors
    from porttool.weights import (
        TensorSource,
        as_is,
        concat,
        identity_rules,
        interleaved_qkv,
        listing,
    )
    from porttool.weights import (
        Via as Via,
    )

_HOMES = {
    "Archive": "sources.archive",
    "CONFIG": "sources.nemo",
    "InfillTokens": "config",
    "NemoModel": "nemo_layout",
    "Norm": "config",
    "Options": "component",
    "PathOption": "component",
    "Position": "config",
    "Progress": "progress",
    "Renamed": "sources.ranks",
    "SourceError": "errors",
    "SpecialTokens": "config",
    "TableConverter": "prompt_table",
    "TensorBundle": "sources.tf_bundle",
    "TensorSource": "weights",
    "WEIGHTS": "sources.nemo",
    "accounted_keys": "sources.nemo_keys",
    "as_is": "weights",
    "check_special_ids": "huggingface",
    "concat": "weights",
    "find_bundle": "sources.tf_bundle",
    "flatten": "sources.megatron",
    "fused_order": "megatron_layout",
    "gpt2_config": "gpt2_layout",
    "gpt2_weight_map": "gpt2_layout",
    "identity_rules": "weights",
    "interleaved_qkv": "weights",
    "is_gzip": "sources.archive",
    "is_megatron": "sources.megatron",
    "listing": "weights",
    "load_bytes": "sources.torch_file",
    "locate_model": "sources.nemo",
    "megatron_weight_map": "megatron_layout",
    "only_tensors": "sources.torch_file",
    "open_folder": "fastertransformer",
    "open_megatron": "sources.megatron",
    "open_weight_file": "huggingface",
    "openai_name": "gpt2_layout",
    "read_config": "huggingface",
    "read_gpt2_config": "gpt2_layout",
    "read_json": "sources.json_file",
    "read_megatron_config": "megatron_layout",
    "read_nemo_config": "sources.nemo",
    "read_npy": "sources.npy_file",
    "renamed_files": "sources.tokenizer_files",
    "special_ids": "huggingface",
    "special_tokens": "sources.tokenizer_files",
    "squeezed": "gpt2_layout",
    "tunes_prompts": "sources.nemo",
    "unpacked": "sources.archive",
    "validated": "converter",
}

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Archive",
    "InfillTokens",
    "NemoModel",
    "Norm",
    "Options",
    "PathOption",
    "Position",
    "Progress",
    "Renamed",
    "SourceError",
    "SpecialTokens",
    "TableConverter",
    "TensorBundle",
    "TensorSource",
    "accounted_keys",
    "as_is",
    "check_special_ids",
    "concat",
    "find_bundle",
    "flatten",
    "fused_order",
    "gpt2_config",
    "gpt2_weight_map",
    "identity_rules",
    "interleaved_qkv",
    "is_gzip",
    "is_megatron",
    "listing",
    "load_bytes",
    "locate_model",
    "megatron_weight_map",
    "only_tensors",
    "open_folder",
    "open_megatron",
    "open_weight_file",
    "openai_name",
    "read_config",
    "read_gpt2_config",
    "read_json",
    "read_megatron_config",
    "read_nemo_config",
    "read_npy",
    "renamed_files",
    "special_ids",
    "special_tokens",
    "squeezed",
    "tunes_prompts",
    "unpacked",
    "validated",
]


def __getattr__(name: str) -> Any:
    """Import a name from its home when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'porttool.reading' has no attribute {name!r}")
    return getattr(import_module(f"porttool.{_HOMES[name]}"), name)
