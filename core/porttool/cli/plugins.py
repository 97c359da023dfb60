"""porttool plugins: what is installed, what is broken and why, whether a family is right."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from porttool.cli import console
from porttool.cli.options import FOLDER, json_option
from porttool.errors import CheckFailed

if TYPE_CHECKING:
    from porttool.catalog import Catalog
    from porttool.plugins import Registry
    from porttool.testing import CheckResult


@click.group("plugins", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """Show plugins, check one, or begin a new one."""
    if context.invoked_subcommand is None:
        context.invoke(show)


@command.command("list")
@json_option
def show(as_json: bool = False) -> None:
    """List families, engines, evaluators and broken plugins."""
    from porttool.cli import COMMANDS
    from porttool.plugins import load_registry

    registry = load_registry()
    registry.add_commands(click.Group(), COMMANDS)  # finds the hooks that fail
    components = [row for catalog in registry.catalogs for row in rows_of(catalog)]
    broken = [p for p in registry.plugins if p.error]
    if as_json:
        failures = [{"name": p.name, "distribution": p.distribution, "error": p.error}
                    for p in broken]  # fmt: skip
        console.say_json({"components": components, "broken": failures})
        return
    show_families(registry)
    kinds = ((registry.builders, "engines"), (registry.evaluators, "evaluators"))
    for catalog, title in kinds:
        rows = [(r["name"], r["what"], r["plugin"]) for r in rows_of(catalog)]
        console.table(title, ("name", "what it does", "from"), rows)
    for lone in lone_engines(registry):
        console.say(lone)
    if broken:
        rows = [(p.name, p.source, str(p.error)) for p in broken]
        console.table("broken plugins", ("plugin", "from", "why"), rows)


def rows_of(catalog: Catalog[Any]) -> list[dict[str, str]]:
    """Return a catalog's components for machines."""
    return [
        {
            "kind": catalog.kind,
            "name": component.name,
            "what": describe(component),
            "plugin": catalog.origin[component.name].source,
        }
        for component in catalog
    ]


def show_families(registry: Registry) -> None:
    """Print a line for every source of every family; a family is named once."""
    rows: list[tuple[str, ...]] = []
    last = None
    origins = {**registry.converters.origin, **registry.tables.origin}
    everything: list[Any] = [*registry.converters, *registry.tables]
    for found in sorted(everything, key=lambda c: (c.family, c.name)):
        name = "" if found.family == last else found.family
        last = found.family
        hub = (found.hub_id or "") + (f" (before {found.refines})" if found.refines else "")
        made = origins[found.name].source
        rows.append((name, found.source_format, found.name, hub.strip(), made))
    console.table("families", ("family", "reads", "converter", "published as", "from"), rows)


def lone_engines(registry: Registry) -> Iterable[str]:
    """Say which kinds of engine can be built and not run, or run and not built."""
    builders, runners = set(registry.builders.classes), set(registry.runners.classes)
    yield from (f"{kind}: can be built, but there is no runner" for kind in builders - runners)
    yield from (f"{kind}: can be run, but there is no builder" for kind in runners - builders)


def describe(component: type) -> str:
    """Return what a component reads or does: a converter's sources, else its docstring's head."""
    family = getattr(component, "family", None)
    if family is not None:
        refines = getattr(component, "refines", None)
        extra = f", refines {refines}" if refines else ""
        return f"{family} from: {component.source_format}{extra}"  # type: ignore[attr-defined]
    return (component.__doc__ or "").strip().partition("\n")[0]


@command.command("check")
@click.argument("name")
@json_option
@console.without_notes()  # what they say is kept is in a folder that is taken away
def check(name: str, as_json: bool) -> None:
    """Run the conformance kit on the plugin or family NAME.

    The exit status is 1 if a check fails. The cases are in the module `conformance` of the
    plugin's package.
    """
    from porttool.plugins import load_registry
    from porttool.testing import find_cases, run_checks

    results = [r for case in find_cases(load_registry(), name) for r in run_checks(case)]
    failed = [r for r in results if not r.passed]
    if as_json:
        console.say_json({"name": name, "checks": [vars(r) for r in results]})
    else:
        columns = ("", "case", "check", "s", "why")
        console.table(f"conformance of {name}", columns, list(check_rows(results)))
        console.say(f"{len(results)} checks, {len(failed)} failed")
    if failed or not results:
        raise CheckFailed(f"{name} does not conform: {len(failed)} of {len(results)} checks failed")


def check_rows(results: Iterable[CheckResult]) -> Iterable[tuple[str, ...]]:
    """Yield a row for every check; one cause of many failures of a case is told once."""
    first: dict[tuple[str, str], str] = {}
    for r in results:
        told = first.setdefault((r.case, r.detail), r.check)
        why = r.detail if r.passed or told == r.check else f"the same as {told}"
        yield "pass" if r.passed else "FAIL", r.case, r.check, f"{r.seconds:.2f}", why


@command.command("new")
@click.argument("name")
@click.option("--output", "-o", type=FOLDER, default=Path(), help="Where the package goes [here].")
def new(name: str, output: Path) -> None:
    """Write a package for a new family NAME, which passes the kit.

    It reads GPT-2 under a name of its own: change it step by step, and check after each.
    """
    from porttool.scaffold import write_plugin

    folder = write_plugin(name, output)
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        console.say(str(file))
    console.say(f"next: pip install -e {folder} && porttool plugins check {name}")
