"""Finding the conformance cases of an installed plugin, and running them without pytest."""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from traceback import extract_tb, walk_tb

from porttool.errors import MissingExtra, PluginError, PorttoolError, UsageError, require_extra
from porttool.plugins import GROUP, Registry, allowed
from porttool.testing.family import FamilyConformance

MODULE = "conformance"
"""The module of a plugin's package that holds its cases."""


@dataclass(frozen=True)
class CheckResult:
    """How one check of one case ended; `detail` says why it failed."""

    case: str
    check: str
    passed: bool
    seconds: float
    detail: str = ""


def find_cases(registry: Registry, name: str) -> list[type[FamilyConformance]]:
    """Return the cases of a plugin, or of the plugin that brings a family of this name.

    UsageError for an unknown name or a plugin without cases, PluginError for a broken plugin.
    """
    made = registry.converters  # read before any plugin counts as healthy: a hook may fail
    plugin = find_plugin(registry, name)
    home = case_modules()[plugin]
    if plugin not in {made.origin[c.name].name for c in made}:
        raise UsageError(f"the plugin {plugin!r} brings no family of models; the kit checks those")
    if not is_there(home):
        raise UsageError(
            f"the plugin {plugin!r} has no module {home}; write a FamilyConformance there, as "
            "`porttool plugins new` does"
        )
    cases = cases_in(home)
    found = [case for case in cases if name in (plugin, case.family)]
    if not found:
        raise UsageError(f"{home} holds no FamilyConformance for {name!r}")
    return found


def case_modules() -> dict[str, str]:
    """Return where the cases of every allowed plugin belong, by the name of its entry point."""
    return {entry.name: f"{entry.module}.{MODULE}" for entry in allowed(entry_points(group=GROUP))}


def is_there(module: str) -> bool:
    """Return true if a module can be found; one below a plain module cannot."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def cases_in(module: str) -> list[type[FamilyConformance]]:
    """Import a module and return its cases; PluginError if it cannot be imported."""
    try:
        found = inspect.getmembers(import_module(module), inspect.isclass)
    except Exception as error:
        raise PluginError(f"{module}: {type(error).__name__}: {error}") from error
    cases = [case for _, case in found if issubclass(case, FamilyConformance)]
    return [case for case in cases if not inspect.isabstract(case) and hasattr(case, "family")]


def find_plugin(registry: Registry, name: str) -> str:
    """Return the entry point of this name, or the one that brings a family of this name."""
    for plugin in registry.plugins:
        if plugin.name == name and plugin.error:
            raise PluginError(f"the plugin {name!r} is broken: {plugin.error}")
        if plugin.name == name:
            return name
    origin = {c.family: registry.converters.origin[c.name].name for c in registry.converters}
    if name in registry.converters.classes:
        family = registry.converters.get(name).family
        if name != family:
            raise UsageError(f"{name!r} is one reader of a family, which is checked as a whole: "
                             f"name {family!r}")  # fmt: skip
    if name in origin:
        return origin[name]
    close = get_close_matches(name, {*origin, *(p.name for p in registry.plugins)}, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise UsageError(
        f"there is no plugin or family named {name!r}{hint}; `porttool plugins list` shows what "
        f"there is{registry.hint()}"
    )


def run_checks(case: type[FamilyConformance]) -> Iterator[CheckResult]:
    """Run every check of a case, one after the other, and yield how each ended."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars would cut through the table
    case.setup_class()
    try:
        for name in check_names(case):
            began = time.perf_counter()
            detail = failure(case, name)
            seconds = time.perf_counter() - began
            check = name.removeprefix("test_").replace("_", " ")
            yield CheckResult(case.__name__, check, detail is None, seconds, detail or "")
    finally:
        case.teardown_class()


def check_names(case: type[FamilyConformance]) -> list[str]:
    """Return the names of a case's checks in the order in which they are written."""
    defined = [name for base in reversed(case.__mro__) for name in vars(base)]
    return [name for name in dict.fromkeys(defined) if name.startswith("test_")]


def failure(case: type[FamilyConformance], check: str) -> str | None:
    """Run one check; return why it failed, or None. MissingExtra if it cannot be run here."""
    try:
        getattr(case(), check)()
    except MissingExtra:
        raise  # which says nothing of the family
    except PorttoolError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - a stranger's case must not end the others
        if "transformers" in sys.modules or getattr(error, "name", "") == "transformers":
            require_extra("reference", "transformers")  # which the family is not to blame for
        return f"{type(error).__name__}: {error} ({place_of(error, case)})"
    return None


def place_of(error: Exception, case: type[FamilyConformance]) -> str:
    """Return the innermost function and line of the case's package that an error passed through."""
    package = case.__module__.partition(".")[0]
    tops = [str(f.f_globals.get("__name__")) for f, _ in walk_tb(error.__traceback__)]
    places = list(zip(tops, extract_tb(error.__traceback__), strict=True))
    own = [place for top, place in places if top.partition(".")[0] == package]
    place = own[-1] if own else places[-1][1]
    return f"{place.name}, {Path(place.filename).name}:{place.lineno}"
