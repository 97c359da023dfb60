"""The contract of a converter, and the driver that turns a source into a checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ValidationError

from porttool.checkpoint import (
    MANIFEST,
    TOKENIZER,
    Checkpoint,
    CheckpointManifest,
    PluginRecord,
    SourceRecord,
)
from porttool.component import Component, explain
from porttool.config import Dtype, InfillTokens, ModelConfig, PromptTemplate, SpecialTokens
from porttool.errors import SourceError, naming
from porttool.folder import pending_folder
from porttool.memory import digest
from porttool.progress import SILENT, Progress
from porttool.shards import (
    MAX_SHARD_BYTES,
    TensorJob,
    plan_shards,
    work_key,
    write_shards,
)
from porttool.sources.places import SourceFiles, scratch_folder
from porttool.sources.tokenizer_files import read_tokenizer, without_tokenizer
from porttool.standing import require_free, require_space
from porttool.weights import (
    TensorInfo,
    TensorSource,
    WeightMap,
    cast,
    check_shapes,
    identity_rules,
    map_tensor,
    resolve_rules,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

FLOATS: tuple[Dtype, ...] = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Source:
    """A source that was recognised and indexed: nothing of its weights is in memory yet.

    The tokenizer's files are copied as they are, or given by name as bytes where the source keeps
    them inside or under other names. `weight_map` goes before the converter's own, where the
    table depends on what the source holds.
    """

    config: ModelConfig
    tokens: SpecialTokens
    tensors: TensorSource
    tokenizer: tuple[Path, ...] = ()
    tokenizer_data: Mapping[str, bytes] = field(default_factory=dict)
    infill: InfillTokens | None = None
    weight_map: WeightMap | None = None


class Converter(Component):
    """Reads one family from one kind of source. `name` is `family` or `family/format`.

    `refines` names the converter that this one takes precedence over when both match.
    `hub_id` is where the family's own weights are published, `shape` what they are: builds with
    random weights start from it.
    """

    family: ClassVar[str]
    source_format: ClassVar[str] = "Hugging Face folder"
    refines: ClassVar[str | None] = None
    hub_id: ClassVar[str | None] = None
    shape: ClassVar[ModelConfig | None] = None
    prompt: ClassVar[PromptTemplate | None] = None

    @abstractmethod
    def matches(self, source: Path) -> bool:
        """Return true if the source is this family's; look at configs and indexes only."""

    @abstractmethod
    def open(self, source: Path) -> Source:
        """Read the config, refusing what it does not know, and index the tensors unread."""

    def config(self, source: Path) -> ModelConfig:
        """Read the config; override this where that needs less than opening the source."""
        return self.open(source).config

    def weight_map(self, config: ModelConfig) -> WeightMap:
        """Return the table from canonical names to source names.

        The default is for tensors that have canonical names already.
        """
        return WeightMap(identity_rules(self.module(config).state_dict()))

    def prepare(
        self, source: Path, scratch: Path, progress: Progress
    ) -> AbstractContextManager[Path]:
        """Make a source readable in place: the path given is what `open` is called with.

        What this puts into the folder `scratch` is gone when the context ends.
        """
        return nullcontext(source)

    def module(self, config: ModelConfig) -> nn.Module:
        """Return the module, without memory, whose state dict is what a checkpoint must hold."""
        from porttool.nn import meta_decoder

        return meta_decoder(config)


def validated(file: Path, read: Callable[[], ModelConfig]) -> ModelConfig:
    """Run a config reader; impossible values become a SourceError naming the file."""
    try:
        return read()
    except ValidationError as error:
        raise SourceError(f"{file}: an impossible config: {explain(error)}") from error


