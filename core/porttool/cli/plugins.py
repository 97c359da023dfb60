"""porttool plugins: what is installed, and what is broken and why."""

from __future__ import annotations

import click

from porttool.cli import console
from porttool.cli.options import json_option


@click.group("plugins", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """Show plugins and what they bring."""
    if context.invoked_subcommand is None:
        context.invoke(show)


@command.command("list")
@json_option
def show(as_json: bool = False) -> None:
    """List families with their sources, engines, evaluators and broken plugins."""
    from porttool.plugins import load_registry

    registry = load_registry()
    components = [
        {
            "kind": catalog.kind,
            "name": component.name,
            "what": describe(component),
            "plugin": f"{origin.distribution} {origin.version}",
        }
        for catalog in registry.catalogs
        for component in catalog
        for origin in [catalog.origin[component.name]]
    ]
    broken = [p for p in registry.plugins if p.error]
    if as_json:
        failures = [{"name": p.name, "distribution": p.distribution, "error": p.error}
                    for p in broken]  # fmt: skip
        console.say_json({"components": components, "broken": failures})
        return
    console.table(
        "components",
        ("kind", "name", "what", "plugin"),
        [tuple(c.values()) for c in components],
    )
    if broken:
        rows = [(p.name, f"{p.distribution} {p.version}", str(p.error)) for p in broken]
        console.table("broken plugins", ("plugin", "distribution", "why"), rows)


def describe(component: type) -> str:
    """Return what a component reads or does: a converter's sources, else its docstring's head."""
    family = getattr(component, "family", None)
    if family is not None:
        refines = getattr(component, "refines", None)
        extra = f", refines {refines}" if refines else ""
        return f"{family} from: {component.source_format}{extra}"  # type: ignore[attr-defined]
    return (component.__doc__ or "").strip().splitlines()[0]
