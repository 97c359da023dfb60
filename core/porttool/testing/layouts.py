"""Cases whose arithmetic transformers has: a model's name and sizes, and how it is laid out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from porttool.errors import require_extra
from porttool.testing.family import FamilyConformance
from porttool.testing.reference import redraw, transformers_logits

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE = "reference"
"""Folder, beside a source, of the same weights as transformers saves them."""


class TransformersConformance(FamilyConformance):
    """A tiny transformers model, in whatever layout the family's users have it.

    `architecture` is its class, `sizes` what its config is made with. The source is what
    transformers saves; for another layout override `write_layout`.
    """

    architecture: ClassVar[str]
    sizes: ClassVar[Mapping[str, Any]]

    def write_source(self, path: Path, seed: int) -> None:
        """Write the weights twice: as transformers reads them, and as the family does."""
        require_extra("reference", "transformers")
        import transformers

        kind = getattr(transformers, self.architecture)
        model = redraw(kind(kind.config_class(**self.sizes)), seed)
        model.save_pretrained(path.with_name(REFERENCE))
        self.write_layout(path, model)

    def write_layout(self, path: Path, model: Any) -> None:
        """Write a transformers model's weights and config at `path` as the family has them."""
        model.save_pretrained(path)

    def reference_logits(self, path: Path, ids: list[int]) -> Tensor:
        """Ask transformers about the same weights."""
        return transformers_logits(path.with_name(REFERENCE), ids)
