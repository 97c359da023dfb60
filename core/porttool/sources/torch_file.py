"""One pickled torch file (.bin, .pt, .ckpt), unpickled by torch's weights-only reader alone.

The memory map makes reading lazy; each tensor is copied out and its pages are given back, so that
resident memory stays bounded. torch before 2.10 is refused: its weights-only reader can be made
to corrupt memory (GHSA-63cw-57p8-fm3p).
"""

from __future__ import annotations

import ctypes
import io
import mmap
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from porttool.config import dtype_name
from porttool.errors import SourceError
from porttool.memory import as_bytes, empty
from porttool.sources.places import refuse_pointer
from porttool.sources.torch_legacy import (
    Stored,
    is_legacy,
    load_legacy,
    unpickle,
    without_memory,
)
from porttool.weights import TensorInfo, TensorSource

if TYPE_CHECKING:
    from torch import Tensor, TypedStorage

SAFE_TORCH = (2, 10)
BLOCK = 1 << 22
"""Elements of a mapped tensor that are copied before their pages are given back."""
OWN_MEMORY = Path("/proc/self/mem")
"""This process's memory as a file, on Linux (proc(5))."""


class TensorTree(TensorSource):
    """Tensors that `load_tree` returned, by name; `mapped` when they are pages of the file."""

    def __init__(self, tensors: Mapping[str, Tensor], file: str, *, mapped: bool) -> None:
        self._tensors = dict(tensors)
        self._mapped = mapped
        self._infos = {name: info_of(tensor, file) for name, tensor in tensors.items()}

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return every tensor's name, shape, type and size."""
        return self._infos

    def load(self, name: str) -> Tensor:
        """Copy one tensor out of the map, giving its pages back as they are copied."""
        tensor = self._tensors[name].detach()
        if not self._mapped:
            return tensor.clone()
        flat = tensor.as_strided((span(tensor),), (1,))
        copy = empty(flat.shape, flat.dtype)
        for old, new in zip(flat.split(BLOCK), copy.split(BLOCK), strict=True):
            copy_pages(old, new, self._infos[name].file)
            release_pages(old)
        return copy.as_strided(tensor.shape, tensor.stride())


def info_of(tensor: Tensor, file: str) -> TensorInfo:
    """Return what is known of a tensor of torch's own in a file."""
    return TensorInfo(tuple(tensor.shape), dtype_name(tensor.dtype), tensor.nbytes, file)


