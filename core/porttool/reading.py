"""Everything that a converter may need beyond the names in `porttool`, each from its home.

Families import from here, from `porttool` and from `porttool.testing`, and from nowhere else; what
lies behind these names may move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from porttool.component import Options, PathOption
from porttool.config import InfillTokens, Norm, Position, SpecialTokens
from porttool.converter import validated
from porttool.errors import SourceError
from porttool.fastertransformer import open_folder
from porttool.gpt2_layout import (
    GATED,
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
from porttool.weights import TensorSource, as_is, concat, identity_rules, interleaved_qkv, listing

if TYPE_CHECKING:
    from porttool.weights import Via as Via

__all__ = [
    "CONFIG", "GATED", "WEIGHTS", "Archive", "InfillTokens", "NemoModel", "Norm", "Options",
    "PathOption", "Position", "Progress", "Renamed", "SourceError", "SpecialTokens",
    "TableConverter", "TensorBundle", "TensorSource", "accounted_keys", "as_is",
    "check_special_ids", "concat", "find_bundle", "flatten", "fused_order", "gpt2_config",
    "gpt2_weight_map", "identity_rules", "interleaved_qkv", "is_gzip", "is_megatron", "listing",
    "load_bytes", "locate_model", "megatron_weight_map", "only_tensors", "open_folder",
    "open_megatron", "open_weight_file", "openai_name", "read_config", "read_gpt2_config",
    "read_json", "read_megatron_config", "read_nemo_config", "read_npy", "renamed_files",
    "special_ids", "special_tokens", "squeezed", "tunes_prompts", "unpacked", "validated",
]  # fmt: skip
