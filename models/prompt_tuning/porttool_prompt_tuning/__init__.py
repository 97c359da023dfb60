"""Prompt tuning and p-tuning: learned virtual tokens from NeMo, PEFT and plain arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porttool import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from porttool.reading import TableConverter

api_version = 1


@hookimpl
def porttool_converters() -> Iterable[type[TableConverter]]:
    """Return the readers of prompt tables."""
    from porttool_prompt_tuning.converter import ArrayConverter, NemoConverter, PeftConverter

    return [ArrayConverter, NemoConverter, PeftConverter]
