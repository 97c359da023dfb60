"""What a plugin must be before it is used, and which plugin an error came out of."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint
from traceback import extract_tb, walk_tb
from types import ModuleType
from typing import TYPE_CHECKING, Any

from porttool import hookspecs
from porttool.catalog import Plugin
from porttool.errors import PluginError, UsageError

if TYPE_CHECKING:
    import pluggy

    from porttool.component import Component


def checked(components: Any, kind: str, bases: tuple[type[Component], ...]) -> list[Any]:
    """Return a hook's classes if they are complete components of the kind; else PluginError."""
    hook, wanted = f"porttool_{kind}s", bases[0].__name__
    if inspect.isclass(components) or not isinstance(components, Iterable):
        raise PluginError(f"{hook} returned {components!r}, not a list of {wanted} classes")
    result = []
    for component in components:
        if not (inspect.isclass(component) and issubclass(component, bases)):
            raise PluginError(f"{hook} returned {component!r}, not a {wanted} class")
        require_complete(component)
        require_options(component, alone=kind == "converter")
        result.append(component)
    return result


def require_complete(component: type[Component]) -> None:
    """Refuse a class without something that its bases declare, or that takes other arguments."""
    if absent := sorted(set(undeclared(component))):
        raise PluginError(f"{component.__qualname__} has no {', '.join(absent)}")
    if not isinstance(component.name, str):
        raise PluginError(f"{component.__qualname__} has the name {component.name!r}, not a text")
    if missing := sorted(getattr(component, "__abstractmethods__", ())):
        raise PluginError(f"{component.__qualname__} lacks {', '.join(missing)}")
    for name, method in vars(component).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            require_signature(component, name, method)


def undeclared(component: type[Component]) -> Iterator[str]:
    """Yield the class variables that a base declares and nobody gives a value.

    None is a value for those who say so themselves, and none for a base that declares it anew.
    """
    for i, base in enumerate(component.__mro__):
        for name, annotation in inspect.get_annotations(base).items():
            given = any(name in vars(finer) for finer in component.__mro__[: i + 1])
            absent = not given and getattr(component, name, None) is None
            if absent and "ClassVar" in str(annotation):
                yield name


def require_signature(component: type[Component], name: str, method: Any) -> None:
    """Refuse a method that cannot be called as the one that it overrides is called."""
    base = next((vars(b)[name] for b in component.__mro__[1:] if name in vars(b)), None)
    if not inspect.isfunction(base):
        return
    wanted = inspect.signature(base)
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = [p for p in wanted.parameters.values() if p.kind not in loose]
    by_name = {p.name: None for p in given if p.kind is p.KEYWORD_ONLY}
    try:
        inspect.signature(method).bind(*[None] * (len(given) - len(by_name)), **by_name)
    except TypeError as error:
        names = ", ".join(wanted.parameters)
        raise PluginError(
            f"{component.__qualname__}.{name} has to take ({names}): {error}"
        ) from error


def require_options(component: type[Component], *, alone: bool) -> None:
    """Refuse options that are no closed model; a component made before it is told any needs none.

    Defaults are validated, too: pydantic would take them as they are.
    """
    from pydantic import BaseModel  # 50 ms, which `porttool --help` does without

    found = component.Options
    if not (inspect.isclass(found) and issubclass(found, BaseModel)):
        raise PluginError(f"{component.__qualname__}.Options is no pydantic model")
    if found.model_config.get("extra") != "forbid":
        raise PluginError(
            f"{component.__qualname__}.Options takes unknown names silently: subclass "
            "porttool.reading.Options"
        )
    if alone:
        try:
            component.parse({})
        except UsageError as error:
            raise PluginError(
                f"{error}; every source is shown to it without options: give each a valid default"
            ) from error


def require_api(module: ModuleType) -> None:
    """Refuse a plugin that was written for another version of the hooks."""
    found = getattr(module, "api_version", None)
    if found is None:
        raise PluginError(f"its module does not say api_version = {hookspecs.API_VERSION}")
    if found != hookspecs.API_VERSION:
        raise PluginError(
            f"it says api_version = {found!r}, this porttool needs {hookspecs.API_VERSION}: "
            "install a release of it, or of porttool, that goes with the other"
        )


def require_known_hooks(manager: pluggy.PluginManager, module: ModuleType) -> None:
    """Refuse a module without a hook, and a hook whose name none has: neither would be called."""
    callers = manager.get_hookcallers(module) or ()
    for caller in callers:
        if caller.spec is None:
            close = difflib.get_close_matches(caller.name, vars(hookspecs), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise PluginError(f"there is no hook named {caller.name!r}{hint}")
    if not callers:
        plain = [name for name in vars(module) if name.startswith("porttool_")]
        said = f"; {', '.join(plain)} lacks @hookimpl" if plain else ""
        raise PluginError(f"it implements no hook{said}")


def require_new(
    before: Mapping[str, object], after: Mapping[str, object], taken: Iterable[str]
) -> None:
    """Refuse commands of names that there are already, porttool's (`taken`) or another plugin's."""
    added = {name for name in after if after[name] is not before.get(name)}
    if double := sorted(added & {*before, *taken}):
        raise PluginError(f"there is a command named {', '.join(double)} already")


def blamed(error: BaseException, entries: Iterable[EntryPoint]) -> str | None:
    """Say which plugin of another distribution an error passed through, and where; else None."""
    plugins = {entry.module.partition(".")[0]: Plugin.of(entry) for entry in entries}
    frames = zip(walk_tb(error.__traceback__), extract_tb(error.__traceback__), strict=True)
    for (frame, _), place in reversed(list(frames)):
        plugin = plugins.get(str(frame.f_globals.get("__name__")).partition(".")[0])
        if plugin is not None and plugin.distribution != "porttool":
            return (
                f"the plugin {plugin.name!r} of {plugin.source} failed in "
                f"{place.name}, {place.filename}:{place.lineno}"
            )
    return None
