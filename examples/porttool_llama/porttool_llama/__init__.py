"""Llama for porttool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porttool import hookimpl

if TYPE_CHECKING:
    from porttool import Converter

api_version = 1


@hookimpl
def porttool_converters() -> list[type[Converter]]:
    """Return the converter of this family."""
    from porttool_llama.converter import LlamaConverter

    return [LlamaConverter]
