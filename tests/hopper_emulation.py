"""Builds kernels of engines/torch/hopper for a CPU, on the machine that tests/hopper emulates."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from shutil import which
from tempfile import mkdtemp

import pytest
from torch import Tensor

from porttool.engines.torch import cuda_hopper

KERNELS = cuda_hopper._SOURCES
MACHINE = Path(__file__).parent / "hopper"
SHARED_MEMORY = r"extern __shared__ (__align__\(\d+\) )?char (\w+)\[\];"
NOT_BROKEN = ("", "")
LEFT_OUT = 'extern "C" int left_out; int left_out = -1;'
UNMARKED = {ord(mark): None for mark in "«»"}
needs_compiler = pytest.mark.skipif(which("c++") is None, reason="needs a C++ compiler")


class Late(ctypes.Structure):
    """Memory that the kernel before writes, and what it holds when that ends."""

    _fields_ = (("to", ctypes.c_void_p), ("source", ctypes.c_void_p), ("bytes", ctypes.c_long))


def described(tensor: Tensor, box: tuple[int, ...]) -> tuple[int, ...]:
    """Say of a tensor what the emulated copies read: address, sides, strides and sides of a box."""
    sides = [*reversed(tensor.shape), 1][:3]
    strides = [s * tensor.itemsize for s in reversed(tensor.stride()[:-1])]
    words = (tensor.data_ptr(), *sides, *[*strides, 0][:2], *[*box, 1][:3])
    return words + (0,) * (16 - len(words))


@cache
def emulated(
    machine: Sequence[str], kernel: Sequence[str], run: str,
    defined: Sequence[tuple[str, object]], broken: tuple[str, str] = NOT_BROKEN,
    leaving: Sequence[str] = (),
) -> ctypes.CDLL:  # fmt: skip
    """Return a library of what stands for the machine, the kernel's files and what runs it.

    defined: macros; `broken` is something in the kernel's source and what takes its place. Of
    `leaving`, places with «a statement», the one that the library's `left_out` counts is left out:
    many broken kernels for the time that one takes to compile.
    """
    source = "\n".join((KERNELS / name).read_text() for name in kernel)
    for number, place in enumerate(leaving):
        whole = place.translate(UNMARKED)
        assert whole in source
        left_out = place.replace("«", f"if (left_out != {number}) ").replace("»", "")
        source = source.replace(whole, left_out, 1)
    assert broken[0] in source
    source, found = re.subn(SHARED_MEMORY, r"char* \2 = emulated_memory();", source)
    assert found == 1
    before, after = ([(MACHINE / name).read_text() for name in names] for names in (machine, [run]))
    file = Path(mkdtemp()) / "kernel.cpp"
    file.write_text("\n".join([LEFT_OUT, *before, source.replace(*broken, 1), *after]))
    flags = [f"-D{key}={value}" for key, value in defined]
    library = file.with_suffix(".so")
    command = ["c++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *flags, file, "-o", library]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))
