"""Building and loading the compiled code.

`decode.cpp` is compiled once, when an engine is first loaded, for the processor that is
there, and kept in the user's cache folder. Where that is impossible `NativeUnavailable` says why.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path

from porttool.folder import cache_folder

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp")


class NativeUnavailable(Exception):
    """Why the compiled path cannot be used here; never shown as an error."""


@cache
def load_library() -> ctypes.CDLL:
    """Compile the library if this machine has not yet, and load it."""
    try:
        library = ctypes.CDLL(str(build_library()))
    except (OSError, RuntimeError, ValueError) as error:
        # RuntimeError: nobody's home folder is known; ValueError: quotes in CXX that do not match
        raise NativeUnavailable(f"the compiled step does not load: {error}") from error
    library.porttool_scratch.restype = c_int64
    library.porttool_scratch.argtypes = [c_void_p, c_int64, c_int64]
    library.porttool_step.argtypes = [
        c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64
    ]  # fmt: skip
    library.porttool_decode.argtypes = [
        c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p,
        c_int64,
    ]  # fmt: skip
    library.porttool_choose.argtypes = [
        c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64
    ]  # fmt: skip
    for function in (library.porttool_step, library.porttool_decode, library.porttool_choose):
        function.restype = None
    return library


def build_library() -> Path:
    """Return the compiled library, from the cache if it was built from this source, for this CPU.

    OpenMP is left undefined in it: torch has loaded its own, and a second one would keep a second
    pool of spinning threads.
    """
    found = shutil.which("g++") or shutil.which("c++")
    compiler = shlex.split(os.environ.get("CXX", "")) or ([found] if found else [])
    if not compiler:
        raise NativeUnavailable("no C++ compiler (g++) found")
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        raise NativeUnavailable(f"not written for {platform.system()} on {platform.machine()}")
    sources = sorted(p for p in SOURCES.iterdir() if p.suffix in (".cpp", ".h"))
    machine = (cpu_flags(), *platform.libc_ver())  # a container's C library may be an older one
    identity = [*compiler, *FLAGS, *machine, *(path.read_text() for path in sources)]
    key = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    target = cache_folder() / f"decode-{key}.so"
    if not target.is_file():
        compile_library(compiler, target)
    return target


def compile_library(compiler: list[str], target: Path) -> None:
    """Compile into a temporary folder beside the target, then rename: many may try at once.

    `compiler` is a command: `CXX` may name a wrapper, or flags.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made, library = Path(folder) / "decode.o", Path(folder) / "decode.so"
            run_compiler([*compiler, *FLAGS, "-c", str(SOURCES / "decode.cpp"), "-o", str(made)])
            run_compiler([*compiler, "-shared", "-pthread", str(made), "-o", str(library)])
            library.replace(target)
    except OSError as error:
        raise NativeUnavailable(f"cannot write to {target.parent}: {error}") from error


def run_compiler(command: list[str]) -> None:
    """Run the compiler; its first complaint is the reason when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NativeUnavailable(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        lines = [line.partition("error: ")[2] for line in done.stderr.splitlines()]
        raise NativeUnavailable(next(filter(None, lines), f"{command[0]} failed"))


def cpu_flags() -> str:
    """Return what the processor can do: a home folder may be shared by unlike machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("flags")), platform.processor())
