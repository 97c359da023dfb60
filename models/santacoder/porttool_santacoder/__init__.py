"""SantaCoder and StarCoder: GPT-2 with one key and value head, trained to infill."""

from __future__ import annotations

from typing import TYPE_CHECKING

from porttool import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from porttool import Converter

api_version = 1


@hookimpl
def porttool_converters() -> Iterable[type[Converter]]:
    """Return the converters of both families."""
    from porttool_santacoder.converter import (
        BigCodeConverter,
        SantaCoderConverter,
        StarCoderConverter,
    )

    return [SantaCoderConverter, BigCodeConverter, StarCoderConverter]
