"""Setting an engine beside its source: which folders an evaluation takes, and where it reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from porttool.checkpoint import Checkpoint, SourceRecord
from porttool.engine import Engine
from porttool.errors import UsageError
from porttool.evaluator import EXPORTED, Port
from porttool.hub import resolve_source
from porttool.plugins import Registry, choose_converter, named_converters
from porttool.progress import Progress
from porttool.prompt_table import PromptTable, read_tables
from porttool.runner import Runner
from porttool.text import Tokenizer, load_tokenizer
from porttool.workspace import Workspace


def default_hub_id(registry: Registry, model: str | None) -> str | None:
    """Return where a family's weights are published."""
    if model is None:
        return None
    ids = [registry.converters.get(n).hub_id for n in named_converters(registry, model)]
    return next((hub_id for hub_id in ids if hub_id), None)


def find_subject(
    space: Workspace, engine: Path | None, model: str | None, *, needed: bool
) -> Path | None:
    """Return the engine that was named, or the only one if one is needed, else None.

    It may not be built yet: a reference can run before.
    """
    if engine is None and model is None and not needed:
        return None
    return space.find_engine(engine, model)


def report_folder(space: Workspace, engine: Path | None, model: str | None, kind: str) -> Path:
    """Return where reports of a kind go: beside an engine's folder, by its name, else the model's.

    Engines of one folder keep apart what is compared later.
    """
    if engine is None:
        return space.report(space.find_model(model), kind)
    folder = engine.resolve()
    return folder.parent / f"{folder.name}-reports" / kind


def refuse_dummy(engine: Path) -> None:
    """Refuse to evaluate an engine that is no port of anything."""
    if engine.is_dir() and Engine.open(engine, verify=False).manifest.dummy:
        raise UsageError(
            f"{engine} has random weights (build --dummy): it is a port of nothing that it could "
            "be compared with; it can be benchmarked and profiled"
        )


def port_of(
    runner: Runner,
    tokenizer: Tokenizer | None,
    source: Path | None,
    registry: Registry,
    *,
    test_hf: bool,
) -> Port:
    """Set an engine beside a Hugging Face folder, and beside what it was converted from.

    That is the folder if it is one and no other is named.
    """
    manifest = runner.engine.manifest
    origin = Path(manifest.source.path)
    reference = source or (origin if (origin / "config.json").is_file() else None)
    made_by = f"{runner.engine.path} is of a checkpoint that was converted by"
    registry.require(registry.converters, manifest.converter, made_by)
    converter = registry.converter(manifest.converter.component, manifest.source.options)
    reads = reference is not None and converter.matches(reference)
    return Port(
        runner=runner,
        tokenizer=tokenizer,
        source=reference if test_hf else None,
        converter=converter if reads or origin.exists() else None,
        origin=origin if origin.exists() and not (reads and test_hf) else None,
        named=source,
        compare=test_hf,
    )


def reference_port(
    source: Path, subject: Path | None, tokenizer: Path | None, registry: Registry, *, named: bool
) -> Port:
    """Return a reference that runs alone, for the engine if that is built."""
    built = subject is not None and subject.is_dir()
    return Port(
        tokenizer=load_tokenizer(tokenizer or source),
        source=source,
        converter=choose_converter(registry, source),
        manifest=Engine.open(subject, verify=False).manifest if subject and built else None,
        named=source if named else None,
    )


def with_table(port: Port, path: Path, registry: Registry, progress: Progress) -> Port:
    """Add a prompt table, and what it was made of, which must still be there."""
    table = PromptTable.open(path)
    made = table.manifest
    source = Path(made.source.path)
    if not source.exists():
        raise UsageError(f"{path} was made of {source}, which is not there to compare it with")
    registry.require(registry.tables, made.plugin, f"{path} was made by")
    converter = registry.tables.get(made.plugin.component)(made.source.options)
    return replace(port, prompt_table=table, taught=read_tables(converter, source, progress))


def recorded_source(
    space: Workspace, engine: Path | None, model: str | None, registry: Registry
) -> Path:
    """Return the folder that an engine named by its path came from, which must still be there.

    Without one, what the model's engine or checkpoint did, else where the family is published.
    UsageError for a source that transformers cannot run.
    """
    if engine is not None:
        recorded = Path(Engine.open(engine, verify=False).manifest.source.path)
        if not recorded.exists():
            raise UsageError(f"{recorded}, which {engine} was converted from, is no longer there: "
                             "name it with --hf-model")  # fmt: skip
    else:
        label = space.find_model(model)
        found = (Path(record.path) for record in records_of(space, label))
        there = next((path for path in found if path.exists()), None)
        recorded = there or resolve_source(None, default_hub_id(registry, label))
    if not (recorded / "config.json").is_file():
        raise UsageError(f"{recorded} has no config.json, so that transformers cannot run it: name "
                         "the Hugging Face folder of this model with --hf-model, "
                         + EXPORTED)  # fmt: skip
    return recorded


def records_of(space: Workspace, model: str) -> Iterator[SourceRecord]:
    """Yield what a model's engine and checkpoint record of their source, as far as they exist."""
    if (engine := space.engine(model)).is_dir():
        yield Engine.open(engine, verify=False).manifest.source
    if (checkpoint := space.checkpoint(model)).is_dir():
        yield Checkpoint.open(checkpoint, verify=False).manifest.source
