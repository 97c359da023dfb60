"""Prompt tables: learned virtual tokens, by task, in one folder.

    prompt_table.json           the manifest: tasks, true lengths, type, provenance, hashes
    prompt_table.safetensors    one tensor [n_rows, d_model], task after task, nothing padded

A row is addressed by a token id: virtual id = vocab_size + row. Virtual tokens take the place of
token embeddings at the model's input (Lester et al. 2021, Liu et al. 2021); positions are counted
through them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from porttool.checkpoint import Manifest, PluginRecord, SourceRecord, read_manifest
from porttool.component import Component
from porttool.config import Dtype, ModelConfig, PromptTableConfig, dtype_name
from porttool.converter import widest
from porttool.errors import CheckpointError, SourceError, UsageError
from porttool.folder import FileRecord, pending_folder, verify_files
from porttool.progress import SILENT, Progress
from porttool.shards import TensorJob, plan_shards, work_key, write_shards
from porttool.sources.archive import is_gzip
from porttool.sources.places import SourceFiles, require_outside
from porttool.sources.safetensors_file import SafetensorsFile
from porttool.standing import require_free
from porttool.weights import cast

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.plugins import Registry
    from porttool.runner import Runner

MANIFEST = "prompt_table.json"
TENSOR = "prompt_table"


class PromptTableManifest(Manifest):
    """Everything about a prompt table but its rows."""

    format: Literal["porttool-prompt-table"] = "porttool-prompt-table"
    porttool_version: str
    family: str
    plugin: PluginRecord
    source: SourceRecord
    config: PromptTableConfig
    files: dict[str, FileRecord]


class TableConverter(Component):
    """Reads prompt tables from one kind of source; a plugin brings it among its converters."""

    family: ClassVar[str]
    source_format: ClassVar[str]
    refines: ClassVar[str | None] = None
    hub_id: ClassVar[str | None] = None

    @abstractmethod
    def matches(self, source: Path) -> bool:
        """Return true if the source is one of these; look at names and configs only."""

    @abstractmethod
    def open(self, source: Path) -> Mapping[str, Tensor]:
        """Return each task's virtual tokens, [length, d_model], in the order of their ids."""


class PromptTable:
    """An opened prompt table."""

    def __init__(self, path: Path, manifest: PromptTableManifest) -> None:
        self.path = path
        self.manifest = manifest
        self.config = manifest.config

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open and verify a folder; CheckpointError if it is not whole or was altered."""
        manifest = read_manifest(path, MANIFEST, PromptTableManifest)
        verify_files(path, manifest.files)
        table = cls(path, manifest)
        shape = (manifest.config.n_rows, manifest.config.d_model)
        try:
            info = SafetensorsFile(path / f"{TENSOR}.safetensors").infos().get(TENSOR)
        except SourceError as error:
            raise CheckpointError(str(error)) from error
        if info is None or (info.shape, info.dtype) != (shape, manifest.config.dtype):
            raise CheckpointError(f"{path}: the rows are not what the manifest says; make it again")
        return table

    def tensor(self) -> Tensor:
        """Return all rows, [n_rows, d_model]."""
        return SafetensorsFile(self.path / f"{TENSOR}.safetensors").load(TENSOR)

    def rows(self, task: str) -> range:
        """Return the rows of a task, given by its name or its number."""
        tasks = self.config.tasks
        if task in tasks:
            index = tasks.index(task)
        elif task.isdecimal() and int(task) < len(tasks):
            index = int(task)
        else:
            known = ", ".join(f"{i}: {name}" for i, name in enumerate(tasks))
            raise UsageError(f"{self.path}: there is no task {task!r}; it holds {known}")
        start = sum(self.config.lengths[:index])
        return range(start, start + self.config.lengths[index])

    def check(self, model: ModelConfig) -> None:
        """Refuse a table of another width than the model's."""
        if self.config.d_model != model.d_model:
            raise UsageError(
                f"{self.path}: its virtual tokens are {self.config.d_model} wide, the model's "
                f"tokens {model.d_model}; the table belongs to another model"
            )

    def prompt(self, ids: Sequence[int], task: str | None, vocab_size: int) -> list[int]:
        """Return a prompt's ids with the task's virtual tokens before them.

        Without a task, virtual ids may be in the prompt, vocab_size standing for the first row.
        A prompt for a task that holds virtual ids is taken as it is, vocab_size standing for the
        task's first row. An id beyond the table or the task is a UsageError.
        """
        rows = range(self.config.n_rows) if task is None else self.rows(task)
        virtual = [i for i in ids if i >= vocab_size]
        if wrong := [i for i in virtual if i - vocab_size >= len(rows)]:
            raise UsageError(
                f"the id {wrong[0]} is virtual token {wrong[0] - vocab_size}, but "
                f"{'the table' if task is None else f'the task {task!r}'} has {len(rows)}; "
                f"virtual ids run from {vocab_size} to {vocab_size + len(rows) - 1}"
            )
        if task is None or virtual:
            return [i + rows.start if i >= vocab_size else i for i in ids]
        return [vocab_size + row for row in rows] + list(ids)


