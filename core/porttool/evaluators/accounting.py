"""Weights accounted for: every tensor of an engine made again from its source and compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from porttool.builder import Rank
from porttool.config import ModelConfig, dtype_name
from porttool.evaluator import Verdict
from porttool.evaluators.stages import relative_error
from porttool.progress import Progress
from porttool.sharding import shard
from porttool.sources.safetensors_file import SafetensorsFile
from porttool.weights import Take, listing, map_tensor, resolve_rules

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.converter import Converter
    from porttool.engine import Engine, EngineManifest

SHOWN = 4
"""Differing tensors that are described; of the rest only the number is given."""


class Derivation:
    """Canonical tensors made from a source by its family's rules, one at a time."""

    def __init__(self, converter: Converter, path: Path) -> None:
        self.source = converter.open(path)
        self.config: ModelConfig = self.source.config
        self.prompt = converter.prompt
        module = converter.module(self.config)
        self.shapes = {n: tuple(t.shape) for n, t in module.state_dict().items()}
        weight_map = self.source.weight_map or converter.weight_map(self.config)
        infos = self.source.tensors.infos()
        self.rules: Mapping[str, Take] = resolve_rules(self.shapes, weight_map, infos)

    def tensor(self, name: str) -> Tensor:
        """Make one canonical tensor, in the source's type."""
        return map_tensor(
            name, self.shapes[name], self.rules[name], self.source.tensors, self.config
        )

    def alike(self, name: str) -> Iterator[str]:
        """Yield the other tensors of the same shape, those of the same layer first."""
        layer = ".".join(name.split(".")[:2])
        others = [n for n in self.shapes if n != name and self.shapes[n] == self.shapes[name]]
        yield from sorted(others, key=lambda n: not n.startswith(f"{layer}."))


@contextmanager
def derived(
    converter: Converter | None, source: Path, scratch: Path, progress: Progress
) -> Iterator[Derivation | None]:
    """Index what an engine was converted from; None without the family's rules.

    A compressed source is unpacked into `scratch` for as long as it is needed.
    """
    if converter is None:
        yield None
        return
    scratch.mkdir(parents=True, exist_ok=True)  # another run may have taken it away since
    with converter.prepare(source, scratch, progress) as readable:
        yield Derivation(converter, readable)


def judge_config(engine: EngineManifest, derivation: Derivation) -> Verdict:
    """The engine's shape and arithmetic are what the source's config says.

    So are its end tokens, and how it is asked, as far as the source says.
    """
    source = derivation.source
    ours, theirs = engine.config.model_dump(), derivation.config.model_dump()
    ours |= {"eos": engine.tokens.eos, "infill": engine.infill, "prompt": engine.prompt}
    said = {"eos": source.tokens.eos, "infill": source.infill, "prompt": derivation.prompt}
    theirs |= {k: v for k, v in said.items() if v}
    differing = [f"{k} is {ours[k]}, should be {theirs[k]}" for k in theirs if ours[k] != theirs[k]]
    return Verdict(
        name="config", passed=not differing, found=f"{len(differing)} fields differ", bound="0",
        detail="; ".join(differing),
    )  # fmt: skip


@dataclass(frozen=True)
class WeightCheck:
    """What was found: tensors compared, those that differ and how, those missing or too many."""

    n_tensors: int
    differing: Mapping[str, str]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    through: str
    """A type that the values were rounded to on their way, if any."""

    @property
    def verdict(self) -> Verdict:
        """Every tensor is there once, with the source's values."""
        wrong = [*(f"{n}: {how}" for n, how in self.differing.items())]
        parts = ["; ".join(wrong[:SHOWN])] if wrong else []
        parts += [f"{len(wrong) - SHOWN} more differ"] if len(wrong) > SHOWN else []
        parts += [f"missing: {listing(self.missing)}"] if self.missing else []
        parts += [f"not the model's: {listing(self.extra)}"] if self.extra else []
        parts += [f"rounded through {self.through}"] if self.through else []
        good = self.n_tensors - len(self.differing)
        return Verdict(
            name="weights",
            passed=not (self.differing or self.missing or self.extra) if self.n_tensors else None,
            found=f"{good} of {self.n_tensors + len(self.missing)} tensors",
            bound="all, exactly" if not self.through else "all, but for rounding",
            detail="; ".join(parts),
        )


