"""Programs of bench/, docs/ and examples/ as modules, of which tests use the parts."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def imported(name: str) -> Any:
    """Return the module of a program that is named by its path in the repository."""
    spec = spec_from_file_location(Path(name).stem, ROOT / name)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
