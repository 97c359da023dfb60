"""Finding plugins and what they bring. A broken plugin is set aside, named and explained.

Everything goes through the entry-point group `porttool`, core's own engines and evaluators too.
`PORTTOOL_PLUGINS` (a comma-separated list of entry-point names) allows only those,
`PORTTOOL_DISABLE_PLUGINS` leaves those out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from porttool import hookspecs
from porttool.catalog import ALLOW, DENY, Catalog, Plugin, clash, explained, left_out, names_in
from porttool.errors import PluginError, PorttoolError, SourceError, UsageError
from porttool.vetting import blamed, checked, require_api, require_known_hooks, require_new

if TYPE_CHECKING:
    import click

    from porttool.builder import Builder
    from porttool.checkpoint import PluginRecord
    from porttool.converter import Converter
    from porttool.evaluator import Evaluator
    from porttool.prompt_table import TableConverter
    from porttool.runner import Runner

GROUP = "porttool"


class Registry:
    """Every installed plugin and what it brings, by kind and name."""

    def __init__(self, manager: pluggy.PluginManager, plugins: list[Plugin]) -> None:
        self._manager = manager
        self.plugins = plugins

    @cached_property
    def converters(self) -> Catalog[Converter]:
        """Converters by name."""
        from porttool.converter import Converter
        from porttool.prompt_table import TableConverter

        return self._collect("converter", Converter, TableConverter)

    @cached_property
    def tables(self) -> Catalog[TableConverter]:
        """Converters of prompt tables by name; plugins bring them among their converters."""
        from porttool.converter import Converter
        from porttool.prompt_table import TableConverter

        return self._collect("converter", TableConverter, Converter)

    @cached_property
    def builders(self) -> Catalog[Builder]:
        """Builders by the kind of engine."""
        from porttool.builder import Builder

        return self._collect("builder", Builder)

    @cached_property
    def runners(self) -> Catalog[Runner]:
        """Runners by the kind of engine."""
        from porttool.runner import Runner

        return self._collect("runner", Runner)

    @cached_property
    def evaluators(self) -> Catalog[Evaluator]:
        """Evaluators by name."""
        from porttool.evaluator import Evaluator

        return self._collect("evaluator", Evaluator)

    @property
    def catalogs(self) -> tuple[Catalog[Any], ...]:
        """All catalogs; reading them is what finds a broken hook."""
        return (self.converters, self.tables, self.builders, self.runners, self.evaluators)

    def converter(self, name: str, options: Mapping[str, Any] | None = None) -> Converter:
        """Return a converter, standing on the one that it refines."""
        from porttool.converter import Refinement

        found = self.converters.get(name)
        if issubclass(found, Refinement):
            return found(self.converter(found.refines), options)
        return found(options)

    def recognisers(self, source: Path, names: Iterable[str] | None = None) -> list[Converter]:
        """Return the converters (of those named) that match a source and that none refines."""
        failed: dict[str, Exception] = {}
        tried = list(names or self.converters.classes)
        matching = [c for name in tried if (c := self._matching(name, source, failed))]
        self._account_for(failed, {converter.name for converter in matching})
        refined = {converter.refines for converter in matching}
        return [converter for converter in matching if converter.name not in refined]

    def readers(self, source: Path) -> list[Converter | TableConverter]:
        """Return what recognises a source, as a model or as a prompt table."""
        tables = [table() for table in self.tables]
        return [*self.recognisers(source), *(t for t in tables if t.matches(source))]

    def _matching(self, name: str, source: Path, failed: dict[str, Exception]) -> Converter | None:
        """Return a converter if it matches; keep what went wrong with it otherwise."""
        try:
            converter = self.converter(name)
        except PorttoolError as error:  # it refines what is not installed
            failed[name] = error
            return None
        try:
            return converter if converter.matches(source) else None
        except PorttoolError:
            raise  # what is wrong with the source
        except Exception as error:  # noqa: BLE001 - a stranger's plugin must not stop the host
            failed[name] = error
            return None

    def _account_for(self, failed: Mapping[str, Exception], matching: set[str]) -> None:
        """Set aside the plugins of converters that failed, unless the choice depends on one."""
        for name, error in failed.items():
            plugin = self.converters.origin[name]
            if self.converters.classes[name].refines in matching:
                raise PluginError(
                    f"the converter {name!r} of {plugin} cannot say whether this is its own: "
                    f"{explained(error)}; mend it, or name {plugin.name} in {DENY}"
                ) from error
            if isinstance(error, OSError) and not matching:
                raise error  # nobody could read it: that is the source's fault
            self._set_aside(plugin.name, error)

    def hint(self) -> str:
        """Return a hint at the plugins that are not used, and why; empty if there is none."""
        said = "; ".join(f"{p} ({p.error})" for p in self.plugins if p.error)
        return (f"; plugins set aside: {said}" if said else "") + left_out(self.plugins)

    def record(self, catalog: Catalog[Any], name: str) -> PluginRecord:
        """Return what a manifest keeps of the plugin that a component came from."""
        from porttool.checkpoint import PluginRecord

        plugin = catalog.origin[name]
        return PluginRecord(
            component=name,
            distribution=plugin.distribution,
            version=plugin.version,
            api_version=hookspecs.API_VERSION,
        )

    def require(self, catalog: Catalog[Any], made: PluginRecord, what: str) -> None:
        """Refuse something made by a plugin that is missing or has another version now."""
        if made.component not in catalog.classes:
            there = made.distribution in {p.distribution for p in self.plugins if p.error}
            absent = f"not installed; install {made.distribution}=={made.version}"
            raise PluginError(
                f"{what} {made.component!r} of {made.distribution} {made.version}, which is "
                f"{'not in use' if there else absent}{self.hint()}"
            )
        if (now := self.record(catalog, made.component)) != made:
            raise PluginError(
                f"{what} {made.component!r} of {made.distribution} {made.version}, installed is "
                f"{now.distribution} {now.version}; make it again, or install that version"
            )

    def add_commands(self, group: click.Group, taken: Iterable[str] = ()) -> None:
        """Let plugins add their commands; one that fails, or takes a name, is set aside."""
        hook = self._manager.hook.porttool_commands
        for impl in sorted(hook.get_hookimpls(), key=lambda i: str(i.plugin_name)):
            before = dict(group.commands)
            try:
                impl.function(group)
                require_new(before, group.commands, taken)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a stranger must not stop the host
                group.commands = before
                self._set_aside(impl.plugin_name, error)

    def _collect(self, kind: str, base: Any, *others: Any) -> Catalog[Any]:
        """Collect the classes of `base` from a hook that may yield the others too."""
        catalog: Catalog[Any] = Catalog(kind, hint=self.hint)
        by_name = {plugin.name: plugin for plugin in self.plugins}
        hook = getattr(self._manager.hook, f"porttool_{kind}s")
        for impl in sorted(hook.get_hookimpls(), key=lambda i: str(i.plugin_name)):
            try:
                found = checked(impl.function(), kind, (base, *others))
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a stranger must not stop the host
                self._set_aside(impl.plugin_name, error)
                continue
            for component in (c for c in found if issubclass(c, base)):
                catalog.add(component, by_name[impl.plugin_name])
        for plugin, reason in catalog.clashes():
            self._set_aside(plugin.name, reason)
        return catalog

    def _set_aside(self, name: str, error: BaseException) -> None:
        self.plugins = [p.broken(error) if p.name == name else p for p in self.plugins]


def load_registry() -> Registry:
    """Load every allowed plugin of the entry-point group."""
    manager = pluggy.PluginManager("porttool")
    manager.add_hookspecs(hookspecs)
    entries = allowed(entry_points(group=GROUP))
    named = Counter(entry.name for entry in entries)
    plugins = [load_plugin(manager, e) for e in entries if named[e.name] == 1]
    doubles = [Plugin.of(entry) for entry in entries if named[entry.name] > 1]
    return Registry(manager, plugins + [p.broken(clash(p, doubles)) for p in doubles])


def blame(error: BaseException) -> str | None:
    """Say which plugin of another distribution an error passed through, and where; else None."""
    return blamed(error, allowed(entry_points(group=GROUP)))


def allowed(entries: Iterable[EntryPoint]) -> list[EntryPoint]:
    """Return the entry points that the environment allows, each once, in order of name."""
    allow, deny = names_in(ALLOW), names_in(DENY)
    unique = {(e.name, e.value): e for e in entries}
    return [
        entry
        for (name, _), entry in sorted(unique.items())
        if (not allow or name in allow) and name not in deny
    ]


def load_plugin(manager: pluggy.PluginManager, entry: EntryPoint) -> Plugin:
    """Import and register one plugin; whatever goes wrong is kept with it."""
    plugin = Plugin.of(entry)
    try:
        module = entry.load()
        require_api(module)
        manager.register(module, name=entry.name)
        require_known_hooks(manager, module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a stranger must not stop the host
        if manager.has_plugin(entry.name):
            manager.unregister(name=entry.name)
        return plugin.broken(error)
    return plugin


def choose_converter(
    registry: Registry,
    source: Path,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Converter:
    """Return the one converter for a source, among a family's if `model` names one.

    A converter that another match refines steps back. None or several left is a UsageError that
    says which families do match.
    """
    left = registry.recognisers(source, named_converters(registry, model) if model else None)
    if len(left) == 1:
        if model:  # else every family was asked already
            require_own_source(registry, source, left[0])
        return registry.converter(left[0].name, options)
    if left:
        listed = ", ".join(sorted(c.name for c in left))
        raise UsageError(f"{source}: several converters match: {listed}; choose one with --model")
    if not model:
        from porttool.sources.places import hints_at

        hints = hints_at(source, registry.readers)
        raise UsageError(
            f"{source}: no installed family recognises this{hints}; "
            f"`porttool plugins list` shows what each reads{registry.hint()}"
        )
    own = model.partition("/")[0]
    others = {c.name if c.family == own else c.family for c in registry.readers(source)}
    hint = f"; it looks like {', '.join(sorted(others))}" if others else ""
    raise UsageError(f"{source}: not a source of {model!r} that porttool can read{hint}")


def require_own_source(registry: Registry, source: Path, chosen: Converter) -> None:
    """Name the family that goes before the chosen one, where that one cannot read the source."""
    finer = ", ".join(sorted({c.family for c in refinements(registry, source, chosen)}))
    try:
        if finer:
            chosen.config(source)
    except SourceError as error:
        said = f"{source}: not a source of {chosen.family!r}; it looks like {finer} ({error})"
        raise UsageError(said) from error


def refinements(registry: Registry, source: Path, chosen: Converter) -> list[Converter]:
    """Return the converters of other families that refine a chosen one and match a source too."""
    others = [c for c in registry.converters if c.family != chosen.family]
    finer = [c.name for c in others if c.refines == chosen.name]
    found = registry.recognisers(source, [chosen.name, *finer]) if finer else []
    return [c for c in found if c.name in finer]


def named_converters(registry: Registry, model: str) -> list[str]:
    """Return the names of a family's converters, or the one of that full name."""
    found = [c.name for c in registry.converters if model in (c.family, c.name)]
    return found or [registry.converters.get(model).name]
