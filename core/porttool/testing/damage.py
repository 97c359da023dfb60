"""Sources with a tensor too few or too many, which a converter must refuse by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from porttool.converter import Converter, Source, plan_jobs
from porttool.errors import CheckFailed, SourceError
from porttool.weights import TensorInfo, TensorSource

if TYPE_CHECKING:
    from torch import Tensor


class Altered(TensorSource):
    """A source's tensors without one of them, or with one more that is a copy of another."""

    def __init__(self, inner: TensorSource, *, without: str = "", extra: str = "") -> None:
        self.inner = inner
        known = inner.infos()
        self._infos = {name: info for name, info in known.items() if name != without}
        if extra:
            self._infos[extra] = next(iter(known.values()))

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return what is left, and what was added."""
        return self._infos

    def load(self, name: str) -> Tensor:
        """Read a tensor that was there before."""
        return self.inner.load(name)


def require_refused(converter: Converter, source: Source, altered: Altered, name: str) -> None:
    """Raise CheckFailed unless an altered source is refused and the tensor named."""
    weight_map = source.weight_map or converter.weight_map(source.config)
    try:
        plan_jobs(converter, replace(source, tensors=altered), weight_map, None, False)
    except SourceError as error:
        if name in str(error):
            return
        raise CheckFailed(f"refused, but {name} is not named: {error}") from error
    raise CheckFailed(f"a source {'with' if name in altered.infos() else 'without'} {name} passed")


def strangers(names: Iterable[str]) -> list[str]:
    """Return names that no source has: of a layer too many, and of one part too many each."""
    known = set(names)
    layers = {re.sub(r"\d+", "4097", name, count=1) for name in known}
    return sorted((layers | {f"{name}.extra" for name in known}) - known)
