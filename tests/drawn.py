"""Checkpoints of any configuration, written without a source: every parameter from N(0, 0.2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from porttool.checkpoint import Checkpoint, CheckpointManifest, PluginRecord, SourceRecord
from porttool.config import Limits, ModelConfig, SpecialTokens
from porttool.engine import Engine, build, choose_limits
from porttool.folder import hash_file
from porttool.nn import Decoder, Step, meta_decoder
from porttool.plugins import load_registry

FILE = "model.safetensors"
BASE = {
    "vocab_size": 211, "n_positions": 50, "n_layer": 2, "n_head": 4, "n_kv_head": 4, "head_dim": 12,
    "d_model": 56, "d_ff": 72, "activation": "gelu_tanh", "attention_scale": 0.2,
}  # fmt: skip
NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False, "norm_bias": False}
SHAPES = {
    "gpt2": {},
    "mqa": {"n_kv_head": 1, "activation": "gelu", "head_dim": 7},
    "gqa, gated, rms": {"n_kv_head": 2, "activation": "silu", "gated": True, "norm": "rmsnorm",
                        **NO_BIAS},
    "gpt-next": {"position": "rotary", "rotary_fraction": 0.5, "norm": "layernorm1p",
                 "activation": "silu", "gated": True, "tied_head": False, **NO_BIAS},
    "rotary": {"position": "rotary", "rotary_base": 500.0, "activation": "relu2"},
    "scaled": {"inverse_layer_scale": True, "upcast_attention": True, "activation": "quick_gelu"},
    "relu": {"activation": "relu", "n_layer": 1, "d_model": 7, "d_ff": 5, "head_dim": 2},
}  # fmt: skip


def shape(name: str) -> ModelConfig:
    """Return a configuration; together they cover every flag."""
    return ModelConfig(**{**BASE, **SHAPES[name]})


def weights(config: ModelConfig, *, scale: float = 0.2, seed: int = 3) -> dict[str, torch.Tensor]:
    """Return canonical tensors whose values every 16-bit type holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (scale * torch.randn(w.shape, generator=generator)).half().bfloat16().float()
        for name, w in meta_decoder(config).state_dict().items()
    }


def decoder(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> Decoder:
    """Return the canonical decoder in float64."""
    module = Decoder(config).double().eval().requires_grad_(False)
    module.load_state_dict({name: w.double() for name, w in tensors.items()})
    return module


def checkpoint(folder: Path, config: ModelConfig, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    """Write a checkpoint that says it was made by the GPT-2 converter."""
    folder.mkdir()
    save_file(tensors, folder / FILE)
    manifest = CheckpointManifest(
        porttool_version="0",
        family="drawn",
        plugin=PluginRecord(component="gpt2", distribution="porttool", version="0", api_version=1),
        source=SourceRecord(path="", fingerprint=""),
        config=config,
        tokens=SpecialTokens(),
        prompt=None,
        dtype="float32",
        tensors={name: tuple(w.shape) for name, w in tensors.items()},
        files={FILE: hash_file(folder / FILE)},
    )
    (folder / "checkpoint.json").write_text(manifest.sealed())
    return Checkpoint.open(folder)


def overflowing(folder: Path, token: int = 205) -> Checkpoint:
    """Write a checkpoint where a token has a value in layer 0 that is beyond float16."""
    config = shape("gpt2")
    tensors = weights(config)
    tensors["embedding.weight"][:, 0] = 100 * torch.eye(config.vocab_size)[token]
    tensors["layers.0.norm1.weight"][0] = 1
    tensors["layers.0.attention.qkv.weight"][-1, 0] = 2e4  # of 7 or so deviations
    return checkpoint(folder, config, tensors)


def engine(
    checkpoint: Checkpoint,
    output: Path,
    *,
    kind: str = "torch",
    limits: Limits | None = None,
    options: dict[str, Any] | None = None,
    **rest: Any,
) -> Engine:
    """Build an engine of any kind, with options of its builder."""
    registry = load_registry()
    builder = registry.builders.get(kind)(options)
    plugin = registry.record(registry.builders, kind)
    limits = limits or choose_limits(checkpoint.config, max_batch_size=4)
    return build(checkpoint, builder, output, plugin=plugin, limits=limits, **rest)


def step_of(rows: list[list[int]], slots: list[int], starts: list[int]) -> Step:
    """Return a step that feeds rows of any lengths."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return Step(torch.tensor(slots), tokens, torch.tensor(starts), lengths)


def prompts(*lengths: int) -> list[list[int]]:
    """Return prompts of these lengths, all different."""
    return [[(31 * i + 7 * j) % 211 for j in range(n)] for i, n in enumerate(lengths)]
