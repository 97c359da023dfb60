"""Names and parameters of the bindings that our code uses, as JSON beside the tests.

    python tools/tensorrt_stubs/signatures.py .stubs/11.4 .stubs/10.13 > FILE

FILE is tests/core/engines/tensorrt_signatures.json.

The recording double of the tests is held against it: it can be no more than the real thing.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

CLASSES = (
    "Builder", "BuilderFlag", "Dims", "EngineInspector", "ExecutionContextAllocationStrategy",
    "HardwareCompatibilityLevel", "IAttention", "IAttentionInputLayer", "IBuilderConfig",
    "ICudaEngine", "IExecutionContext", "IHostMemory", "ILayer", "ILogger",
    "INetworkDefinition", "IOptimizationProfile", "IProfiler", "ITensor", "ITimingCache",
    "LayerInformationFormat", "LayerType", "MemoryPoolType", "NetworkDefinitionCreationFlag",
    "OnnxParser", "OnnxParserRefitter", "ParserError", "ProfilingVerbosity", "Refitter", "Runtime",
    "TensorIOMode",
)  # fmt: skip


def main(folders: list[str]) -> None:
    """Print the signatures of every version given."""
    found = {}
    for folder in map(Path, folders):
        tree = ast.parse((folder / "tensorrt" / "tensorrt.pyi").read_text())
        classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
        found[folder.name] = {c: members(classes, c) for c in CLASSES if c in classes}
    versions = []
    for version, by_class in found.items():
        rows = (f"  {json.dumps(c)}: {json.dumps(m)}" for c, m in sorted(by_class.items()))
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(rows) + "\n }")
    sys.stdout.write("{\n" + ",\n".join(versions) + "\n}\n")


def members(classes: dict[str, ast.ClassDef], name: str) -> dict[str, list[list[str]] | None]:
    """Return a class's members: parameter lists of a method's overloads, None for a property."""
    node = classes[name]
    found: dict[str, list[list[str]] | None] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            found.update(members(classes, base.id))
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            add_method(found, item)
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            found[item.target.id] = None
    return {k: v for k, v in found.items() if not k.startswith("__") or k == "__init__"}


def add_method(found: dict[str, list[list[str]] | None], item: ast.FunctionDef) -> None:
    """Add a method's parameters, or note a property."""
    decorators = {ast.unparse(d) for d in item.decorator_list}
    if "property" in decorators or any(d.endswith(".setter") for d in decorators):
        found[item.name] = None
        return
    parameters = [a.arg for a in item.args.posonlyargs + item.args.args if a.arg != "self"]
    known = found.get(item.name)
    found[item.name] = (
        [*(known or []), parameters] if "overload" in str(decorators) else [parameters]
    )


if __name__ == "__main__":
    main(sys.argv[1:])
