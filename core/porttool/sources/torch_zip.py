"""A zip-format torch file that lies somewhere inside a larger file, its tensors read in place.

torch's weights-only reader unpickles the structure alone: mapped to the meta device, tensors have
no memory, and their storages say where in the file their bytes begin. These are read by pread.
"""

from __future__ import annotations

import io
from bisect import bisect
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porttool.errors import SourceError
from porttool.sources.archive import Member, Section
from porttool.sources.safetensors_file import read_exactly
from porttool.sources.torch_file import (
    check_entries,
    info_of,
    require_safe_torch,
    span,
    unpickling,
    zip_entries,
)
from porttool.weights import TensorInfo, TensorSource

if TYPE_CHECKING:
    import zipfile

    from torch import Tensor


class TorchZip(TensorSource):
    """The tensors of one flat dictionary, saved by torch, at a place of a file.

    `label` names it in messages. Entries whose name matches a pattern of `without` are left out.
    """

    def __init__(self, path: Path, place: Member, label: str, without: Iterable[str] = ()) -> None:
        self._path = path
        self._place = place
        tree, entries = read_structure(path, place, label)
        if not isinstance(tree, dict):
            raise SourceError(f"{label}: holds {type(tree).__name__}, not a dictionary of tensors")
        patterns = tuple(without)
        self._metas = {
            str(name): value
            for name, value in tree.items()
            if not any(fnmatchcase(str(name), pattern) for pattern in patterns)
        }
        for name, value in self._metas.items():
            check_stored(name, value, entries, label)
        self._infos = {name: info_of(meta, label) for name, meta in self._metas.items()}

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return every tensor's name, shape, type and size."""
        return self._infos

    def load(self, name: str) -> Tensor:
        """Read the bytes that one tensor spans."""
        import torch

        meta = self._metas[name]
        width = meta.element_size()
        buffer = torch.empty(span(meta) * width, dtype=torch.uint8)
        start = self._place.offset + (meta.untyped_storage()._checkpoint_offset or 0)
        read_exactly(self._path, buffer, start + meta.storage_offset() * width)
        return buffer.view(meta.dtype).as_strided(tuple(meta.shape), meta.stride())


def read_structure(path: Path, place: Member, label: str) -> tuple[Any, list[zipfile.ZipInfo]]:
    """Unpickle a torch zip without its tensors' data; return it and the zip's entries, in order.

    Byte streams are let through: Transformer Engine keeps its extra state as such.
    """
    import torch

    require_safe_torch(torch.__version__)
    with io.BufferedReader(Section(path.open("rb"), place), 1 << 20) as file:
        entries = zip_entries(file, label)
        check_entries(entries, place.size, label)
        order = next((e for e in entries if e.filename.endswith("/byteorder")), None)
        if order is not None and order.file_size == len("big"):
            raise SourceError(f"{label}: was written on a big-endian machine; save it again")
        file.seek(0)
        with unpickling(label), torch.serialization.safe_globals([io.BytesIO]):
            return torch.load(file, map_location="meta", weights_only=True), entries


def check_stored(name: str, value: Any, entries: list[zipfile.ZipInfo], label: str) -> None:
    """Refuse what is not a dense tensor, or reaches beyond its entry of the zip."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise SourceError(f"{label}: {name!r} is {type(value).__name__}, not a tensor")
    if value.layout != torch.strided or value.device.type != "meta":
        raise SourceError(f"{label}: {name!r} is not a plain dense tensor")
    storage = value.untyped_storage()
    offset = storage._checkpoint_offset
    if offset is None:
        raise SourceError(f"{label}: torch {torch.__version__} does not say where {name!r} lies")
    holder = entries[max(0, bisect([e.header_offset or 0 for e in entries], offset) - 1)]
    end = (value.storage_offset() + span(value)) * value.element_size()
    held = holder.file_size if storage.nbytes() else 0
    if storage.nbytes() != held or end > held:
        raise SourceError(
            f"{label}: {name!r} needs {max(end, storage.nbytes())} bytes, its entry "
            f"{holder.filename!r} has {held}; the file is damaged"
        )
