"""Reading a model folder in Hugging Face's layout, strictly and without transformers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from porttool.config import InfillTokens, ModelConfig, SpecialTokens
from porttool.converter import Converter, Source, validated
from porttool.errors import PluginError, SourceError, require_kind
from porttool.sources.huggingface_keys import INERT_KEYS, MUST_BE
from porttool.sources.json_file import read_json
from porttool.sources.places import UNFETCHED, is_present
from porttool.sources.ranks import Renamed, ShardedTensors
from porttool.sources.safetensors_file import SafetensorsFile
from porttool.sources.tokenizer_files import added_tokens, known_spelling, tokenizer_paths
from porttool.sources.torch_file import open_torch_file
from porttool.weights import TensorSource, WeightMap, listing

T = TypeVar("T")

WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
"""Weights in transformers' order: one file before an index, which may be left of older shards."""

OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.h5", "*.msgpack", "*.ot", "*.gguf", "*.pt", "*.onnx")
REMEDY = (
    "shards lack their index, variants (fp16) want the plain name, quantised or other formats are "
    "to be saved as safetensors (save_pretrained)"
)

HEAD = "lm_head.weight"
"""Every family's name of the head, which is the embedding where the two are tied."""


class SourceConfig:
    """A config.json that remembers which keys were read, so that none is ignored by accident."""

    def __init__(self, values: Mapping[str, Any], file: Path) -> None:
        self.values = values
        self.file = file
        self._read = set(INERT_KEYS)
        self._sections: list[SourceConfig] = []

    def take(self, key: str, *defaults: Any) -> Any:
        """Return a key's value; the default only where the key is absent or null."""
        self._read.add(key)
        value = self.values.get(key)
        if value is not None:
            return value
        if defaults:
            return defaults[0]
        raise SourceError(f"{self.file}: the key {key!r} is missing")

    def needed(self, key: str, *defaults: Any) -> Any:
        """Return a key's value; a default is for an absent key, what null would do nobody says."""
        if key in self.values and self.values[key] is None:
            raise SourceError(
                f"{self.file}: {key!r} is null; give it a value, or delete the key for its default"
            )
        return self.take(key, *defaults)

    def integer(self, key: str, *defaults: int | None) -> int:
        """Return a positive integer."""
        value = self.take(key, *defaults)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SourceError(
                f"{self.file}: {key!r} should be a positive integer, not {value!r:.80}"
            )
        return value

    def quotient(self, key: str, divisor: str) -> int:
        """Return one positive integer divided by another; a remainder is refused."""
        value, by = self.integer(key), self.integer(divisor)
        if value % by:
            raise SourceError(f"{self.file}: {key!r} {value} is not a multiple of {divisor!r} {by}")
        return value // by

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self.needed(key, default)
        if not isinstance(value, bool):
            raise SourceError(f"{self.file}: {key!r} should be true or false, not {value!r:.80}")
        return value

    def number(self, key: str, default: float) -> float:
        """Return a number."""
        value = self.needed(key, default)
        if isinstance(value, bool) or not (isinstance(value, int | float) and isfinite(value)):
            raise SourceError(f"{self.file}: {key!r} should be a number, not {value!r:.80}")
        return float(value)

    def one_of(self, key: str, choices: Mapping[str, T], *defaults: str) -> T:
        """Return what a name stands for; an unknown name is refused with the known ones."""
        value = self.needed(key, *defaults)
        if not isinstance(value, str) or value not in choices:
            known = ", ".join(sorted(choices))
            raise SourceError(f"{self.file}: {key!r} is {value!r:.80}; porttool knows: {known}")
        return choices[value]

    def section(self, key: str) -> SourceConfig:
        """Return a nested object, empty where it is absent; `finish` holds it to the same rule."""
        values = self.take(key, {})
        if not isinstance(values, dict):
            raise SourceError(f"{self.file}: {key!r} should be an object, not {values!r:.80}")
        self._sections.append(SourceConfig(values, self.file / key))
        return self._sections[-1]

    def ignore(self, *keys: str) -> None:
        """Declare keys of this family that change no arithmetic."""
        self._read.update(keys)

    def finish(self) -> None:
        """Refuse every key that nothing read."""
        for key, wanted in MUST_BE.items():
            if (value := self.values.get(key)) not in (None, wanted):
                unquantised = "convert the model that was quantised"
                cure = unquantised if "quant" in key else f"it needs {wanted!r}"
                raise SourceError(
                    f"{self.file}: {key!r} is {value!r:.80}, which porttool cannot port; {cure}"
                )
        unread = sorted(self.values.keys() - self._read - MUST_BE.keys())
        if unread:
            raise SourceError(
                f"{self.file}: unknown keys that could change the model: {listing(unread)}; "
                "if they do not, delete them from a copy of the config, or, in a plugin of your "
                "own, let read_config `ignore` them"
            )
        for section in self._sections:
            section.finish()


