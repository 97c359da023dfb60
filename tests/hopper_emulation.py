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

from porttool.engines.torch import cuda_persistent

KERNELS = cuda_persistent._SOURCES
MACHINE = Path(__file__).parent / "hopper"
SHARED_MEMORY = r"extern __shared__ (__align__\(\d+\) )?char (\w+)\[\];"
NOT_BROKEN = ("", "")
needs_compiler = pytest.mark.skipif(which("c++") is None, reason="needs a C++ compiler")


class Late(ctypes.Structure):
    """Memory that the kernel before writes, and what it holds when that ends."""

    _fields_ = (("to", ctypes.c_void_p), ("source", ctypes.c_void_p), ("bytes", ctypes.c_long))


@cache
def emulated(
    machine: Sequence[str], kernel: Sequence[str], run: str,
    defined: Sequence[tuple[str, object]], broken: tuple[str, str] = NOT_BROKEN,
) -> ctypes.CDLL:  # fmt: skip
    """Return a library of what stands for the machine, the kernel's files and what runs it.

    defined: macros; `broken` is something in the kernel's source and what takes its place.
    """
    source = "\n".join((KERNELS / name).read_text() for name in kernel)
    assert broken[0] in source
    source, found = re.subn(SHARED_MEMORY, r"char* \2 = emulated_memory();", source)
    assert found == 1
    before, after = ([(MACHINE / name).read_text() for name in names] for names in (machine, [run]))
    file = Path(mkdtemp()) / "kernel.cpp"
    file.write_text("\n".join([*before, source.replace(*broken, 1), *after]))
    flags = [f"-D{key}={value}" for key, value in defined]
    library = file.with_suffix(".so")
    command = ["c++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *flags, file, "-o", library]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))