def check_weights(
    engine: Engine, derivation: Derivation, *, progress: Progress
) -> WeightCheck | None:
    """Compare an engine's tensors with its source; None if its files hold no canonical tensors."""
    ranks = [Rank(i, engine.manifest.world_size) for i in range(engine.manifest.world_size)]
    files = [
        (rank, SafetensorsFile(engine.path / name))
        for rank in ranks
        for name in engine.weight_files(rank.index)
    ]
    held = {
        rank: {name for r, file in files if r == rank for name in file.infos()} for rank in ranks
    }
    found = set().union(*held.values())
    if not found & derivation.shapes.keys():
        return None
    differing: dict[str, str] = {}
    through: set[str] = set()
    known = [(r, f, n) for r, f in files for n in f.infos() if n in derivation.shapes]
    progress.start("weights", len(known), unit="tensors")
    for rank, file, name in known:
        closely = len(differing) < SHOWN
        problem, rounding = compare_tensor(name, file.load(name), derivation, rank, closely=closely)
        if problem:
            differing[name] = problem
        elif rounding:
            through.add(rounding)
        progress.advance(1)
    progress.finish()
    missing = tuple(
        sorted({n for names in held.values() for n in derivation.shapes.keys() - names})
    )
    extra = tuple(sorted(found - derivation.shapes.keys()))
    return WeightCheck(len(known), differing, missing, extra, ", ".join(sorted(through)))


def compare_tensor(
    name: str, found: Tensor, derivation: Derivation, rank: Rank, *, closely: bool = True
) -> tuple[str, str]:
    """Return what is wrong with a tensor, and through which narrower type its values went.

    Looking `closely` reads every other tensor of the same shape, to find one that took its place.
    """
    import torch

    whole = derivation.tensor(name)
    wanted = whole
    if rank.world_size > 1:
        wanted = shard(name, derivation.config, rank, lambda a, b: whole[a:b], whole.shape[0])
    if found.shape != wanted.shape:
        return f"is {list(found.shape)}, should be {list(wanted.shape)}", ""
    if found.equal(wanted.to(found.dtype)):
        return "", "" if found.itemsize >= wanted.itemsize else dtype_name(found.dtype)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        if found.equal(wanted.to(dtype).to(found.dtype)):
            return "", dtype_name(dtype)
    if not closely:
        return rough_difference(found, wanted), ""
    return describe_difference(name, found, wanted, derivation), ""


def rough_difference(found: Tensor, wanted: Tensor) -> str:
    """Say how far off a tensor is; how many of its values are no numbers, where there are such."""
    wild = [int((~t.isfinite()).sum()) for t in (found, wanted)]
    if any(wild):
        return (
            f"{wild[0]} of {found.numel()} values NaN or infinite in the engine, {wild[1]} in the "
            "source"
        )
    return f"off by {relative_error(found, wanted):.2%} of its norm"


def describe_difference(name: str, found: Tensor, wanted: Tensor, derivation: Derivation) -> str:
    """Say how a tensor differs: another one's values, transposed, shifted, shuffled or noisy."""
    target = wanted.to(found.dtype)
    for other in derivation.alike(name):
        if found.equal(derivation.tensor(other).to(found.dtype)):
            return f"holds {other}"
    if found.ndim == 2 and found.equal(target.t().reshape(found.shape)):
        return "is transposed"
    if found.shape[0] > 1 and (found[1:].equal(target[:-1]) or found[:-1].equal(target[1:])):
        return "its rows are shifted by one"
    rough = rough_difference(found, wanted)
    if found.flatten().sort().values.equal(target.flatten().sort().values):
        return f"the same values in another order, {rough}"
    rows = (found != target).reshape(len(found), -1).any(1).nonzero().flatten()
    return f"{rough}, {len(rows)} of {len(found)} rows from row {int(rows[0])}"