class Refinement(Converter):
    """A converter that reads everything as another one does, and is chosen before it.

    It may come from another plugin than the one that it refines, which core finds by name.
    """

    refines: ClassVar[str]

    def __init__(self, base: Converter, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self.base = base

    @abstractmethod
    def recognises(self, config: ModelConfig) -> bool:
        """Tell this family from others that the base converter reads."""

    def matches(self, source: Path) -> bool:
        """Return true if the base reads it and its config is recognised."""
        try:
            return self.base.matches(source) and self.recognises(self.base.config(source))
        except SourceError:
            return False

    def config(self, source: Path) -> ModelConfig:
        """Read the config as the base does."""
        return self.base.config(source)

    def open(self, source: Path) -> Source:
        """Open the source as the base does."""
        return self.base.open(source)

    def weight_map(self, config: ModelConfig) -> WeightMap:
        """Return the base's table."""
        return self.base.weight_map(config)

    def prepare(
        self, source: Path, scratch: Path, progress: Progress
    ) -> AbstractContextManager[Path]:
        """Make the source readable as the base does."""
        return self.base.prepare(source, scratch, progress)

    def module(self, config: ModelConfig) -> nn.Module:
        """Return the base's module."""
        return self.base.module(config)


def convert(
    converter: Converter,
    source_path: Path,
    output: Path,
    *,
    plugin: PluginRecord,
    dtype: Dtype | None = None,
    workers: int = 2,
    replace: bool = False,
    allow_nonfinite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = SILENT,
) -> Checkpoint:
    """Turn a source into a checkpoint folder, tensor by tensor; resume what was interrupted.

    Peak resident memory stays within twice the largest tensor and a constant. `dtype` defaults to
    that of the source's weights. Raises SourceError for anything wrong with the source, by tensor
    and file.
    """
    require_free(output, MANIFEST, replace=replace, sources=[source_path])
    files_read = SourceFiles.of(source_path)
    record = SourceRecord.of(files_read, converter.options)
    with (
        scratch_folder(source_path, output) as scratch,
        naming(source_path),
        converter.prepare(source_path, scratch, progress) as readable,
    ):
        source = converter.open(readable)
        weight_map = source.weight_map or converter.weight_map(source.config)
        jobs = plan_jobs(converter, source, weight_map, dtype, allow_nonfinite)
        manifest = CheckpointManifest(
            porttool_version=version("porttool"), family=converter.family, plugin=plugin,
            source=record, config=source.config, tokens=source.tokens, prompt=converter.prompt,
            infill=source.infill, dtype=jobs[0].dtype,
            tensors={job.name: job.shape for job in jobs}, files={},
        )  # fmt: skip
        files = read_tokenizer(source.tokenizer, source.tokenizer_data, source.config.vocab_size)
        if not files:
            progress.note(without_tokenizer(source_path))
        require_space(output, sum(job.nbytes for job in jobs) + (1 << 20))
        shards = plan_shards(jobs, "model", max_shard_bytes)
        key = work_key(manifest.model_dump_json(), shards)
        with pending_folder(
            output, key, manifest=MANIFEST, replace=replace, sources=[source_path]
        ) as folder:
            progress.start(f"convert {converter.name}", sum(job.nbytes for job in jobs))
            write_shards(folder, shards, workers=workers, progress=progress)
            for name, data in files.items():
                folder.add_bytes(f"{TOKENIZER}/{name}", data)
            files_read.require_unchanged()
            folder.finish(MANIFEST, manifest.sealed(files=dict(sorted(folder.files.items()))))
            progress.finish()
    return Checkpoint.open(output, verify=False)


def plan_jobs(
    converter: Converter,
    source: Source,
    weight_map: WeightMap,
    dtype: Dtype | None,
    allow_nonfinite: bool,
) -> list[TensorJob]:
    """Account for every tensor on both sides and say how each canonical one is made."""
    infos = source.tensors.infos()
    shapes = {n: tuple(t.shape) for n, t in converter.module(source.config).state_dict().items()}
    rules = resolve_rules(shapes, weight_map, infos)
    used = {n for rule in rules.values() for n in rule.names}
    require_floats(infos, used)
    target = dtype or widest({infos[name].dtype for name in used})
    check_shapes(shapes, rules, source.tensors, source.config)
    check_duplicates(source.tensors, weight_map.duplicates)

    def make(name: str) -> Tensor:
        mapped = map_tensor(name, shapes[name], rules[name], source.tensors, source.config)
        return cast(name, mapped, target, allow_nonfinite=allow_nonfinite)

    return [
        TensorJob(name, shapes[name], target, sum(infos[n].nbytes for n in rule.names),
                  partial(make, name))
        for name, rule in rules.items()
    ]  # fmt: skip


def require_floats(infos: Mapping[str, TensorInfo], names: Iterable[str]) -> None:
    """Refuse weights that are stored as integers: they mean something else, or are quantised."""
    for name in sorted(names):
        if infos[name].dtype not in FLOATS:
            raise SourceError(
                f"{name} in {infos[name].file} is {infos[name].dtype}, not a floating-point "
                "tensor; porttool converts unquantised weights"
            )


def widest(found: Collection[str]) -> Dtype:
    """Return the type that holds every value of the floating types that were found."""
    if {"float16", "bfloat16"} <= set(found):
        return "float32"
    return next(dtype for dtype in reversed(FLOATS) if dtype in found)


def check_duplicates(tensors: TensorSource, duplicates: Mapping[str, str]) -> None:
    """Refuse a stored copy that is not one."""
    infos = tensors.infos()
    for copy, original in duplicates.items():
        if copy in infos and digest(tensors.load(copy)) != digest(tensors.load(original)):
            raise SourceError(
                f"{copy} in {infos[copy].file} differs from {original}, although the config says "
                "that they are tied; set tie_word_embeddings to false if they are not"
            )
