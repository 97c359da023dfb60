"""Writer's camel-5b: GPT-2's layout, exact GELU, an instruction template of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porttool import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from porttool import Converter

api_version = 1


@hookimpl
def porttool_converters() -> Iterable[type[Converter]]:
    """Return the converter of this family."""
    from porttool_camel5b.converter import Camel5bConverter

    return [Camel5bConverter]