class HuggingFaceConverter(Converter):
    """A family in Hugging Face's layout: say which configs are yours and how to read one.

    `implements` names the classes of `auto_map` that `nn` computes exactly: a folder may name
    these, and no others, as code of its own. `spellings` are the tokens for infilling, of which
    a checkpoint gets those that its tokenizer knows. `end_of_text` is the token whose id goes for
    `bos` and `eos` where the config declares none or one beyond the vocabulary. `default_end` is
    the id that transformers gives both where a config lacks their keys, as those of 2019 do.
    """

    model_types: ClassVar[frozenset[str]]
    implements: ClassVar[frozenset[str]] = frozenset()
    prefix: ClassVar[str] = "transformer."
    spellings: ClassVar[tuple[InfillTokens, ...]] = ()
    end_of_text: ClassVar[str | None] = None
    default_end: ClassVar[int | None] = None

    def __init_subclass__(cls) -> None:
        """Refuse model types that are one text."""
        if isinstance(getattr(cls, "model_types", None), str):  # in which every letter is found
            raise PluginError(f"{cls.__qualname__}.model_types is a text, not a set of texts")

    def matches(self, source: Path) -> bool:
        """Return true if config.json names one of the family's model types."""
        try:
            return read_config(source).get("model_type") in self.model_types
        except SourceError:
            return False

    @abstractmethod
    def read_config(self, config: SourceConfig) -> ModelConfig:
        """Map every key that matters; `finish` is called afterwards."""

    @abstractmethod
    def weight_map(self, config: ModelConfig) -> WeightMap:
        """Return the table from canonical names to those of the folder."""

    def config(self, source: Path) -> ModelConfig:
        """Read config.json; a key that nothing accounts for is refused by name."""
        values = read_config(source)
        config = SourceConfig(values, source / "config.json")
        if foreign := foreign_code(values) - self.implements:
            raise SourceError(
                f"{config.file}: 'auto_map' says that this model runs code of its own "
                f"({listing(sorted(foreign))}), which porttool never does, and {self.name!r} "
                "does not stand for it"
            )
        config.ignore("auto_map")
        model = validated(config.file, lambda: self.read_config(config))
        require_kind(model, ModelConfig, f"{type(self).__qualname__}.read_config")
        config.finish()
        return model

    def special_tokens(self, source: Path, model: ModelConfig) -> SpecialTokens:
        """Read the ids that the folder declares; one outside the vocabulary is refused."""
        default = self.default_end
        ids = special_ids(source, default)
        if default and default >= model.vocab_size:  # told by nobody: save_pretrained writes it
            ids = {key: None if value == default else value for key, value in ids.items()}
        if self.end_of_text and (end := added_tokens(source).get(self.end_of_text)) is not None:
            for key in ("bos", "eos"):
                declared = ids[key]
                if declared is None or (isinstance(declared, int) and declared >= model.vocab_size):
                    ids[key] = end
        return check_special_ids(ids, model.vocab_size, source)

    def open(self, source: Path) -> Source:
        """Read the config and the special ids, and index the tensors."""
        model = self.config(source)
        return Source(
            config=model,
            tokens=self.special_tokens(source, model),
            tensors=Renamed.by(open_tensors(source), lambda name: name.removeprefix(self.prefix)),
            tokenizer=tokenizer_paths(source),
            infill=known_spelling(source, self.spellings) if self.spellings else None,
        )


