"""Sources to disturb: the demo model with pickled weights, and one of 1.2 GB."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from faults.works import DEMO

SHAPE = {"n_embd": 1024, "n_layer": 20, "n_head": 16, "n_positions": 1024, "vocab_size": 50257}


def with_pickled_weights(folder: Path) -> Path:
    """The demo model with pytorch_model.bin in place of model.safetensors."""
    shutil.copytree(DEMO, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def write_large(folder: Path) -> Path:
    """A GPT-2 of 304 M random parameters with the demo's tokenizer, in two shards of ours."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = GPT2Config(**SHAPE)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in GPT2LMHeadModel(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).mul_(0.02)
        for name, shape in shapes.items()
        if name != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
