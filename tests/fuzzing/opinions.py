"""What the formats' own libraries read from a file: where porttool reads it, they must agree."""

from __future__ import annotations

import io
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from porttool.sources.archive import Archive
from porttool.sources.npy_file import read_npy
from porttool.sources.safetensors_file import SafetensorsFile
from porttool.sources.torch_file import open_torch_file

Opinion = Callable[[Path], str]
"""Says how porttool's reading of a folder's file differs from the library's; empty if it agrees."""


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Compare tensors by name, type, shape and bytes."""
    if wrong := sorted(ours.keys() ^ theirs.keys()):
        return f"only one reads {wrong[0]!r:.60}"
    for name, tensor in ours.items():
        other = theirs[name].detach()
        if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
            return f"{name!r:.60} is {tensor.dtype} {tensor.shape} or {other.dtype} {other.shape}"
        if not as_bytes(tensor).equal(as_bytes(other)):
            return f"{name!r:.60} has other values"
    return ""


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def of_safetensors(folder: Path) -> str:
    file = SafetensorsFile(folder / "model.safetensors")
    return differing({n: file.load(n) for n in file.infos()}, load_file(file.path))


def of_torch(folder: Path) -> str:
    """torch itself reads a damaged zip in one of two ways: mapped, or record by record."""
    path = folder / "pytorch_model.bin"
    file = open_torch_file(path)
    ours = {name: file.load(name) for name in file.infos()}
    found = ""
    for mapped in (False, True) if zipfile.is_zipfile(path) else (False,):
        with warnings.catch_warnings(action="ignore"):
            theirs = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        found = differing(ours, theirs)
        if not found:
            break
    return found


def of_npy(name: str) -> Opinion:
    def compare(folder: Path) -> str:
        ours, theirs = read_npy(folder / name), np.load(folder / name, allow_pickle=False)
        same = ours.dtype.newbyteorder("=") == theirs.dtype.newbyteorder("=")
        return "" if same and np.array_equal(ours, theirs, equal_nan=True) else "another array"

    return compare


def of_tar(folder: Path) -> str:
    archive = Archive(folder / "model.nemo")
    ours = {name: archive.read(name, 1 << 30) for name in archive.names()}
    with tarfile.open(folder / "model.nemo") as tar:
        theirs = {i.name.removeprefix("./"): (tar.extractfile(i) or io.BytesIO()).read()
                  for i in tar if i.isfile()}  # fmt: skip
    same = {k.strip("/"): v for k, v in theirs.items()} == ours
    return "" if same else f"members {list(ours)!r:.200} or {list(theirs)!r:.200}"
