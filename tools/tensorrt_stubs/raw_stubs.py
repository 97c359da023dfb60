"""Run pybind11-stubgen on the TensorRT bindings; started by make_stubs.py, once a version.

Docstrings of the bindings still hold C++ type names such as `nvinfer1::ILayer`. Each is replaced
by the Python class of that name, or by `object` where there is none.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import pybind11_stubgen
import tensorrt_bindings
from pybind11_stubgen.parser.mixins import parse

MODULE = "tensorrt_bindings.tensorrt"
CLASSES = {n for n, v in vars(tensorrt_bindings.tensorrt).items() if isinstance(v, type)}
RENAMED = {
    "IParser": "OnnxParser", "IParserError": "ParserError", "IBuilder": "Builder",
    "IParserRefitter": "OnnxParserRefitter", "IRuntime": "Runtime", "IRefitter": "Refitter",
    "IEngineInspector": "EngineInspector", "ILoggerSeverity": "ILogger.Severity",
    "Dims64": "Dims", "PluginFieldCollection": "PluginFieldCollection_",
}  # fmt: skip
"""C++ names that the bindings changed."""


def translate(text: Any) -> Any:
    """Replace C++ type names in a string; hand on anything else as it is."""
    if not isinstance(text, str):
        return text
    text = re.sub(r"std::vector<([\w:]+)[^()]*?>+", r"list[\1]", text)
    return re.sub(r"\b(?:nvinfer1|nvonnxparser|tensorrt)::([\w:]+)", python_name, text)


def python_name(match: re.Match[str]) -> str:
    """Return the Python class of one C++ name."""
    last = match.group(1).split("::")[-1]
    name = RENAMED.get(last, last)
    return f"{MODULE}.{name}" if name.split(".")[0] in CLASSES else "object"


def install() -> None:
    """Make the generator's parser see translated text."""
    parser = parse.ExtractSignaturesFromPybind11Docstrings
    docstring = parser.parse_function_docstring

    def with_lines(self: Any, name: Any, lines: list[str], *args: Any, **keywords: Any) -> Any:
        return docstring(self, name, [translate(line) for line in lines], *args, **keywords)

    parser.parse_function_docstring = with_lines
    for method in ("parse_annotation_str", "parse_args_str"):
        setattr(parser, method, with_text(getattr(parser, method)))


def with_text(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a parser's method that translates its first argument."""

    def call(self: Any, text: Any, *args: Any, **keywords: Any) -> Any:
        return original(self, translate(text), *args, **keywords)

    return call


if __name__ == "__main__":
    install()
    pybind11_stubgen.main(["tensorrt_bindings", "-o", sys.argv[1]])
