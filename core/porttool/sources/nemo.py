"""A `.nemo` model: an archive, or a folder that one was unpacked to. Nothing is ever extracted.

It holds `model_config.yaml`, the weights of each rank as a torch zip, and the tokenizer's files,
which the YAML names as `nemo:<file>`. Compressed archives have to be unpacked first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from porttool.errors import SourceError, importing
from porttool.sources.archive import Archive, Member, is_gzip, peek
from porttool.sources.json_file import MAX_DIGITS
from porttool.sources.ranks import STACKED, find_ranks, require_ranks
from porttool.sources.torch_zip import TorchZip
from porttool.weights import TensorSource

CONFIG = "model_config.yaml"
WEIGHTS = "model_weights.ckpt"
MAX_CONFIG = 1 << 18
MAX_DEPTH = 50
MAX_NODES = 50_000
"""Values in the YAML when every alias is written out: a few lines can stand for a billion."""
MAX_TOKENIZER = 1 << 27
_SIBLING = re.compile(r"^\$\{\.(\w+)\}$")
_EXPONENT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")


class NemoFiles:
    """The files of a model, by their names in the archive or the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir() and is_gzip(path):
            raise SourceError(f"{path}: is compressed; `porttool convert` unpacks it first")
        self._archive = None if path.is_dir() else Archive(path)
        if self._archive is not None:
            self.names = self._archive.names()
        else:
            files = (f for f in sorted(path.rglob("*")) if f.is_file())
            self.names = [f.relative_to(path).as_posix() for f in files]

    def read(self, name: str, limit: int) -> bytes:
        """Return a small file whole; SourceError if it is missing or larger than that."""
        if self._archive is not None:
            return self._archive.read(name, limit)
        file = self.path / name
        if not file.is_file() or file.stat().st_size > limit:
            raise SourceError(f"{file}: the file is missing, or larger than {limit} bytes")
        return file.read_bytes()

    def tensors(self, name: str, without: Iterable[str]) -> TensorSource:
        """Index a torch zip where it lies; names that match a pattern of `without` are left out."""
        if self._archive is None:
            file = self.path / name
            return TorchZip(file, Member(0, file.stat().st_size), str(file), without)
        place = Member(self._archive.offset(name) or 0, self._archive.size(name))
        return TorchZip(self.path, place, f"{self.path.name}: {name}", without)

    def rank_files(self, tp: int, pp: int) -> Mapping[tuple[int, int], str]:
        """Return the weight file of every (tensor-parallel rank, pipeline stage).

        Raises SourceError for a rank that is missing, and for layer-stacked checkpoints.
        """
        stacked = [n for n in self.names if PurePosixPath(n).name in STACKED]
        if stacked:
            raise SourceError(
                f"{self.path}: {stacked[0]} is of a distributed checkpoint, whose layers are "
                "stacked in one tensor; porttool does not read these: export it in NeMo with "
                "dist_ckpt_format off, or as a Hugging Face folder"
            )
        folders = {PurePosixPath(n).parent.as_posix(): n for n in self.names
                   if PurePosixPath(n).name == WEIGHTS}  # fmt: skip
        if set(folders) == {"."} and (tp, pp) == (1, 1):
            return {(0, 0): folders["."]}
        grid = find_ranks(folders, str(self.path))
        require_ranks(grid, tp, pp, str(self.path))
        return {place: folders[folder] for place, folder in grid.items()}

    def artifact(self, value: object) -> bytes | None:
        """Return the file that a YAML value like `nemo:<file>` names; None where it names none."""
        if not isinstance(value, str) or not value:
            return None
        name = PurePosixPath(value.removeprefix("nemo:")).name
        if name not in self.names:
            raise SourceError(f"{self.path}: {CONFIG} names {value!r:.200}, which is not there")
        return self.read(name, MAX_TOKENIZER)


def locate_model(path: Path) -> Path:
    """Return the archive of a folder that holds just one, as a fetched repository does."""
    if path.is_dir() and not (path / CONFIG).is_file():
        archives = sorted(path.glob("*.nemo"))
        return archives[0] if len(archives) == 1 else path
    return path


def read_nemo_config(path: Path) -> dict[str, Any]:
    """Read model_config.yaml of an archive, compressed or not, or of a folder."""
    if path.is_dir():
        file = path / CONFIG
        data = file.read_bytes() if file.is_file() else None
    else:
        data = peek(path, CONFIG, MAX_CONFIG)
    if data is None or len(data) > MAX_CONFIG:
        raise SourceError(f"{path}: there is no {CONFIG} here, or one far too large")
    values = parse_yaml(data, path)
    return {key: resolved(values, key, path) for key in values}


def tunes_prompts(values: Mapping[str, Any]) -> bool:
    """Tell prompt learning's YAML from a model's.

    Since NeMo 1.19 it is the model's own with `peft_scheme: ptuning` in it.
    """
    peft = values.get("peft")
    scheme = peft.get("peft_scheme") if isinstance(peft, Mapping) else None
    return "virtual_prompt_style" in values or scheme == "ptuning"


def parse_yaml(data: bytes, path: Path) -> dict[str, Any]:
    """Parse a YAML mapping without constructing anything but plain values."""
    with importing("gpt-next", "yaml"):
        import yaml
    try:
        values = construct(shallow(yaml.SafeLoader)(data))
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise SourceError(f"{path}: {CONFIG} is damaged: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise SourceError(f"{path}: {CONFIG} should hold a mapping")
    return values


def shallow(loader: type[Any]) -> type[Any]:
    """Return a YAML loader that refuses depth: its scanner's time grows with the square of it."""

    class Shallow(loader):  # type: ignore[misc]
        def fetch_flow_collection_start(self, token: type[Any]) -> None:
            require_depth(self.flow_level)
            super().fetch_flow_collection_start(token)

        def add_indent(self, column: int) -> Any:
            require_depth(len(self.indents))
            return super().add_indent(column)

    return Shallow


def require_depth(depth: int) -> None:
    """Raise ValueError for values within more values than any config has."""
    if depth > MAX_DEPTH:
        raise ValueError(f"values nested more than {MAX_DEPTH} deep")


def construct(loader: Any) -> Any:
    """Return what a YAML loader's document holds, once it is known to be small."""
    try:
        node = loader.get_single_node()
        require_small(node)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def require_small(root: Any) -> None:
    """Raise ValueError for a document that aliases blow up, or with numbers that cannot be any."""
    waiting = [root]
    for _ in range(MAX_NODES):
        if not waiting:
            return
        node = waiting.pop()
        if isinstance(node.value, list):
            children = (child if isinstance(child, tuple) else (child,) for child in node.value)
            waiting.extend(each for child in children for each in child)
        elif node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
            raise ValueError(f"a number of {len(node.value)} digits")
    raise ValueError(f"more than {MAX_NODES} values")


def resolved(values: Mapping[str, Any], key: str, path: Path) -> Any:
    """Return a value with `${.other}` replaced by what it refers to, and 1e-5 read as a number.

    YAML 1.1 takes a number without a point before its exponent for text; NeMo does not.
    """
    value = values[key]
    for _ in values:
        sibling = _SIBLING.match(value) if isinstance(value, str) else None
        if sibling is None:
            break
        if sibling[1] not in values:
            raise SourceError(
                f"{path}: {key!r} in {CONFIG} refers to {value:.200}, which is not there"
            )
        value = values[sibling[1]]
    else:
        raise SourceError(f"{path}: {key!r} in {CONFIG} refers to itself")
    return float(value) if isinstance(value, str) and _EXPONENT.match(value) else value