def span(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last in memory."""
    if tensor.numel() == 0:
        return 0
    reach = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in reach)


def copy_pages(old: Tensor, new: Tensor, file: str) -> None:
    """Copy flat pages of a file, by the kernel, which says so where the file has been cut since.

    Touching such a page would end the process (mmap(2), SIGBUS).
    """
    if not OWN_MEMORY.exists():
        new.copy_(old)
        return
    view = as_bytes(new)
    with OWN_MEMORY.open("rb", buffering=0) as memory:
        memory.seek(old.data_ptr())
        while view:
            try:
                view = view[memory.readinto(view) :]
            except OSError as error:
                raise SourceError(
                    f"{file}: ended early; it is truncated or changed while read"
                ) from error


def open_torch_file(path: Path) -> TensorTree:
    """Open a file that holds one flat dictionary of tensors."""
    tree = load_tree(path)
    if not isinstance(tree, dict):
        raise SourceError(f"{path}: holds {type(tree).__name__}, not a dictionary of tensors")
    return TensorTree(only_tensors(tree, path), path.name, mapped=True)


def only_tensors(tree: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Return the dictionary if every value is a dense tensor under a string; else SourceError."""
    import torch

    for name, value in tree.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise SourceError(f"{path}: {name!r} is {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.device.type != "cpu":
            raise SourceError(f"{path}: {name!r} is not a plain dense tensor")
    return dict(tree)


def load_tree(path: Path, safe: Sequence[Any] = ()) -> Any:
    """Unpickle a torch file with the weights-only reader; anything else in it is a SourceError.

    The tensors are pages of the file; copy what is to be kept, as `TensorTree` does.
    `safe` are classes, or pairs of a stand-in and a name, that may be there beside tensors.
    """
    import torch

    require_safe_torch(torch.__version__)
    if not path.is_file():
        raise SourceError(f"{path}: the file is missing")
    refuse_pointer(path)
    zipped = is_zip(path, str(path))
    entries = check_zip(path) if zipped else []
    with unpickling(str(path)), torch.serialization.safe_globals(list(safe)):
        if zipped:
            check_records(path, entries)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if is_legacy(path):
            return load_legacy(path)
        raise ValueError("it is in neither of torch.save's formats")


def load_bytes(data: bytes, label: str) -> Any:
    """Unpickle a small torch file from memory, under the same rules; `label` is for messages."""
    import torch

    require_safe_torch(torch.__version__)
    file = io.BytesIO(data)
    if is_zip(file, label):
        check_entries(zip_entries(file, label), len(data), label)
    file.seek(0)
    with unpickling(label):
        return torch.load(file, map_location="cpu", weights_only=True)


@contextmanager
def unpickling(label: str) -> Iterator[None]:
    """Turn whatever torch raises about a file into a SourceError naming it; drop its warnings."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except pickle.UnpicklingError as error:
        raise SourceError(
            f"{label}: refused, because it is damaged or its pickle wants more than tensors: "
            f"{reason(error)}"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError,
            AssertionError, IndexError, OverflowError, MemoryError, OSError,
            struct.error) as error:  # fmt: skip
        raise SourceError(
            f"{label}: cannot be read, it is truncated or damaged: {reason(error)}"
        ) from error


def reason(error: BaseException) -> str:
    """Return the first telling line of torch's long message, without its advice to trust files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    text = (telling or lines or [type(error).__name__])[0]
    return text.split("Please use")[0].split("WeightsUnpickler error: ")[-1][:300]


def require_safe_torch(version: str) -> None:
    """Refuse a torch whose weights-only reader is known to be unsafe."""
    major, minor = (int(part) for part in version.split("+")[0].split(".")[:2])
    if (major, minor) < SAFE_TORCH:
        raise SourceError(
            f"reading pickled weights needs torch 2.10 or newer, this is {version}; "
            "update torch or convert from safetensors"
        )


def is_zip(file: Path | IO[bytes], label: str) -> bool:
    """Tell a zip by its last bytes; one that says impossible things there is a SourceError."""
    try:
        return zipfile.is_zipfile(file)
    except (zipfile.BadZipFile, ValueError, OSError, struct.error) as error:
        raise SourceError(f"{label}: the archive is truncated or damaged: {error}") from error


def check_zip(path: Path) -> list[zipfile.ZipInfo]:
    """Refuse archives with compressed, doubled or overlapping entries before torch sees them."""
    with path.open("rb") as file:
        entries = zip_entries(file, str(path))
    check_entries(entries, path.stat().st_size, str(path))
    return entries


def check_records(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Hold every storage that the pickle names to the size of its record.

    Mapped, torch would read on into the next record and take that for weights.
    """
    import torch

    sizes = {entry.filename: entry.file_size for entry in entries}
    archive = entries[0].filename.partition("/")[0] if entries else ""

    def note(stored: Stored) -> TypedStorage:
        held = sizes.get(f"{archive}/data/{stored.key}", 0)
        if stored.nbytes and stored.nbytes != held:
            raise SourceError(
                f"{path}: a tensor needs {stored.nbytes} bytes, its record "
                f"'data/{stored.key:.100}' has {held}; the file is damaged"
            )
        return without_memory(stored)

    reader: Any = torch._C.PyTorchFileReader(str(path))
    unpickle(io.BytesIO(reader.get_record("data.pkl")), note)


def zip_entries(file: IO[bytes], label: str) -> list[zipfile.ZipInfo]:
    """Return the entries of a zip in the order of their places."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = sorted(archive.infolist(), key=lambda e: e.header_offset)
        for entry in entries:
            require_header(file, entry)
        return entries
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error) as error:
        raise SourceError(f"{label}: the archive is truncated or damaged: {error}") from error


def require_header(file: IO[bytes], entry: zipfile.ZipInfo) -> None:
    """Raise BadZipFile where an entry has no header of its name: torch reads its place there."""
    file.seek(entry.header_offset)
    header = file.read(30)
    name = file.read(int.from_bytes(header[26:28], "little"))
    encoding = "utf-8" if entry.flag_bits & 0x800 else "cp437"
    if header[:4] != b"PK\3\4" or name != entry.orig_filename.encode(encoding):
        raise zipfile.BadZipFile(f"there is no header of {entry.filename!r:.100} in its place")


def check_entries(entries: list[zipfile.ZipInfo], size: int, label: str) -> None:
    """Refuse entries that are compressed, doubled, overlapping or beyond the end."""
    if len({e.filename for e in entries}) != len(entries):
        raise SourceError(f"{label}: the archive holds an entry twice")
    end = 0
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise SourceError(f"{label}: the entry {entry.filename!r} is compressed")
        if entry.header_offset < end:
            raise SourceError(f"{label}: the entry {entry.filename!r} overlaps another")
        end = entry.header_offset + entry.file_size
    if end > size:
        raise SourceError(f"{label}: an entry reaches beyond the file's end")


def release_pages(tensor: Tensor) -> None:
    """Give the whole pages of a contiguous, file-mapped tensor back; they are read when touched.

    Never call it on memory that is not a file's: its contents would be gone.
    """
    end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = end // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
