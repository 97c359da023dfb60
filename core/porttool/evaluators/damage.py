"""Engines damaged on purpose: what a proof must catch, for tests and for calibrating bounds."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porttool.config import ModelConfig
from porttool.engine import MANIFEST, Engine, record_files
from porttool.errors import UsageError
from porttool.evaluators.hypotheses import Mistake, shifted_positions, swapped_norms, unchanged

if TYPE_CHECKING:
    from torch import Tensor

    Weights = Mapping[str, Tensor]
    Change = Callable[[ModelConfig], Mistake]


def noise(share: float) -> Callable[[Weights], Weights]:
    """Add Gaussian noise of a share of each matrix's standard deviation."""

    def change(weights: Weights) -> Weights:
        import torch

        random = torch.Generator().manual_seed(0)
        result = dict(weights)
        for name, tensor in weights.items():
            if tensor.ndim > 1:
                drawn = torch.randn(tensor.shape, generator=random)
                result[name] = (tensor + share * tensor.float().std() * drawn).to(tensor.dtype)
        return result

    return change


def scrambled(prefix: str) -> Callable[[Weights], Weights]:
    """Shuffle the entries of every matrix whose name begins with a prefix."""

    def change(weights: Weights) -> Weights:
        import torch

        random = torch.Generator().manual_seed(0)
        result = dict(weights)
        for name, tensor in weights.items():
            if name.startswith(prefix) and tensor.ndim > 1:
                order = torch.randperm(tensor.numel(), generator=random)
                result[name] = tensor.flatten()[order].view_as(tensor)
        return result

    return change


def transposed(name: str) -> Callable[[Weights], Weights]:
    """Lay a matrix out as if it had not been transposed."""

    def change(weights: Weights) -> Weights:
        tensor = weights[name]
        return {**weights, name: tensor.t().reshape(tensor.shape).contiguous()}

    return change


def swapped_rows(config: ModelConfig) -> Callable[[Weights], Weights]:
    """Exchange keys and values in layer 0's fused projection."""

    def change(weights: Weights) -> Weights:
        import torch

        query, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        result = dict(weights)
        for name in weights:
            if name.startswith("layers.0.attention.qkv."):
                q, k, v = weights[name].split((query, kv, kv))
                result[name] = torch.cat((q, v, k))
        return result

    return change


def config_change(text: str, **fields: Any) -> Mistake:
    """Change fields of the config alone."""
    return Mistake(text, config=fields)


DAMAGES: Mapping[str, Change] = {
    "nothing": lambda c: Mistake("nothing", weights=unchanged),
    "scrambled layer": lambda c: Mistake("", weights=scrambled("layers.1.")),
    "every matrix scrambled": lambda c: Mistake("", weights=scrambled("")),
    "swapped norms": lambda c: Mistake("", weights=swapped_norms),
    "other gelu": lambda c: config_change(
        "", activation="gelu" if c.activation == "gelu_tanh" else "gelu_tanh"
    ),
    "shifted positions": lambda c: Mistake("", weights=lambda w: shifted_positions(w, by=1)),
    "transposed projection": lambda c: Mistake(
        "", weights=transposed("layers.0.attention.out.weight")
    ),
    "keys and values swapped": lambda c: Mistake("", weights=swapped_rows(c)),
    "noise of 2 %": lambda c: Mistake("", weights=noise(0.02)),
    "noise of int8": lambda c: Mistake("", weights=rounded(127)),
    "noise of int4": lambda c: Mistake("", weights=rounded(7)),
    "no 1/(layer + 1)": lambda c: config_change("", inverse_layer_scale=False),
    "no attention scale": lambda c: config_change("", attention_scale=1.0),
    "epsilon of 1e-3": lambda c: config_change("", norm_eps=1e-3),
}
"""Name → the mistake it makes of a config."""


def rounded(levels: int) -> Callable[[Weights], Weights]:
    """Round every matrix to a symmetric integer grid, one scale a tensor."""

    def change(weights: Weights) -> Weights:
        result = dict(weights)
        for name, tensor in weights.items():
            if tensor.ndim > 1:
                scale = tensor.float().abs().max() / levels
                result[name] = ((tensor.float() / scale).round() * scale).to(tensor.dtype)
        return result

    return change


@dataclass(frozen=True)
class Damage:
    """One of DAMAGES by name."""

    name: str

    def apply(self, engine: Engine, output: Path) -> Engine:
        """Write a damaged copy of a single-rank engine that keeps canonical weights."""
        from safetensors.torch import load_file, save_file

        if self.name not in DAMAGES:
            raise UsageError(f"there is no damage named {self.name!r}; known: {', '.join(DAMAGES)}")
        mistake = DAMAGES[self.name](engine.manifest.config)
        shutil.copytree(engine.path, output)
        files = sorted((output / "rank0").glob("*.safetensors"))
        weights = {name: t for file in files for name, t in load_file(file).items()}
        changed = {n: t.contiguous() for n, t in mistake.weights(weights).items()}
        for file in files:
            file.unlink()
        save_file(changed, output / "rank0" / "model.safetensors")
        manifest = engine.manifest.model_copy(
            update={
                "config": engine.manifest.config.model_copy(update=dict(mistake.config)),
                "files": record_files(output),
            }
        )
        (output / MANIFEST).write_text(manifest.sealed())
        return Engine.open(output)
