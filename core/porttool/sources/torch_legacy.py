"""torch's file format of before 1.6, its tensors mapped from the file instead of read.

Five pickles (a magic number, a version, the writer's system, the tree, the storages' keys), then
for each key eight bytes of length and the raw elements. torch.load reads such a file whole; here
its weights-only unpickler builds the tree twice, first without memory, to learn where the data
begins, then on a memory map.
"""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import TypedStorage

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
PREFIX = pickle.dumps(MAGIC, protocol=2)


@dataclass(frozen=True)
class Stored:
    """A storage as the tree's pickle names it."""

    key: str
    dtype: Any
    n_elements: int

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return int(self.n_elements * self.dtype.itemsize)


def is_legacy(path: Path) -> bool:
    """Tell the format by its first bytes."""
    with path.open("rb") as file:
        return file.read(len(PREFIX)) == PREFIX


def load_legacy(path: Path) -> Any:
    """Return the tree; raises what torch.load raises, and ValueError for a file that lies."""

    with path.open("rb") as file:
        if (unpickle(file), unpickle(file)) != (MAGIC, PROTOCOL):
            raise ValueError("another version of the format")
        if not unpickle(file)["little_endian"]:
            raise ValueError("written on a big-endian machine")
        begin = file.tell()
        found: dict[str, Stored] = {}

        def note(stored: Stored) -> TypedStorage:
            if found.setdefault(stored.key, stored) != stored:
                raise ValueError(f"storage {stored.key} has two sizes or types")
            return without_memory(stored)

        unpickle(file, note)
        places = find_places(file, unpickle(file), found, path.stat().st_size)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        storages: dict[str, TypedStorage] = {}

        def mapped(stored: Stored) -> TypedStorage:
            if stored.key not in storages:
                storages[stored.key] = typed(map_bytes(data, places[stored.key], stored), stored)
            return storages[stored.key]

        file.seek(begin)
        return unpickle(file, mapped)


def map_bytes(data: mmap.mmap, offset: int, stored: Stored) -> Any:
    """Return a storage that is a stretch of the file."""
    import torch

    if stored.nbytes == 0:
        return torch.UntypedStorage(0)
    flat = torch.frombuffer(data, dtype=torch.uint8, count=stored.nbytes, offset=offset)
    return flat.untyped_storage()


def without_memory(stored: Stored) -> TypedStorage:
    """Return a storage that is none, for unpickling a tree's structure."""
    import torch

    return typed(torch.UntypedStorage(stored.nbytes, device="meta"), stored)


def typed(storage: Any, stored: Stored) -> TypedStorage:
    """Return a storage as torch's unpickler wants it."""
    import torch

    return torch.TypedStorage(wrap_storage=storage, dtype=stored.dtype, _internal=True)


def unpickle(file: IO[bytes], load: Callable[[Stored], TypedStorage] | None = None) -> Any:
    """Read one pickle with torch's weights-only unpickler."""
    from torch._weights_only_unpickler import Unpickler

    def persistent_load(saved: Any) -> TypedStorage:
        _, storage_type, key, _, n_elements, *view = saved
        if load is None or view not in ([], [None]):
            raise ValueError("storages that are views of others")
        return load(Stored(str(key), element_type(storage_type), int(n_elements)))

    unpickler: Any = Unpickler(file, encoding="utf-8")
    unpickler.persistent_load = persistent_load
    return unpickler.load()


def element_type(storage_type: Any) -> Any:
    """Return the type of a storage's elements; one without a type has bytes."""
    import torch

    return torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype


def find_places(file: IO[bytes], keys: Any, found: dict[str, Stored], size: int) -> dict[str, int]:
    """Return where each storage's elements begin, going through all lengths to the file's end."""
    if not isinstance(keys, list) or len(keys) != len(set(keys)) or set(keys) != found.keys():
        raise ValueError("the storages are not those of the tree")
    places = {}
    at = file.tell()
    for key in keys:
        file.seek(at)
        n_elements = int.from_bytes(file.read(8), "little")
        if n_elements != found[key].n_elements:
            raise ValueError(f"storage {key} has {n_elements} elements")
        places[key] = at + 8
        at += 8 + found[key].nbytes
        if at > size:
            raise ValueError(f"the file ends before storage {key} does")
    if at != size:
        raise ValueError(f"{size - at} bytes too many at the end")
    return places
