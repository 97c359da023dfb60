"""A benchmark of engine folders: what is refused beforehand, and which sides there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from porttool.benchmark.engines import EngineSide
from porttool.benchmark.measurement import Benchmark
from porttool.benchmark.peers import CompiledSide, HuggingFaceModel, TransformersSide
from porttool.benchmark.results import BenchmarkResult, Cell, Method, require_fit
from porttool.engine import Engine
from porttool.errors import UsageError
from porttool.evaluators.transformers_folder import require_same_shape
from porttool.plugins import load_registry
from porttool.progress import SILENT, Progress
from porttool.runner import load_verified


def bench(
    paths: Sequence[Path],
    cells: Sequence[Cell],
    *,
    hf_model: Path | None = None,
    compiled: bool = True,
    method: Method | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> BenchmarkResult:
    """Measure engines of one shape, and a Hugging Face folder beside them in the first's type.

    `options` are the runners'. Raises UsageError, before anything is loaded, for a cell that an
    engine does not hold.
    """
    registry = load_registry()
    engines = [Engine.open(path, verify=False) for path in paths]
    for engine in engines:
        require_fit(cells, engine.manifest.limits, str(engine.path))
    config = engines[0].manifest.config
    for engine in engines[1:]:
        if engine.manifest.config != config:
            raise UsageError(
                f"{engine.path} is another model than {engines[0].path}: measure them apart"
            )
    if hf_model is not None:
        require_same_shape(hf_model, config)
    run = Benchmark(config, method or Method(), progress)
    for engine in engines:
        load = partial(load_verified, engine.path, registry, options)
        run.load(EngineSide(label(engine, engines), engine.manifest, load))
    if hf_model is not None:
        first = run.entries[0].record
        theirs = HuggingFaceModel(hf_model, dtype=first.dtype, device=first.device)
        run.load(TransformersSide(theirs))
        if compiled:
            run.load(CompiledSide(theirs))
    return run.measure_all(cells)


def label(engine: Engine, engines: Sequence[Engine]) -> str:
    """Return a short name: the kind alone, or with the folder where several engines run."""
    kind = f"porttool {engine.manifest.kind}"
    if len(engines) == 1:
        return kind
    same = [e for e in engines if (e.manifest.kind, e.path.name) == (engine.manifest.kind,
                                                                     engine.path.name)]  # fmt: skip
    return f"{kind} {engine.path.name if len(same) == 1 else engine.path}"
