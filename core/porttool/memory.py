"""Memory of tensors: large ones in huge pages where there are such, gone as soon as it is free.

Fresh memory is handed out page by page; with pages of 4 KB that takes longer than reading and
writing what they hold (Linux, Documentation/admin-guide/mm/transhuge.rst).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGE = 1 << 22
"""Bytes from which a tensor is worth pages of its own."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised contiguous tensor on the CPU."""
    import torch

    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype)
    pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them: small pages serve as well, only slower
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros on the CPU; of a large tensor no page is there before it is written.

    Raises OSError or RuntimeError where the system has not so much memory.
    """
    import torch

    if math.prod(shape) * dtype.itemsize < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(tuple(shape), dtype=dtype)
    return empty(shape, dtype)  # fresh pages of the system are zero


def packed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous copy of a tensor in a type."""
    return empty(tensor.shape, dtype).copy_(tensor)


def as_bytes(tensor: Tensor) -> memoryview:
    """View the memory of a contiguous tensor on the CPU as bytes."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def digest(tensor: Tensor) -> bytes:
    """Return the SHA-256 of a tensor's elements, to compare some that are never held together."""
    return sha256(as_bytes(tensor.contiguous())).digest()
