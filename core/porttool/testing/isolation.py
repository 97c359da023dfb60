"""What a port must not do: reach for the network, or leave something behind that can run."""

from __future__ import annotations

import json
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from porttool.errors import CheckFailed
from porttool.sources.safetensors_file import SafetensorsFile


@contextmanager
def no_network() -> Iterator[None]:
    """Make every attempt to connect or to look up a host raise CheckFailed."""

    def refuse(*arguments: Any, **named: Any) -> Any:
        raise CheckFailed(f"the network was asked for: {arguments[-1:]}")

    with (
        patch("socket.socket.connect", refuse),
        patch("socket.socket.connect_ex", refuse),
        patch("socket.socket.sendto", refuse),
        patch("socket.getaddrinfo", refuse),
    ):
        yield


def require_plain(folder: Path) -> None:
    """Raise CheckFailed for a file that is a pickle, an archive or not what its suffix says."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    if not any(file.suffix == ".safetensors" for file in files):
        raise CheckFailed(f"{folder}: holds no safetensors file")
    for file in files:
        if file.suffix == ".safetensors":
            SafetensorsFile(file)
        elif file.suffix == ".json":
            json.loads(file.read_bytes())
        elif zipfile.is_zipfile(file) or is_pickle(file.read_bytes()):
            raise CheckFailed(f"{file}: is a pickle or an archive")


def is_pickle(data: bytes) -> bool:
    """Return true if the bytes begin as a pickle does, or are a whole one of the first protocols.

    Nothing is run: the opcodes are only read.
    """
    if data[:1] == pickle.PROTO:
        return True
    try:
        last = [position for _, _, position in pickletools.genops(data)][-1]
    except (ValueError, IndexError):  # UnicodeDecodeError is a ValueError
        return False
    return last == len(data) - 1
