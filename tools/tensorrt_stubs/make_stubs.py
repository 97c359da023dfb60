"""Type stubs of TensorRT's Python bindings, made where TensorRT itself cannot be installed.

    python tools/tensorrt_stubs/make_stubs.py --version 11.4.0.106 --output .stubs/11.4
    python tools/tensorrt_stubs/check.py .stubs/11.4

The bindings' wheel comes from the package index. Three tiny libraries (factories.c) stand in for
the native ones, so that it can be imported; pybind11-stubgen reads it; the result is corrected
until mypy takes it. Only types come of this: dtype and shape rules are not checked, nothing runs.
The output holds the vendor's docstrings: generate it, do not commit it. Needs gcc and
pybind11-stubgen.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
LIBRARIES = {"NVINFER": "nvinfer", "NVPLUGIN": "nvinfer_plugin", "NVONNX": "nvonnxparser"}
IMPLICIT = {
    "Dims": "Dims | collections.abc.Sequence[int]",
    "Weights": "Weights | numpy.ndarray[typing.Any, typing.Any]",
    "FallbackString": "str | FallbackString",
}
"""Parameter types that pybind11 converts to without being asked."""


def main() -> None:
    """Make the stubs of one version."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--version", required=True)
    parser.add_argument("--package", default="tensorrt-cu13-bindings")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        fetch_bindings(arguments.package, arguments.version, work)
        compile_libraries(arguments.version.split(".")[0], work)
        environment = {**os.environ, "LD_LIBRARY_PATH": folder, "PYTHONPATH": str(work / "wheel")}
        subprocess.run(
            [sys.executable, HERE / "raw_stubs.py", work / "raw"], check=True, env=environment,
            stderr=subprocess.DEVNULL,  # one line for each default value that is no literal
        )  # fmt: skip
        write_stubs(work / "raw" / "tensorrt_bindings", arguments.output / "tensorrt")


def fetch_bindings(package: str, version: str, work: Path) -> None:
    """Download a wheel and unpack it into work/wheel."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    wanted = ["--only-binary=:all:", "-d", str(work), f"{package}=={version}"]
    subprocess.run([*pip, *wanted], check=True)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "wheel")


def compile_libraries(major: str, work: Path) -> None:
    """Compile the stand-ins for the three native libraries."""
    for define, name in LIBRARIES.items():
        file = f"lib{name}.so.{major}"
        flags = ["-shared", "-fPIC", f"-D{define}", f"-Wl,-soname,{file}"]
        source = str(HERE / "factories.c")
        subprocess.run(["gcc", *flags, "-o", str(work / file), source], check=True)


def write_stubs(raw: Path, out: Path) -> None:
    """Write a stub package `tensorrt` that mypy accepts."""
    core = correct_types((raw / "tensorrt.pyi").read_text())
    core = core.replace("tensorrt_bindings.tensorrt.", "")
    core = re.sub(r"(?<=[(, ])in: ", "in_: ", core)  # a keyword
    core = re.sub(
        r"(\w+): ([^=,()]+?(?:\[[^\]]*\])?) = None(?=[,)])", r"\1: \2 | None = None", core
    )
    core = core.replace("get_plugin_registry() -> ...:", "get_plugin_registry() -> object:")
    core = "\n".join(default_to_the_end(line) for line in core.split("\n"))
    init = (raw / "__init__.pyi").read_text().replace("tensorrt_bindings.", "tensorrt.")
    out.mkdir(parents=True, exist_ok=True)
    future = "from __future__ import annotations\n"
    core = core.replace(future, f"{future}import builtins\n", 1)
    (out / "tensorrt.pyi").write_text(f"# mypy: ignore-errors\n{with_buffer(core)}")
    (out / "__init__.pyi").write_text(f"# mypy: ignore-errors\n{init}")


def correct_types(source: str) -> str:
    """Correct the annotations of every line outside docstrings."""
    lines, quoted = [], False
    for line in source.split("\n"):
        plain = not quoted and not line.strip().startswith('"""')
        if line.count('"""') % 2:
            quoted = not quoted
        lines.append(correct_line(line) if plain else line)
    return "\n".join(lines)


def correct_line(line: str) -> str:
    """Name the builtin bool in full, and say which arguments are converted implicitly."""
    if re.match(r"bool: DataType|__all__|from |import ", line):
        return line
    # The module has an attribute `bool`, one of its data types.
    line = re.sub(r"(?<![\w.'\"])bool(?![\w'\"])", "builtins.bool", line)
    if match := re.match(r"(\s*def \w+\()(.*)(\) -> .*)$", line):
        before, parameters, after = match.groups()
        for name, accepted in IMPLICIT.items():
            parameters = re.sub(rf": {name}(?=[,)]| =|$)", f": {accepted}", parameters)
        return before + parameters + after
    return line


def default_to_the_end(line: str) -> str:
    """Give a default to every parameter behind one that has a default."""
    match = re.match(r"(\s*def \w+\()(.*)(\) -> .*:)$", line)
    if not match or " = " not in match.group(2):
        return line
    parameters, seen = [], False
    for parameter in re.split(r", (?=\w+: )", match.group(2)):
        missing = seen and " = " not in parameter and ":" in parameter
        seen = seen or " = " in parameter
        parameters.append(f"{parameter} = ..." if missing else parameter)
    return match.group(1) + ", ".join(parameters) + match.group(3)


def with_buffer(core: str) -> str:
    """Say that a plan is a buffer: only Python 3.12 and later show it on the class."""
    if "def __buffer__" in core:
        return core
    method = "    def __buffer__(self, flags: int, /) -> memoryview: ...\n"
    before, after = core.split("class IHostMemory:\n", 1)
    return (
        before
        + "class IHostMemory:\n"
        + after.replace("    def __del__", f"{method}    def __del__", 1)
    )


if __name__ == "__main__":
    main()
