"""GPT-Next and its relatives, as NeMo trained and saved them."""

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
    from porttool_gpt_next.converter import NemoConverter

    return [NemoConverter]
