"""The components of one kind by name, and the plugin that each came from."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from porttool.errors import PluginError, UsageError

if TYPE_CHECKING:
    from porttool.component import Component

T = TypeVar("T", bound="Component")

ALLOW = "PORTTOOL_PLUGINS"
"""The environment variable that names the only plugins there are."""

DENY = "PORTTOOL_DISABLE_PLUGINS"
"""The environment variable that leaves plugins out."""


@dataclass(frozen=True)
class Plugin:
    """An entry point: its name, and the distribution that brought it."""

    name: str
    distribution: str
    version: str
    error: str | None = None
    """Why it could not be used; None for a healthy plugin."""

    @classmethod
    def of(cls, entry: EntryPoint) -> Self:
        """Describe an entry point that is not loaded."""
        found = entry.dist
        return cls(
            entry.name, found.name if found else "unknown", found.version if found else "unknown"
        )

    @property
    def source(self) -> str:
        """The distribution that it came in, and its version."""
        return f"{self.distribution} {self.version}"

    def __str__(self) -> str:
        """Name it with its origin."""
        return f"{self.name} of {self.source}"

    def broken(self, error: BaseException) -> Plugin:
        """Return it with the first reason why it is not used."""
        return replace(self, error=self.error or explained(error))


def names_in(variable: str) -> set[str]:
    """Return the comma-separated names in an environment variable."""
    return {name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()}


def left_out(plugins: Iterable[Plugin]) -> str:
    """Return a hint at why these plugins are not more: the environment's choice, or no metadata."""
    said = ((ALLOW, "allows only"), (DENY, "leaves out"))
    found = ((v, what, ", ".join(sorted(names_in(v)))) for v, what in said)
    chosen = "".join(f"; {v} {what}: {names}" for v, what, names in found if names)
    if chosen or any(plugins):
        return chosen
    return (
        "; no plugin is installed, not even those that come with porttool: its modules are here "
        "and its metadata are not, install it (in a clone: pip install -e .)"
    )


def explained(error: BaseException) -> str:
    """Return an error's kind and what it says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def clash(plugin: Plugin, doubles: Iterable[Plugin]) -> PluginError:
    """Say which plugins have one name: to choose among them would be a guess."""
    both = " and ".join(p.source for p in doubles if p.name == plugin.name)
    return PluginError(f"{both} bring a plugin of this name; uninstall one")


@dataclass
class Catalog(Generic[T]):
    """The components of one kind, by name."""

    kind: str
    classes: dict[str, type[T]] = field(default_factory=dict)
    origin: dict[str, Plugin] = field(default_factory=dict)
    brought: dict[str, list[Plugin]] = field(default_factory=dict)
    """Every plugin that brings a name: more than one, and the name is nobody's."""

    hint: Callable[[], str] = str
    """What an unknown name may be owed to, as text: the plugins that were set aside."""

    def get(self, name: str) -> type[T]:
        """Return a component; an unknown name is a UsageError with a suggestion."""
        if name in self.classes:
            return self.classes[name]
        aside = self.hint()
        close = [] if name in aside else difflib.get_close_matches(name, self.classes, n=1)
        place = "; a path or a hub id is given without an option" if "/" in name else ""
        hint = f"; did you mean {close[0]!r}?" if close else place
        if close and self.kind == "converter" and name.startswith(f"{close[0]}-"):
            hint += f" One of its models is a SOURCE, as OWNER/{name}"
        known = ", ".join(sorted(self.classes)) or "none"
        raise UsageError(
            f"there is no {self.kind} named {name!r}{hint} (installed: {known}){aside}"
        )

    def add(self, component: type[T], plugin: Plugin) -> None:
        """Add a component, unless its name is taken: to choose among two would be a guess."""
        bringing = self.brought.setdefault(component.name, [])
        bringing.append(plugin)
        if len(bringing) == 1:
            self.classes[component.name] = component
            self.origin[component.name] = plugin
        elif component.name in self.classes:
            del self.classes[component.name], self.origin[component.name]

    def clashes(self) -> Iterator[tuple[Plugin, PluginError]]:
        """Yield every plugin that shares a name with another, and what is to be said of it."""
        for name, several in self.brought.items():
            said = (
                f"the {self.kind} {name!r} comes from two plugins: "
                f"{', and '.join(map(str, several))}; uninstall one, or name it in {DENY}"
            )
            yield from ((p, PluginError(said)) for p in several if len(several) > 1)

    def __iter__(self) -> Iterator[type[T]]:
        """Iterate over the components in order of name."""
        return iter(self.classes[name] for name in sorted(self.classes))