def foreign_code(values: Mapping[str, Any]) -> set[str]:
    """Return the classes that a config's auto_map names, without the repository they are in."""
    named = values.get("auto_map") or {}
    listed = named.values() if isinstance(named, dict) else [named]
    return {str(name).split("--")[-1] for name in listed}


def read_config(source: Path) -> dict[str, Any]:
    """Read config.json of a folder; files of 2019 name no model type and are GPT-2's."""
    values = read_json(source / "config.json")
    if "model_type" not in values and "n_embd" in values:
        return {**values, "model_type": "gpt2"}
    return values


def open_tensors(source: Path) -> TensorSource:
    """Open a folder's weights, in transformers' order where there are several."""
    for name in WEIGHTS:
        if is_present(source / name):
            index = name.endswith(".json")
            return open_indexed(source, name) if index else open_weight_file(source / name)
    others = sorted({p.name for pattern in OTHER_WEIGHTS for p in source.glob(pattern)})
    found = f"; of {listing(others)} porttool reads none: {REMEDY}" if others else UNFETCHED
    raise SourceError(
        f"{source}: no model.safetensors, no pytorch_model.bin and no index of them{found}"
    )


def open_weight_file(path: Path) -> TensorSource:
    """Open one file by its suffix."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else open_torch_file(path)


def open_indexed(source: Path, index: str) -> TensorSource:
    """Open every shard that an index names, and hold the index to what they contain.

    It may name a head that lies in no shard: conversions to safetensors leave a tied one out. A
    head that is missed is missed by the table.
    """
    weight_map = read_json(source / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise SourceError(f"{source / index}: there is no weight_map")
    files = sorted(set(weight_map.values()))
    for file in files:
        if Path(file).name != file:
            raise SourceError(f"{source / index}: names a file outside the folder: {file!r:.200}")
        if not is_present(source / file):
            raise SourceError(f"{source / file}: the shard is missing; fetch it again")
    tensors = ShardedTensors({file: open_weight_file(source / file) for file in files})
    found = {name: info.file for name, info in tensors.infos().items()}
    both = weight_map.keys() | found.keys()
    left_out = {HEAD} - found.keys()
    wrong = sorted(n for n in both - left_out if weight_map.get(n) != found.get(n))
    if wrong:
        raise SourceError(
            f"{source / index}: the index and its shards disagree about: {listing(wrong)}"
        )
    return tensors


def special_ids(source: Path, default: int | None = None) -> dict[str, Any]:
    """Read bos, eos and pad; generation_config.json goes before config.json, as when run.

    `default` goes for bos and eos where neither file has the key; null is no id.
    """
    values = read_json(source / "config.json")
    generation = source / "generation_config.json"
    merged = {**values, **(read_json(generation) if generation.is_file() else {})}
    defaults = {"bos": default, "eos": default, "pad": None}
    return {key: merged.get(f"{key}_token_id", value) for key, value in defaults.items()}


def check_special_ids(ids: Mapping[str, Any], vocab_size: int, source: Path) -> SpecialTokens:
    """Return the ids as special tokens; one that no token can have is a SourceError."""
    eos = ids["eos"]
    ends = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    others = [(key, ids[key]) for key in ("bos", "pad") if ids[key] is not None]
    for key, value in [*(("eos", end) for end in ends), *others]:
        if type(value) is not int or not 0 <= value < vocab_size:
            raise SourceError(
                f"{source}: the special token id {value!r:.80} is outside the vocabulary of "
                f"{vocab_size}; correct {key}_token_id in generation_config.json, or in "
                "config.json where that has none (null means there is no such token)"
            )
    return SpecialTokens(bos=ids["bos"], eos=ends, pad=ids["pad"])
