"""The commands as functions: each chooses plugins and paths, then calls the driver of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porttool.checkpoint import Checkpoint
from porttool.config import Dtype
from porttool.converter import convert as convert_source
from porttool.engine import MANIFEST as ENGINE
from porttool.engine import Engine, choose_limits
from porttool.engine import build as build_engine
from porttool.errors import UsageError, naming
from porttool.hub import resolve_source
from porttool.pairing import (
    default_hub_id,
    find_subject,
    port_of,
    recorded_source,
    reference_port,
    refuse_dummy,
    report_folder,
    with_table,
)
from porttool.plugins import Registry, choose_converter, load_registry, refinements
from porttool.progress import SILENT, Progress
from porttool.prompt_table import PromptTable, choose_table_converter, convert_table
from porttool.runner import Runner, load_verified
from porttool.standing import require_free, require_place
from porttool.text import Tokenizer, load_tokenizer
from porttool.workspace import Workspace, require_family_of

if TYPE_CHECKING:
    from porttool.evaluator import Report


def convert(
    source: str | Path | None = None,
    output: Path | None = None,
    *,
    model: str | None = None,
    dtype: Dtype | None = None,
    workers: int = 2,
    force: bool = False,
    allow_nonfinite: bool = False,
    options: Mapping[str, Any] | None = None,
    workspace: Workspace | None = None,
    registry: Registry | None = None,
    progress: Progress = SILENT,
) -> Checkpoint:
    """Turn a source checkpoint into porttool's.

    `source` is a local path or a hub id and defaults to the family's own; `model` names the
    family and, if `output` is not given, the place under the work folder.
    """
    registry = registry or load_registry()
    if source is None and not model:
        raise UsageError("name a SOURCE, or a family with --model, whose published weights are one")
    named = None if source is None else str(source)
    path = resolve_source(named, default_hub_id(registry, model))
    with naming(path):
        converter = choose_converter(registry, path, model, options)
        for finer in refinements(registry, path, converter) if model else ():
            if finer.prompt not in (None, converter.prompt):
                progress.note(
                    f"{path} looks like {finer.family}, whose instruction template is lost when it "
                    f"is converted as {converter.family}: --model {finer.family} keeps it"
                )
    target = output or (workspace or Workspace.choose()).checkpoint(converter.family)
    return convert_source(
        converter,
        path,
        target,
        plugin=registry.record(registry.converters, converter.name),
        dtype=dtype,
        workers=workers,
        replace=force,
        allow_nonfinite=allow_nonfinite,
        progress=progress,
    )


def convert_prompts(
    source: Path,
    output: Path | None,
    *,
    model: str | None = None,
    dtype: Dtype | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    options: Mapping[str, Any] | None = None,
    registry: Registry | None = None,
    progress: Progress = SILENT,
) -> PromptTable | None:
    """Turn a source of virtual tokens into a prompt table; None if the source is a model."""
    registry = registry or load_registry()
    with naming(source):
        converter = choose_table_converter(registry, source, model, options)
        if converter is None:
            return None
        if output is None:
            raise UsageError("say with --output where the prompt table is to go")
        record = registry.record(registry.tables, converter.name)
        return convert_table(
            converter, source, output, plugin=record, dtype=dtype, replace=force,
            allow_nonfinite=allow_nonfinite, progress=progress,
        )  # fmt: skip


def build(
    checkpoint: Path | Checkpoint | None = None,
    output: Path | None = None,
    *,
    model: str | None = None,
    engine: str = "torch",
    dtype: Dtype | None = None,
    tensor_parallel: int = 1,
    max_batch_size: int = 8,
    max_input_len: int | None = None,
    max_output_len: int | None = None,
    max_beam_width: int = 8,
    max_prompt_rows: int = 0,
    force: bool = False,
    options: Mapping[str, Any] | None = None,
    workspace: Workspace | None = None,
    registry: Registry | None = None,
    progress: Progress = SILENT,
) -> Engine:
    """Build an engine from a checkpoint; `engine` is its kind, one of the installed builders.

    A checkpoint that is given opened is taken as it is.
    """
    registry = registry or load_registry()
    space = workspace or Workspace.choose()
    builder = registry.builders.get(engine)(options)
    if model is None and (checkpoint is None or output is None):
        missing = "the checkpoint" if checkpoint is None else "with --output where the engine goes"
        raise UsageError(f"say {missing}, or name a model with --model, which names both")
    if checkpoint is not None and model is not None:
        require_family_of(checkpoint, model)
    target = output or space.engine(str(model))
    require_free(target, ENGINE, replace=force)
    if isinstance(checkpoint, Checkpoint):
        opened = checkpoint
    else:
        opened = open_checkpoint(checkpoint or space.checkpoint(str(model)), registry)
    limits = choose_limits(
        opened.config,
        max_batch_size=max_batch_size,
        max_input_len=max_input_len,
        max_output_len=max_output_len,
        max_beam_width=max_beam_width,
        max_prompt_rows=max_prompt_rows,
    )
    return build_engine(
        opened,
        builder,
        target,
        plugin=registry.record(registry.builders, engine),
        limits=limits,
        dtype=dtype,
        world_size=tensor_parallel,
        replace=force,
        progress=progress,
    )


def open_checkpoint(path: Path, registry: Registry) -> Checkpoint:
    """Open a verified checkpoint whose family is installed at the version that made it."""
    checkpoint = Checkpoint.open(path)
    made = checkpoint.manifest.plugin
    registry.require(registry.converters, made, f"{path} was converted by")
    return checkpoint


@dataclass(frozen=True)
class LoadedEngine:
    """An engine ready to run: its runner, and its tokenizer if it has one."""

    engine: Engine
    runner: Runner
    tokenizer: Tokenizer | None


def load(
    engine: Path | None = None,
    *,
    model: str | None = None,
    tokenizer: Path | None = None,
    options: Mapping[str, Any] | None = None,
    workspace: Workspace | None = None,
    registry: Registry | None = None,
) -> LoadedEngine:
    """Open, verify and load an engine of a path or of a model."""
    registry = registry or load_registry()
    path = (workspace or Workspace.choose()).find_engine(engine, model)
    runner = load_verified(path, registry, options)
    opened = runner.engine
    folder = tokenizer or opened.tokenizer
    text = load_tokenizer(folder) if tokenizer or folder.is_dir() else None
    if text is not None and text.n_tokens > opened.manifest.config.vocab_size:
        raise UsageError(
            f"{folder}: the tokenizer has {text.n_tokens} ids, the model only "
            f"{opened.manifest.config.vocab_size}; it belongs to another model"
        )
    return LoadedEngine(opened, runner, text)


def evaluate(
    name: str,
    engine: Path | None = None,
    *,
    model: str | None = None,
    hf_model: str | Path | None = None,
    output: Path | None = None,
    test_engine: bool = True,
    test_hf: bool = True,
    tokenizer: Path | None = None,
    prompt_table: Path | None = None,
    options: Mapping[str, Any] | None = None,
    runner_options: Mapping[str, Any] | None = None,
    workspace: Workspace | None = None,
    registry: Registry | None = None,
    progress: Progress = SILENT,
) -> Report:
    """Run an evaluator on an engine and its source; return its report.

    `hf_model` defaults to what the engine was converted from. With `test_engine` or `test_hf`
    false that side is not loaded, and must have been saved before. A reference alone needs no
    engine if `hf_model` and `output` are given.
    The virtual tokens of a `prompt_table` precede every prompt, on both sides.
    """
    from porttool.evaluator import REPORT
    from porttool.evaluator import evaluate as run_evaluator

    registry = registry or load_registry()
    space = workspace or Workspace.choose()
    evaluator = registry.evaluators.get(name)(options)
    needed = test_engine or hf_model is None or output is None
    subject = find_subject(space, engine, model, needed=needed)
    where = output or report_folder(space, engine, model, name)
    require_place(where / REPORT)
    if runner_options and not test_engine:
        raise UsageError("runner options (--runner-set) are the engine's, which does not run here")
    source = None if hf_model is None else resolve_source(str(hf_model), None)
    if subject is not None:
        refuse_dummy(subject)
    if test_engine:
        loaded = load(engine, model=model, tokenizer=tokenizer, options=runner_options,
                      workspace=space, registry=registry)  # fmt: skip
        port = port_of(loaded.runner, loaded.tokenizer, source, registry, test_hf=test_hf)
        if prompt_table is not None:
            port = with_table(port, prompt_table, registry, progress)
    else:
        folder = source or recorded_source(space, engine, model, registry)
        port = reference_port(folder, subject, tokenizer, registry, named=source is not None)
    return run_evaluator(evaluator, port, where, progress=progress)
