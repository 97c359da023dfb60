"""Engines damaged on purpose: what a proof must catch, for tests and for calibrating bounds."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from porttool.config import ModelConfig
from porttool.engine import MANIFEST, Engine, record_files
from porttool.errors import UsageError
from porttool.evaluators.hypotheses import (
    Mistake,
    other_fractions,
    shifted_keys,
    shifted_positions,
    swapped_halves,
    swapped_norms,
)
from porttool.evaluators.weight_changes import (
    borrowed_head,
    noise,
    rounded,
    scrambled,
    swapped_keys_and_values,
    transposed,
)

OTHER = {
    "gelu": "gelu_tanh", "gelu_tanh": "gelu", "quick_gelu": "gelu_tanh", "silu": "quick_gelu",
    "relu": "gelu_tanh", "relu2": "relu",
}  # fmt: skip
"""The activation that is most easily taken for another."""


def misplaced(config: ModelConfig) -> Mistake:
    """Put every learned position one too high; rotary ones matter only between query and key."""
    if config.position == "rotary":
        return Mistake("", weights=shifted_keys(config, by=1))
    return Mistake("", weights=lambda w: shifted_positions(w, by=1))


DAMAGES: Mapping[str, Callable[[ModelConfig], Mistake]] = {
    "nothing": lambda c: Mistake("nothing"),
    "scrambled layer": lambda c: Mistake("", weights=scrambled("layers.1.")),
    "every matrix scrambled": lambda c: Mistake("", weights=scrambled("")),
    "swapped norms": lambda c: Mistake("", weights=swapped_norms),
    "other gelu": lambda c: Mistake("", {"activation": OTHER[c.activation]}),
    "other activation": lambda c: Mistake("", {"activation": OTHER[c.activation]}),
    "shifted positions": misplaced,
    "wrong rotary fraction": lambda c: Mistake("", {"rotary_fraction": other_fractions(c)[0]}),
    "transposed projection": lambda c: Mistake(
        "", weights=transposed("layers.0.attention.out.weight")
    ),
    "keys and values swapped": lambda c: Mistake("", weights=swapped_keys_and_values(c)),
    "another group's head": lambda c: Mistake("", weights=borrowed_head(c)),
    "gate and linear swapped": lambda c: Mistake("", weights=swapped_halves),
    "noise of 2 %": lambda c: Mistake("", weights=noise(0.02)),
    "noise of int8": lambda c: Mistake("", weights=rounded(127)),
    "noise of int4": lambda c: Mistake("", weights=rounded(7)),
    "no 1/(layer + 1)": lambda c: Mistake("", {"inverse_layer_scale": False}),
    "no attention scale": lambda c: Mistake("", {"attention_scale": 1.0}),
    "epsilon of 1e-3": lambda c: Mistake("", {"norm_eps": 1e-3}),
}
"""Name → the mistake it makes of a config."""

OBSTACLES: Mapping[str, Callable[[ModelConfig], str]] = {
    "other gelu": lambda c: "" if "gelu" in c.activation else f"its activation is {c.activation}",
    "other activation": lambda c: "its activation is a GELU" if "gelu" in c.activation else "",
    "wrong rotary fraction": lambda c: "" if c.position == "rotary" else "no rotary positions",
    "another group's head": lambda c: "" if c.n_kv_head > 1 else "one key and value head",
    "gate and linear swapped": lambda c: "" if c.gated else "its MLP has no gate",
    "no 1/(layer + 1)": lambda c: "" if c.inverse_layer_scale else "attention has no such factor",
    "no attention scale": lambda c: "its attention is not scaled" if c.attention_scale == 1 else "",
}
"""Name → why a damage cannot be done to a config; empty where it can."""


@dataclass(frozen=True)
class Damage:
    """One of DAMAGES by name."""

    name: str

    def obstacle(self, config: ModelConfig) -> str:
        """Return why a model cannot be damaged in this way, or nothing."""
        return OBSTACLES[self.name](config) if self.name in OBSTACLES else ""

    def apply(self, engine: Engine, output: Path) -> Engine:
        """Write a damaged copy of a single-rank engine that keeps canonical weights."""
        from safetensors.torch import load_file, save_file

        if self.name not in DAMAGES:
            raise UsageError(f"there is no damage named {self.name!r}; known: {', '.join(DAMAGES)}")
        config = engine.manifest.config
        if reason := self.obstacle(config):
            raise UsageError(f"{engine.path} cannot have the damage {self.name!r}: {reason}")
        mistake = DAMAGES[self.name](config)
        shutil.copytree(engine.path, output)
        files = sorted((output / "rank0").glob("*.safetensors"))
        weights = {name: t for file in files for name, t in load_file(file).items()}
        changed = {n: t.contiguous() for n, t in mistake.weights(weights).items()}
        for file in files:
            file.unlink()
        save_file(changed, output / "rank0" / "model.safetensors")
        manifest = engine.manifest.model_copy(
            update={
                "config": config.model_copy(update=dict(mistake.config)),
                "files": record_files(output),
            }
        )
        (output / MANIFEST).write_text(manifest.sealed(), encoding="utf-8")
        return Engine.open(output)
