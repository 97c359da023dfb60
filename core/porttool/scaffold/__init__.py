"""Writing a new plugin: an installable package of a family, with its proof, that passes as it is.

The skeleton reads GPT-2's arithmetic under a model type of its own; its author replaces the keys,
the weight table and the reference one after the other, and the kit says when one is wrong.
"""

from __future__ import annotations

import re
import shutil
from importlib import resources
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from string import Template

from porttool.errors import PorttoolError, UsageError, said_by_system
from porttool.plugins import GROUP
from porttool.standing import require_place

TEMPLATES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "init.py": "{package}/__init__.py",
    "converter.py": "{package}/converter.py",
    "conformance.py": "{package}/conformance.py",
    "test.py": "tests/test_{family}.py",
}
"""Template, without `.txt` → where it goes in the new package."""


def write_plugin(family: str, output: Path) -> Path:
    """Write the package of a new family below `output`; return its folder.

    UsageError for a name that is no lower-case identifier or whose package or plugin is installed,
    and for a folder that is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", family):
        raise UsageError(
            f"{family!r} cannot name a family; use lower-case letters, digits and single "
            "underscores, as in my_family"
        )
    names = {
        "family": family,
        "package": f"porttool_{family}",
        "distribution": f"porttool-{family.replace('_', '-')}",
        "title": "".join(part.capitalize() for part in family.split("_")),
    }
    if find_spec(names["package"]):
        raise UsageError(
            f"{family!r} is taken: the package {names['package']} is installed, which the new one "
            "would hide; choose another name"
        )
    if family in {entry.name for entry in entry_points(group=GROUP)}:
        raise UsageError(
            f"{family!r} is taken: a plugin of this name is installed, and two of one name are "
            "both set aside; choose another name"
        )
    folder = output / names["distribution"]
    require_place(folder)
    if folder.exists():
        raise UsageError(f"{folder} is there already; name another --output")
    try:
        for template, target in TEMPLATES.items():
            file = folder / target.format(**names)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(filled(template, names), encoding="utf-8")
    except OSError as error:
        shutil.rmtree(
            folder, ignore_errors=True
        )  # half a package would stand in the next one's way
        raise PorttoolError(said_by_system(error, folder)) from error
    return folder


def filled(template: str, names: dict[str, str]) -> str:
    """Return a template's text with the new names in it."""
    file = resources.files(__name__).joinpath("template", f"{template}.txt")
    text = file.read_text(encoding="utf-8")
    return Template(text).substitute(names)
