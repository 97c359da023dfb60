"""The kit's cases for containers that no package of ours writes: it only reads them."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import ClassVar

import pytest

import fastertransformer_writer
import megatron_writer
import nemo_writer
import openai_writer
from porttool.errors import SourceError, UsageError
from porttool.plugins import choose_converter
from porttool.testing import REFERENCE, FamilyConformance, transformers_logits
from porttool.testing.family import UNKNOWN_KEY
from porttool_gpt2.conformance import GPT2Conformance
from porttool_gpt_next.conformance import NemoConformance


class Megatron(GPT2Conformance):
    """The 345M's form: no arguments, so that heads and ids have to be given."""

    options: ClassVar = {"n_head": 4, "vocab_size": 67}

    def write_layout(self, path, model):
        megatron_writer.write_source(path, model.requires_grad_(False))

    def test_unknown_config_key(self):
        """There is no config; what is told instead is held to the same rule."""
        made = self.specimen()
        with pytest.raises(UsageError, match=UNKNOWN_KEY):
            choose_converter(made.registry, made.source, None, {UNKNOWN_KEY: 1})


class MegatronRanks(Megatron):
    """Today's form on two ranks."""

    options: ClassVar = {"vocab_size": 67}

    def write_layout(self, path, model):
        megatron_writer.write_source(path, model.requires_grad_(False), version=3, tp=2)

    def test_unknown_config_key(self):
        """Of the hundreds of arguments those are refused that make another model."""
        made = self.specimen()
        source = made.folder / "other_arguments"
        model = megatron_writer.reread(made.source.with_name("reference"))
        args = megatron_writer.arguments(model, 1, 1, quick_geglu=True)
        megatron_writer.write_source(source, model, version=3, args=args)
        with pytest.raises(SourceError, match="quick_geglu"):
            made.convert("other", source)


class OpenAI(GPT2Conformance):
    """A TensorFlow checkpoint."""

    config_file = "hparams.json"

    def write_layout(self, path, model):
        openai_writer.write_source(path, model)


class FasterTransformer(GPT2Conformance):
    """A folder of two ranks."""

    def write_layout(self, path, model):
        fastertransformer_writer.write_folder(path / "2-gpu", model, 2)

    def add_config_key(self, path, key):
        file = path / "2-gpu" / "config.ini"
        file.write_text(file.read_text().replace("[gpt]", f"[gpt]\n{key} = 1"))


class GPT2B(FamilyConformance):
    """GPT-2B-001's YAML in a plain archive of two ranks; transformers has it as StableLM."""

    family = "gpt_next"
    values: ClassVar = {**nemo_writer.GPT_2B, "tensor_model_parallel_size": 2}

    def write_source(self, path, seed):
        from transformers import StableLmConfig, StableLmForCausalLM

        tensors = nemo_writer.draw(self.values, seed=seed)
        nemo_writer.write(path, self.values, tensors)
        config = StableLmConfig(
            vocab_size=nemo_writer.VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=40,
            layer_norm_eps=1e-5, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                             "partial_rotary_factor": 0.5},
        )  # fmt: skip
        model = StableLmForCausalLM(config).double()
        theirs = nemo_writer.llama_names(self.values, tensors, plus=1.0)
        model.load_state_dict({name: tensor.double() for name, tensor in theirs.items()})
        model.save_pretrained(path.with_name(REFERENCE))

    def reference_logits(self, path, ids):
        return transformers_logits(path.with_name(REFERENCE), ids)

    def add_config_key(self, path, key):
        nemo_writer.write(path, {**self.values, key: 1}, nemo_writer.draw(self.values))


class CompressedNemo(NemoConformance):
    """One file that is unpacked before it can be read."""

    def write_layout(self, path, model):
        folder = path.with_name("unpacked")
        super().write_layout(folder, model)
        pack(folder, path)

    def add_config_key(self, path, key):
        folder = path.with_name("unpacked")
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
        super().add_config_key(folder, key)
        pack(folder, path)


def pack(folder: Path, path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, file.name)
