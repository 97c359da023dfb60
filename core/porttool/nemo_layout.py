"""NeMo's GPT models: what archive, ranks and tokenizer hold, before the YAML is understood."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from porttool.errors import SourceError
from porttool.huggingface import SourceConfig
from porttool.sources.megatron_names import join_ranks
from porttool.sources.nemo import CONFIG, NemoFiles, locate_model, read_nemo_config
from porttool.sources.tokenizer_files import special_tokens
from porttool.weights import as_is, interleaved_qkv

if TYPE_CHECKING:
    from porttool.weights import TensorSource, Via

UNUSED = ("*_extra_state", "*rotary_pos_emb.inv_freq")
"""State of kernels, and the rotary frequencies, which follow from the config."""

BPE_FILES = {"vocab_file": "vocab.json", "merge_file": "merges.txt"}
"""Keys of the YAML's tokenizer → the names that the files have elsewhere."""


class NemoModel:
    """An archive, or the folder that one was unpacked to, indexed: nothing is read of the weights.

    `config` is the YAML. `tokenizer` are the tokenizer's files by their usual names, and `tokens`
    the ids that they give a meaning. `two_matrices` says that a gate is stored in two.
    """

    def __init__(self, source: Path) -> None:
        self.path = locate_model(source)
        files = NemoFiles(self.path)
        self.config = SourceConfig(read_nemo_config(self.path), self.path / CONFIG)
        ranks = files.rank_files(
            self.config.integer("tensor_model_parallel_size", 1),
            self.config.integer("pipeline_model_parallel_size", 1),
        )
        self._ranks = {place: files.tensors(name, UNUSED) for place, name in ranks.items()}
        self.two_matrices = any(
            "dense_h_to_4h_2" in name for rank in self._ranks.values() for name in rank.infos()
        )
        self._legacy = self.config.flag("megatron_legacy", False)
        section = self.config.take("tokenizer", {})
        if not isinstance(section, dict):
            raise SourceError(f"{self.config.file}: 'tokenizer' should be a mapping")
        self.tokenizer = read_tokenizer(files, section)
        self.tokens, self._n_tokens = special_tokens(self.tokenizer)

    @property
    def fused_order(self) -> Via:
        """What brings the rows of the fused projection into the order q | k | v."""
        return as_is if self._legacy else interleaved_qkv

    def join(self, *, gated: bool) -> TensorSource:
        """Return the whole model's tensors under canonical names."""
        return join_ranks(
            self._ranks,
            up_blocks=2 if gated and not self.two_matrices else 1,
            qkv_blocks=3 if self._legacy else 1,
        )

    def count_ids(self, tensors: TensorSource) -> int:
        """Return the number of ids: the tokenizer's if there is one, else the padded embedding's.

        SourceError for a tokenizer with more ids than the embedding has rows.
        """
        info = tensors.infos().get("embedding.weight")
        if info is None and any(".adapter_layer." in name for name in tensors.infos()):
            raise SourceError(
                f"{self.path}: holds an adapter (LoRA or the like) and no model; merge the two in "
                "NeMo (merge_lora_weights/merge.py) and convert what that writes"
            )
        if info is None or not info.shape:
            raise SourceError(f"{self.path}: no tensor is called embedding.word_embeddings.weight")
        if self._n_tokens is not None and self._n_tokens > info.shape[0]:
            raise SourceError(
                f"{self.path}: the tokenizer has {self._n_tokens} ids, but the embedding in "
                f"{info.file} only {info.shape[0]} rows; they do not belong together"
            )
        return self._n_tokens or info.shape[0]


def read_tokenizer(files: NemoFiles, tokenizer: Mapping[str, object]) -> dict[str, bytes]:
    """Return a tokenizer's files, of sentencepiece or of byte pairs, under their usual names.

    A tokenizer that the YAML names by a hub id is not in the archive: then there is none.
    """
    model = files.artifact(tokenizer.get("model") or tokenizer.get("tokenizer_model"))
    if model is not None:
        return {"tokenizer.model": model}
    found = {new: files.artifact(tokenizer.get(key)) for key, new in BPE_FILES.items()}
    return {new: data for new, data in found.items() if data is not None}
