"""The canonical checkpoint: one folder, unsharded over ranks, verified before it is used.

checkpoint.json   the manifest: config, special ids, provenance, SHA-256 of every file and of itself
model*.safetensors
tokenizer/        the tokenizer's files, as they came
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError

from porttool.component import explain
from porttool.config import (
    Closed,
    Dtype,
    InfillTokens,
    ModelConfig,
    PromptTemplate,
    SpecialTokens,
)
from porttool.errors import (
    CheckpointError,
    MissingFolder,
    PorttoolError,
    SourceError,
    UsageError,
    intact,
)
from porttool.folder import FileRecord, Stamp, find_files, hash_file, verify_files
from porttool.sources.places import SourceFiles
from porttool.sources.safetensors_file import SafetensorsFile
from porttool.standing import KINDS, MAX_MANIFEST, kind_of, partial_folder

MANIFEST = "checkpoint.json"
TOKENIZER = "tokenizer"
SEAL = re.compile(rb'"seal": "[0-9a-f]*"')
UNSEALED = b'"seal": ""'


class Manifest(Closed):
    """What a folder is. `seal` is the SHA-256 of the manifest's own text with the seal empty."""

    format: str
    format_version: Literal[1] = 1
    seal: str = ""

    def sealed(self, **late: Any) -> str:
        """Return the text to write, with fields that are known only now.

        Any bit that changes in it later is found when it is read.
        """
        text = self.model_copy(update={**late, "seal": ""}).model_dump_json(indent=1)
        return text.replace(UNSEALED.decode(), f'"seal": "{seal_of(text.encode())}"', 1)


M = TypeVar("M", bound=Manifest)


def seal_of(text: bytes) -> str:
    """Return the seal that a manifest's text should have."""
    return hashlib.sha256(SEAL.sub(UNSEALED, text, count=1)).hexdigest()


class PluginRecord(Closed):
    """Which plugin made something: the component's name, its distribution and version."""

    component: str
    distribution: str
    version: str
    api_version: int


class SourceRecord(Closed):
    """Where a checkpoint came from; `fingerprint` covers names, sizes and times of its files.

    `options` are what the converter was told, without which the source may not be readable.
    """

    path: str
    fingerprint: str
    options: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def of(cls, files: SourceFiles, options: BaseModel) -> Self:
        """Describe a source, given its files as they are and what its converter was told."""
        told = options.model_dump(mode="json", exclude_none=True)
        return cls(path=str(files.source.absolute()), fingerprint=files.fingerprint, options=told)


class ModelManifest(Manifest):
    """What a checkpoint and the engines that are built from it say of their model."""

    porttool_version: str
    family: str
    source: SourceRecord
    config: ModelConfig
    tokens: SpecialTokens
    prompt: PromptTemplate | None
    infill: InfillTokens | None = None
    dtype: Dtype
    dummy: bool = False
    files: dict[str, FileRecord]


class CheckpointManifest(ModelManifest):
    """Everything about a checkpoint but its tensors."""

    format: Literal["porttool-checkpoint"] = "porttool-checkpoint"
    plugin: PluginRecord
    tensors: dict[str, tuple[int, ...]]


