"""Kernel timings kept between builds: one file for each GPU model, TensorRT version and level."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_file(folder: Path, *, version: str, gpu: str, capability: str, level: int) -> Path:
    """Return the file that timings of this combination may be taken from: no other is valid."""
    gpu = re.sub(r"\W+", "-", gpu)
    return folder / f"tensorrt-{version}-{gpu}-sm{capability}-level{level}.timing"


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold a file's lock, so that builds side by side do not lose each other's timings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read_cache(path: Path | None) -> bytes:
    """Return a cache file's bytes, or none if there is no file."""
    return path.read_bytes() if path is not None and path.is_file() else b""


def replace_file(path: Path, data: bytes) -> None:
    """Put a file in place at once: a reader sees the old one or the new one."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(path)
