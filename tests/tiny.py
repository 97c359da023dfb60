"""Tiny GPT-2s in every form that people have, and the way from one to a loaded engine.

Every parameter is drawn from N(0, 0.2): with the default initialisation a swapped norm or a
wrong activation hardly changes a logit, and no test would see it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from porttool.checkpoint import Checkpoint, seal_of
from porttool.converter import convert
from porttool.engine import Engine, build, choose_limits
from porttool.plugins import Registry, choose_converter, load_registry
from porttool.runner import Runner, load_runner

SHAPE: dict[str, Any] = {
    "vocab_size": 67, "n_positions": 48, "n_embd": 24, "n_layer": 3, "n_head": 3,
    "bos_token_id": 66, "eos_token_id": 66, "pad_token_id": 65,
}  # fmt: skip
ATOL = 1e-9
PROMPTS = [[5, 9, 2], [7], [1, 60, 33, 4, 8, 19, 2], [3, 3, 3, 3]]


@dataclass(frozen=True)
class Form:
    """How a source is stored."""

    file: str = "model.safetensors"
    prefix: str = "transformer."
    shards: int = 1
    masks: bool = False
    head_copy: bool = False
    dtype: torch.dtype = torch.float32


def gpt2(*, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> torch.nn.Module:
    """Return a GPT2LMHeadModel in float64 whose weights a source of `dtype` can hold exactly."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**{**SHAPE, **changes})
    config._attn_implementation = "eager"
    model = GPT2LMHeadModel(config).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
        parameter.copy_(drawn.to(dtype))
    return model


def weights(model: torch.nn.Module, form: Form) -> dict[str, torch.Tensor]:
    """Return the tensors of a source in the form asked for."""
    found = {n: t.to(form.dtype).contiguous() for n, t in model.state_dict().items()}
    if not form.head_copy and model.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    elif "lm_head.weight" in found:
        found["lm_head.weight"] = found["lm_head.weight"].clone()
    if form.masks:
        n = model.config.n_positions
        for layer in range(model.config.n_layer):
            mask = torch.ones(n, n, dtype=torch.uint8).tril()[None, None]
            found[f"transformer.h.{layer}.attn.bias"] = mask
            found[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return {n.replace("transformer.", form.prefix): t for n, t in found.items()}


def write_source(folder: Path, model: torch.nn.Module, form: Form | None = None) -> Path:
    """Write a model folder in Hugging Face's layout."""
    form = form or Form()
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    write_weights(folder, weights(model, form), form)
    return folder


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], form: Form) -> None:
    """Write tensors as one file, or as shards with an index."""
    if form.shards == 1:
        write_file(folder / form.file, tensors)
        return
    stem, suffix = form.file.rsplit(".", 1)
    where = {n: f"{stem}-{i % form.shards + 1:05}-of-{form.shards:05}.{suffix}"
             for i, n in enumerate(tensors)}  # fmt: skip
    for file in set(where.values()):
        write_file(folder / file, {n: t for n, t in tensors.items() if where[n] == file})
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / f"{form.file}.index.json").write_text(json.dumps(index))


def write_file(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one weight file of the kind that its suffix says."""
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change keys of a folder's config.json; None takes a key away."""
    file = folder / "config.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


def edit_manifest(file: Path, **changes: Any) -> None:
    """Change fields of a manifest and seal it again, as a program of ours would write it."""
    text = json.dumps({**json.loads(file.read_text()), **changes, "seal": ""})
    file.write_text(text.replace('"seal": ""', f'"seal": "{seal_of(text.encode())}"'))


def converted(source: Path, output: Path, model: str | None = None, **options: Any) -> Checkpoint:
    """Convert a source with the converter that recognises it."""
    registry = load_registry()
    converter = choose_converter(registry, source, model)
    plugin = registry.record(registry.converters, converter.name)
    return convert(converter, source, output, plugin=plugin, **options)


def built(checkpoint: Checkpoint, output: Path, *, kind: str = "torch", **options: Any) -> Engine:
    """Build an engine whose limits are the model's."""
    registry = load_registry()
    limits = options.pop("limits", None) or choose_limits(checkpoint.config, max_batch_size=4)
    builder = registry.builders.get(kind)(options.pop("builder_options", None))
    plugin = registry.record(registry.builders, kind)
    return build(checkpoint, builder, output, plugin=plugin, limits=limits, **options)


def loaded(engine: Path, registry: Registry) -> Runner:
    """Load an engine into the canonical decoder on the CPU."""
    opened = Engine.open(engine, registry)
    return load_runner(opened, registry, {"device": "cpu", "canonical": True})


def in_float64(checkpoint: Checkpoint, folder: Path, **options: Any) -> Runner:
    """Build a checkpoint as a float64 engine in a folder, and load that as `loaded` does."""
    engine = built(checkpoint, folder / "engine", dtype="float64", **options)
    return loaded(engine.path, load_registry())


def ported(folder: Path, model: torch.nn.Module, form: Form | None = None) -> Runner:
    """Take a model all the way: source, checkpoint, float64 engine, runner."""
    source = write_source(folder / "source", model, form)
    return in_float64(converted(source, folder / "checkpoint"), folder)


def full_logits(runner: Runner, prompt: list[int]) -> torch.Tensor:
    """Logits [len(prompt), vocab_size] of one prefill in slot 0."""
    from porttool.nn import Step

    return runner.step(Step.prefill([prompt]), all_positions=True)[0]


def reference_logits(model: torch.nn.Module, prompt: list[int]) -> torch.Tensor:
    """Logits [len(prompt), vocab_size] as transformers computes them."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([prompt])).logits[0]


def assert_same(runner: Runner, model: torch.nn.Module, prompts: list[list[int]] = PROMPTS) -> None:
    """Hold an engine's logits of prompts to those of transformers, in float64."""
    for prompt in prompts:
        expected = reference_logits(model, prompt)
        torch.testing.assert_close(full_logits(runner, prompt), expected, atol=ATOL, rtol=0)


def train_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE on a few sentences and write it as tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    sentences = [
        "The harbour was closed on Tuesday after the storm, officials said.",
        "Prices of bread and coffee rose by three per cent in the northern towns.",
        "The council will vote on the new bridge next week, the mayor said on Tuesday.",
    ]
    tokenizer.train_from_iterator(sentences * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