def use_table(
    table: PromptTable, runner: Runner, prompts: Sequence[Sequence[int]], tasks: Sequence[str]
) -> list[list[int]]:
    """Load a table into a runner; return the prompts with their tasks' virtual tokens.

    `tasks` has one name or number for all prompts, or one for each, or is empty where the prompts
    hold virtual ids themselves.
    """
    if len(tasks) not in (0, 1, len(prompts)):
        raise UsageError(f"{len(tasks)} tasks for {len(prompts)} prompts; give one, or one each")
    table.check(runner.config)
    vocab_size = runner.config.vocab_size
    each: Sequence[str | None] = tasks or [None]
    each = each if len(each) == len(prompts) else [each[0]] * len(prompts)
    filled = [table.prompt(ids, task, vocab_size) for ids, task in zip(prompts, each, strict=True)]
    if max(map(max, filter(None, filled)), default=vocab_size) < vocab_size:
        raise UsageError(
            f"{table.path} would change nothing: no prompt holds one of its virtual tokens; name "
            f"a task, one of {', '.join(table.config.tasks)}"
        )
    runner.load_prompt_table(table.tensor())
    return filled


def choose_table_converter(
    registry: Registry, source: Path, model: str | None, options: Mapping[str, Any] | None = None
) -> TableConverter | None:
    """Return the converter of a prompt table, or None where a model is asked for or recognised.

    A source that a named table family cannot read is a UsageError.
    """
    named = [c for c in registry.tables if model in (c.family, c.name, None)]
    found = [c for c in named if c().matches(source)]
    if found:
        return found[0](options)
    if named and model:
        likely = sorted({model.family for model in registry.recognisers(source)})
        hint = f"; it looks like {', '.join(likely)}" if likely else ""
        raise UsageError(f"{source}: not a source of {model!r} that porttool can read{hint}")
    return None


def convert_table(
    converter: TableConverter,
    source: Path,
    output: Path,
    *,
    plugin: PluginRecord,
    dtype: Dtype | None = None,
    replace: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress = SILENT,
) -> PromptTable:
    """Turn a source into a prompt table folder; `dtype` defaults to the source's.

    Raises SourceError for tables that cannot be used, by task.
    """
    require_outside(source, output)
    require_free(output, MANIFEST, replace=replace, sources=[source])
    files_read = SourceFiles.of(source)
    tables = read_tables(converter, source, progress)
    for task, table in tables.items():
        check_table(source, task, table)
    widths = {task: table.shape[1] for task, table in tables.items()}
    if len(set(widths.values())) != 1:
        raise SourceError(
            f"{source}: the tasks' tables differ in width, or there are none: {widths}"
        )
    config = PromptTableConfig(
        tasks=tuple(tables),
        lengths=tuple(len(table) for table in tables.values()),
        d_model=next(iter(widths.values())),
        dtype=dtype or widest({dtype_name(t.dtype) for t in tables.values()}),
    )
    manifest = PromptTableManifest(
        porttool_version=version("porttool"),
        family=converter.family,
        plugin=plugin,
        source=SourceRecord.of(files_read, converter.options),
        config=config,
        files={},
    )
    shape = (config.n_rows, config.d_model)
    job = TensorJob(
        TENSOR, shape, config.dtype, 0, partial(joined, tables, config.dtype, allow_nonfinite)
    )
    shards = plan_shards([job], TENSOR)
    key = work_key(manifest.model_dump_json(), shards)
    with pending_folder(
        output, key, manifest=MANIFEST, replace=replace, sources=[source]
    ) as folder:
        write_shards(folder, shards, workers=1, progress=SILENT)
        files_read.require_unchanged()
        folder.finish(MANIFEST, manifest.sealed(files=folder.files))
    return PromptTable.open(output)


def read_tables(
    converter: TableConverter, source: Path, progress: Progress
) -> Mapping[str, Tensor]:
    """Return every task's rows [length, d_model]; say what a compressed source costs."""
    if source.is_file() and is_gzip(source):
        progress.note(f"{source.name} is compressed: one pass finds its tables, one reads them")
    return converter.open(source)


def check_table(source: Path, task: str, table: Tensor) -> None:
    """Refuse what is no table of virtual tokens, and one that nothing was learned into."""
    if table.ndim != 2 or not table.numel() or not table.is_floating_point():
        raise SourceError(
            f"{source}: the table of {task!r} should be numbers [virtual tokens, width], it is "
            f"{dtype_name(table.dtype)} {list(table.shape)}"
        )
    if not table.any():
        raise SourceError(
            f"{source}: the table of {task!r} is all zeros; it was never filled from the prompt "
            "encoder: export it again after training has finished"
        )


def joined(tables: Mapping[str, Tensor], dtype: Dtype, allow_nonfinite: bool) -> Tensor:
    """Return all tables, task after task, in one type."""
    import torch

    return torch.cat([
        cast(f"the table of {task!r}", rows, dtype, allow_nonfinite=allow_nonfinite)
        for task, rows in tables.items()
    ])  # fmt: skip