class Checkpoint:
    """An opened checkpoint: its manifest, and its tensors read by name and by row."""

    def __init__(
        self, path: Path, manifest: CheckpointManifest, stamps: Mapping[str, Stamp]
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.config = manifest.config
        self._stamps = dict(stamps)
        self._where: dict[str, SafetensorsFile] = {}
        for name in manifest.files:
            if name.endswith(".safetensors") and "/" not in name:
                file = SafetensorsFile(path / name)
                if double := sorted(file.infos().keys() & self._where.keys()):
                    raise CheckpointError(
                        f"{file.path}: {double[0]!r:.200} is in another of the checkpoint's files, "
                        "too; convert it again"
                    )
                self._where.update(dict.fromkeys(file.infos(), file))

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> Self:
        """Open a folder; `verify` checks every file's hash first.

        Raises CheckpointError if it is not whole, was altered, or has another format version.
        """
        manifest = read_manifest(path, MANIFEST, CheckpointManifest)
        stamps = (verify_files if verify else find_files)(path, manifest.files)
        try:
            checkpoint = cls(path, manifest, stamps)
        except SourceError as error:
            raise CheckpointError(str(error)) from error
        checkpoint.require_tensors()
        checkpoint.require_unchanged()
        return checkpoint

    def require_unchanged(self) -> None:
        """Raise CheckpointError if a file is not the one that was verified.

        One whose status alone has changed, as by another hard link, is hashed again.
        """
        for name, stamp in find_files(self.path, self.manifest.files).items():
            self._require_same(name, stamp)

    def _require_same(self, name: str, stamp: Stamp) -> None:
        known, path = self._stamps[name], self.path / name
        same = stamp == known and (
            stamp.status_changed == known.status_changed
            or hash_file(path) == self.manifest.files[name]
        )
        if not same:
            raise CheckpointError(f"{path}: changed while it was read; run the command again")
        self._stamps[name] = stamp

    def require_tensors(self) -> None:
        """Check the names, shapes and types of the tensors against the manifest."""
        wanted = self.manifest.tensors
        for name in sorted(wanted.keys() ^ self._where.keys()):
            problem = "is missing" if name in wanted else "does not belong here"
            raise CheckpointError(f"{self.path}: the tensor {name} {problem}; convert it again")
        for name, file in self._where.items():
            info = file.infos()[name]
            if info.shape != wanted[name] or info.dtype != self.manifest.dtype:
                raise CheckpointError(
                    f"{self.path}: {name} is {info.dtype} {list(info.shape)}, the manifest says "
                    f"{self.manifest.dtype} {list(wanted[name])}; convert it again"
                )

    def names(self) -> list[str]:
        """Return the canonical names of all tensors."""
        return list(self._where)

    def file_of(self, name: str) -> SafetensorsFile:
        """Return the file that holds a tensor."""
        return self._where[name]

    def weight_files(self) -> list[str]:
        """Return the names of the files that hold tensors."""
        return sorted({f.path.name for f in self._where.values()})

    def copy_file(self, name: str, target: Path, *, link: bool = False) -> None:
        """Copy one file, the one that was verified; with `link` share it where links can be."""
        source = self.path / name
        self._require_same(name, Stamp.of(source.stat()))
        if link and linked(source, target):
            stamp = Stamp.of(target.stat())
            if stamp == self._stamps[name]:
                self._stamps[name] = stamp  # the link itself has changed its status
        else:
            shutil.copyfile(source, target)
            stamp = Stamp.of(source.stat())
        self._require_same(name, stamp)

    @property
    def tokenizer_files(self) -> list[str]:
        """Names of the tokenizer's files: those of the manifest, and no others."""
        return [name for name in self.manifest.files if name.startswith(f"{TOKENIZER}/")]

    def copy_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer's files below a folder."""
        for name in self.tokenizer_files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(name, folder / name)

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer's files."""
        return self.path / TOKENIZER

    @property
    def digest(self) -> str:
        """SHA-256 over the manifest: the checkpoint's identity."""
        return hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()


def read_manifest(path: Path, name: str, model: type[M]) -> M:
    """Read and validate a folder's manifest; CheckpointError if it is missing or not ours."""
    file = path / name
    if not file.is_file():
        raise explain_missing(path, name)
    with intact(path):
        if (size := file.stat().st_size) > MAX_MANIFEST:
            raise CheckpointError(f"{file}: {size} bytes is no manifest")
        text = file.read_bytes()
    try:
        manifest = model.model_validate_json(text)
    except ValidationError as error:
        raise CheckpointError(
            f"{file}: not a manifest of this version: {explain(error)}"
        ) from error
    if manifest.seal != seal_of(text):
        raise CheckpointError(
            f"{file}: its seal is not the SHA-256 of its text; it was altered, or written before "
            "manifests were sealed, make the folder again"
        )
    return manifest


def explain_missing(path: Path, name: str) -> PorttoolError:
    """Return the error for a folder without a manifest: what it is instead, and what to do."""
    if partial_folder(path.absolute()).exists():
        return CheckpointError(
            f"{path}: there is no {name} here; an interrupted run left it half done, run it again"
        )
    wanted, found = KINDS.get(name), kind_of(path)
    if wanted is None:
        return CheckpointError(f"{path}: there is no {name} here")
    if not path.exists():
        return MissingFolder(path)
    if found is not None:
        step = ": build it first" if (found, wanted) == ("a checkpoint", "an engine") else ""
        return UsageError(f"{path}: this is {found} of porttool, not {wanted}{step}")
    if (path / "config.json").is_file():
        step = "convert and build it first" if wanted == "an engine" else "convert it first"
        return UsageError(f"{path}: this is a Hugging Face folder: {step}")
    if path.is_file():
        return UsageError(f"{path}: this is a file, not {wanted}: `porttool convert` it first")
    steps = "convert` and `build`" if wanted == "an engine" else "convert`"
    said = f"{path}: there is no {name} here, so this is not {wanted} of porttool"
    near = [p.parent for p in (path.parent / name, *sorted(path.glob(f"*/{name}"))) if p.is_file()]
    if near:
        return UsageError(f"{said}, but {', '.join(map(str, near[:3]))} is: name that")
    return CheckpointError(
        f"{said}; if it is a source, `porttool {steps} it first; if it was one, make it again"
    )


def linked(source: Path, target: Path) -> bool:
    """Share a file by a hard link; false where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True
