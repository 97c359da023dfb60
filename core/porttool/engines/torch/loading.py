"""An engine's weights, from its files to a CPU or a GPU in one pass that hashes them, too.

Moves each byte once from the page cache to memory, and to a GPU from there, by its copy engine,
while the file's next piece is read. A thread a file: SHA-256 goes through a file in order, and
slower than anything else here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porttool.engines.torch.cuda_weights import allocate
from porttool.errors import CheckpointError, intact
from porttool.folder import require_record
from porttool.memory import empty
from porttool.sources.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from porttool.engine import Engine

READERS = 16
"""Files that are read at once."""

PIECE = 4 << 20
"""Bytes that are read at once; a GPU's reader locks pages for two of them, which takes time."""


class _Reader:
    """Reads tensors where they are to lie: on a CPU. `places` are their bytes, by name."""

    def __init__(self, places: Mapping[str, Tensor]) -> None:
        self.places = places

    def room(self, name: str, begin: int) -> Tensor:
        """Say where bytes from `begin` on are to be read to."""
        return self.places[name][begin : begin + PIECE]

    def filled(self, name: str, begin: int, piece: Tensor) -> None:
        """Take note that they have been."""


class _CopyingReader(_Reader):
    """Reads into two pieces of memory in turn, and lets the device copy what is in the other."""

    def __init__(self, places: Mapping[str, Tensor]) -> None:
        super().__init__(places)
        self.device = next(iter(places.values())).device
        locked = self.device.type == "cuda"
        size = min(PIECE, max(map(len, places.values())))
        self.pieces = [torch.empty(size, dtype=torch.uint8, pin_memory=locked) for _ in range(2)]
        self.copied = [torch.cuda.Event(blocking=True) if locked else None for _ in range(2)]
        self.turn = 0

    def room(self, name: str, begin: int) -> Tensor:
        """Return a piece of memory whose last copy has ended."""
        self.turn ^= 1
        if event := self.copied[self.turn]:
            event.synchronize()
        return self.pieces[self.turn][: len(self.places[name]) - begin]

    def filled(self, name: str, begin: int, piece: Tensor) -> None:
        """Enqueue its copy."""
        self.places[name][begin : begin + len(piece)].copy_(piece, non_blocking=True)
        if event := self.copied[self.turn]:
            event.record(torch.cuda.current_stream(self.device))


def load_weights(engine: Engine, device: str = "cpu") -> dict[str, Tensor]:
    """Read every tensor of an engine of one rank, from the files that the manifest knows.

    On a GPU they lie in one allocation. Raises CheckpointError for a file that is not the one that
    the manifest knows, that cannot be read, or that has a tensor of another file's; SourceError for
    one that is no safetensors file.
    """
    names = engine.weight_files()
    files = [open_weights(engine.path / name) for name in names]
    kinds = kinds_in(files)
    if device == "cpu":
        tensors = {name: empty(*kind) for name, kind in kinds.items()}
    else:
        tensors = allocate(kinds, device)
    places = {name: tensor.view(-1).view(torch.uint8) for name, tensor in tensors.items()}
    reading = _CopyingReader if places and device != "cpu" else _Reader

    def read(name: str, file: SafetensorsFile) -> None:
        # inference mode: as the caller may be in, whose tensors these are
        with torch.inference_mode(), intact(file.path):
            reader = reading(places)
            found = file.read_through(reader.room, reader.filled)
        require_record(file.path, found, engine.manifest.files[name])

    _settle(device)
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(read, names, files):
            pass
    _settle(device)
    return tensors


def _settle(device: str) -> None:
    """Wait for a GPU: the caller's stream may not be the readers', and uses the same memory."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def open_weights(path: Path) -> SafetensorsFile:
    """Read a file's header; a CheckpointError where the system does not let it be read."""
    with intact(path):
        return SafetensorsFile(path)


def kinds_in(files: Sequence[SafetensorsFile]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and type of every tensor; a CheckpointError for one that is there twice."""
    kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for file in files:
        for name, info in file.infos().items():
            if name in kinds:
                raise CheckpointError(
                    f"{file.path}: {name!r:.200} is in another of the engine's files, too; "
                    "build the engine again"
                )
            kinds[name] = info.shape, getattr(torch, info.dtype)
    return kinds
