"""An engine: one folder that a runner loads, its manifest, and the driver that builds it.

engine.json       the manifest: kind, config, limits, versions, SHA-256 of every file and of itself
rank0/ …          what the builder wrote for each rank
tokenizer/        the tokenizer's files
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ValidationError

from porttool.builder import Builder, BuildRequest, Rank
from porttool.checkpoint import (
    TOKENIZER,
    Checkpoint,
    ModelManifest,
    PluginRecord,
    read_manifest,
)
from porttool.config import Dtype, Limits, ModelConfig
from porttool.errors import PluginError, UsageError, require_kind
from porttool.folder import FileRecord, hash_file, pending_folder, verify_files
from porttool.progress import SILENT, Progress

if TYPE_CHECKING:
    from porttool.plugins import Registry

MANIFEST = "engine.json"
PROMPT_ROWS = "max_prompt_embedding_table_size"
"""What the command line calls `max_prompt_rows`."""
DEFAULT_OUTPUT_LEN = 100


class EngineManifest(ModelManifest):
    """Everything about an engine but its weights. `built` is the builder's own record."""

    format: Literal["porttool-engine"] = "porttool-engine"
    kind: str
    builder: PluginRecord
    converter: PluginRecord
    checkpoint_digest: str
    limits: Limits
    world_size: int
    built: tuple[dict[str, Any], ...]


class Engine:
    """An opened engine folder, verified."""

    def __init__(self, path: Path, manifest: EngineManifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path, registry: Registry | None = None, *, verify: bool = True) -> Self:
        """Open a folder after checking every file's hash.

        With a registry the engine's kind must be installed, at the version that built it.
        Raises CheckpointError for a folder that is not whole, PluginError for a version clash.
        """
        manifest = read_manifest(path, MANIFEST, EngineManifest)
        if registry is not None:
            require_runner(path, manifest, registry)
            registry.require(registry.builders, manifest.builder, f"{path} was built by")
        engine = cls(path, manifest)
        if verify:
            engine.verify()
        return engine

    def verify(self, but: Collection[str] = ()) -> None:
        """Check every file's size and hash; a CheckpointError names the first that is wrong.

        Of the manifest's files named in `but`, which somebody else hashes, the size alone.
        """
        verify_files(self.path, self.manifest.files, but)

    def weight_files(self, rank: int = 0) -> list[str]:
        """Names, as the manifest has them, of the safetensors files of one rank."""
        folder = f"{self.rank_path(rank).name}/"
        names = (name for name in self.manifest.files if name.startswith(folder))
        return sorted(name for name in names if name.endswith(".safetensors"))

    def rank_path(self, rank: int = 0) -> Path:
        """Return the folder of one rank's files."""
        return self.path / f"rank{rank}"

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer's files."""
        return self.path / TOKENIZER


def require_runner(path: Path, manifest: EngineManifest, registry: Registry) -> None:
    """Raise UsageError if nothing that is installed runs an engine of this kind."""
    try:
        registry.runners.get(manifest.kind)
    except UsageError as error:
        made = f"{manifest.builder.distribution} {manifest.builder.version}"
        raise UsageError(f"{path}, built by {made}: {error!s:.1000}; install that") from error


def choose_limits(
    config: ModelConfig,
    *,
    max_batch_size: int = 8,
    max_input_len: int | None = None,
    max_output_len: int | None = None,
    max_beam_width: int = 8,
    max_prompt_rows: int = 0,
) -> Limits:
    """Fill in what was not asked for and hold the sum to the model's positions."""
    if max_output_len is None:
        room = config.n_positions - (max_input_len or config.n_positions // 2)
        max_output_len = max(1, min(DEFAULT_OUTPUT_LEN, room))
    if max_input_len is None:
        max_input_len = max(1, config.n_positions - max_output_len)
    if config.position == "learned" and max_input_len + max_output_len > config.n_positions:
        raise UsageError(
            f"--max-input-len {max_input_len} plus --max-output-len {max_output_len} is more than "
            f"the model's {config.n_positions} positions"
        )
    asked = {
        "max_batch_size": max_batch_size,
        "max_input_len": max_input_len,
        "max_output_len": max_output_len,
        "max_beam_width": max_beam_width,
        "max_prompt_rows": max_prompt_rows,
    }
    try:
        return Limits(**asked)
    except ValidationError as error:
        said = error.errors()[0]
        name = said["loc"][0] if said["loc"][0] != "max_prompt_rows" else PROMPT_ROWS
        flag = f"--{str(name).replace('_', '-')}"
        raise UsageError(f"{flag} {said['input']}: {said['msg']}") from error


def build(
    checkpoint: Checkpoint,
    builder: Builder,
    output: Path,
    *,
    plugin: PluginRecord,
    limits: Limits,
    dtype: Dtype | None = None,
    world_size: int = 1,
    replace: bool = False,
    progress: Progress = SILENT,
) -> Engine:
    """Build an engine folder from a checkpoint, all ranks one after the other.

    `dtype` defaults to the checkpoint's. The folder appears only when it is whole.
    """
    made = checkpoint.manifest
    request = BuildRequest(dtype or made.dtype, limits, made.config)
    identity = repr((checkpoint.digest, request, world_size, plugin, builder.options))
    key = hashlib.sha256(identity.encode()).hexdigest()
    with pending_folder(
        output, key, manifest=MANIFEST, replace=replace, sources=[checkpoint.path]
    ) as folder:
        built = []
        for index in range(world_size):
            out = folder.path / f"rank{index}"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            rank = Rank(index, world_size)
            found = builder.build_rank(checkpoint, request, rank, out=out, progress=progress)
            built.append(recordable(builder, found))
        checkpoint.copy_tokenizer(folder.path)
        manifest = EngineManifest(
            porttool_version=version("porttool"),
            kind=builder.name,
            family=made.family,
            builder=plugin,
            converter=made.plugin,
            checkpoint_digest=checkpoint.digest,
            source=made.source,
            config=made.config,
            tokens=made.tokens,
            prompt=made.prompt,
            infill=made.infill,
            dtype=request.dtype,
            limits=limits,
            world_size=world_size,
            dummy=made.dummy,
            built=tuple(built),
            files=record_files(folder.path),
        )
        checkpoint.require_unchanged()
        folder.finish(MANIFEST, manifest.sealed())
    return Engine.open(output, verify=False)


def recordable(builder: Builder, found: Any) -> dict[str, Any]:
    """Return what a builder says of a rank as a manifest holds it; PluginError if none can."""
    method = f"{type(builder).__qualname__}.build_rank"
    require_kind(found, Mapping, method)
    try:
        kept: dict[str, Any] = json.loads(json.dumps(dict(found)))
    except (TypeError, ValueError) as error:
        raise PluginError(f"{method} returned what JSON cannot hold: {error}") from error
    return kept


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Hash every file that a build left in a folder."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.parent != folder)
    return {f.relative_to(folder).as_posix(): hash_file(f) for f in files}
