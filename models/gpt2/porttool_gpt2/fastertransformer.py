"""GPT-2 and its kin as FasterTransformer and early TensorRT-LLM keep them."""

from __future__ import annotations

from pathlib import Path

from porttool import Converter, Source
from porttool.reading import open_folder


class FasterTransformerConverter(Converter):
    """A folder with config.ini and one raw array a file, for any number of ranks."""

    name = "gpt2/fastertransformer"
    family = "gpt2"
    source_format = "FasterTransformer folder"

    def matches(self, source: Path) -> bool:
        """Return true if there is a config.ini here or in a folder like `1-gpu`.

        A folder with an embedding alone is recognised, too: FasterTransformer 4 wrote no
        config.ini, and `open` then says what to put into one.
        """
        places = (source, *source.glob("*-gpu"))
        return any((p / name).is_file() for p in places for name in ("config.ini", "model.wte.bin"))

    def open(self, source: Path) -> Source:
        """Read config.ini and hold every file to it; core joins and turns the arrays."""
        return open_folder(source)
