"""The rules that keep the house in order: who may import whom, what is light, what is small."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FAMILIES = sorted(p.name for p in (ROOT / "models").iterdir() if any(p.glob("porttool_*/*.py")))
SOURCES = sorted([*(ROOT / "core").rglob("*.py"), *(ROOT / "models").rglob("*.py")])
MODULES = [p for p in SOURCES if "template" not in p.parts]
HEAVY = ("torch", "transformers", "numpy", "tokenizers", "safetensors", "datasets", "onnx")
FORBIDDEN_NAMES = {"utils", "util", "common", "base", "manager", "helpers", "misc"}


def functions(path):
    """Every function of a file with the lines that it takes, its docstring left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            first = body[0].lineno if body else node.end_lineno
            yield node.name, node.end_lineno - first + 1


def test_imports_point_one_way():
    found = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout


def heavy_after(code):
    """The heavy modules that a fresh interpreter has loaded after running some code."""
    report = f"\nimport sys\nprint('\\nheavy:', *(m for m in {HEAVY!r} if m in sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True,
        timeout=120,
    )  # fmt: skip
    return found.stdout.rpartition("heavy:")[2].split()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plugins", "list"]])
def test_light_commands_import_nothing_heavy(arguments):
    code = f"from porttool.cli import invoke\nassert invoke({arguments!r}) == 0"
    assert heavy_after(code) == []


def test_the_public_names_are_few_and_light():
    import porttool

    assert heavy_after("import porttool") == []
    assert all(getattr(porttool, name) is not None for name in porttool.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = porttool.nothing


def test_the_guard_sees_what_is_heavy():
    assert heavy_after("import torch")[0] == "torch"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_named_wherever_it_must_be(family):
    package, folder = f"porttool_{family}", f"models/{family}"
    tool = PROJECT["tool"]
    assert PROJECT["project"]["entry-points"]["porttool"][family] == package
    assert folder in tool["hatch"]["build"]["dev-mode-dirs"]
    assert f"{folder}/{package}" in tool["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert folder in tool["ruff"]["src"]
    assert f"{folder}/{package}" in tool["mypy"]["files"]
    assert folder in tool["mypy"]["mypy_path"]
    assert package in tool["coverage"]["run"]["source_pkgs"]
    assert package in tool["importlinter"]["root_packages"]
    contracts = {c["name"]: c for c in tool["importlinter"]["contracts"]}
    assert package in contracts["Core knows no family"]["forbidden_modules"]
    assert package in contracts["Families know nothing of each other"]["modules"]


def test_there_are_families_to_look_at():
    assert {"gpt2", "camel5b"} <= set(FAMILIES)


def test_core_names_no_family():
    """Not even as text: what depends on a family belongs to the family."""
    named = re.compile(rf"\b(family|component|name) (==|!=|in) .*[\"']({'|'.join(FAMILIES)})")
    core = [p for p in MODULES if "core" in p.relative_to(ROOT).parts[:1]]
    assert [str(p) for p in core if named.search(p.read_text())] == []


def test_the_map_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text()
    found = [p for p in (ROOT / "core" / "porttool").iterdir() if not p.name.startswith("__")]
    names = {f"{p.name}/" if p.is_dir() else p.name for p in found if p.suffix in ("", ".py")}
    assert len(names) > 40
    assert sorted(name for name in names if f"`{name}" not in text) == []


def test_files_stay_small():
    """300 lines; a file of GPU kernels may need more."""
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in MODULES}
    large = {p: n for p, n in lines.items() if n > 300 and "kernels" not in p}
    assert large == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_read_in_five_minutes(family):
    """250 lines, its proof included: what several families need belongs into core."""
    files = [*(ROOT / "models" / family).rglob("porttool_*/**/*.py")]
    assert 0 < sum(len(f.read_text().splitlines()) for f in files) <= 250


def test_functions_stay_small():
    """60 lines, and most far fewer."""
    sizes = {f"{p.relative_to(ROOT)}:{name}": n for p in MODULES for name, n in functions(p)}
    assert {f: n for f, n in sizes.items() if n > 60} == {}
    assert statistics.median(sizes.values()) <= 10
    assert statistics.quantiles(sizes.values(), n=10)[8] <= 30


def test_no_module_is_called_after_nothing():
    assert [str(p) for p in SOURCES if p.stem in FORBIDDEN_NAMES] == []


def calls(path, owner, name):
    """Every call of owner.name in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"{owner}.{name}":
            yield node


def test_nobody_runs_strangers_code():
    """Remote code is refused outright, and pickles are read by torch's weights-only reader."""
    asked = re.compile(r"trust_remote_code(?!=False\b)")
    assert [str(p) for p in SOURCES if asked.search(p.read_text())] == []
    nodes = [node for p in MODULES for node in ast.walk(ast.parse(p.read_text()))]
    made = [ast.unparse(node) for node in nodes if isinstance(node, ast.Call)]
    fetched = [call for call in made if re.match(r"[\w.]+\.from_pretrained\(", call)]
    assert fetched
    assert [call for call in fetched if "trust_remote_code=False" not in call] == []
    loads = [ast.unparse(call) for p in MODULES for call in calls(p, "torch", "load")]
    assert loads
    assert [call for call in loads if "weights_only=True" not in call] == []
    names = ("load", "loads", "Unpickler")
    assert [str(p) for p in MODULES for name in names if [*calls(p, "pickle", name)]] == []
