"""The checks that every family passes, as one class that its test subclasses."""

from __future__ import annotations

import json
import shutil
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from porttool.catalog import DENY, explained
from porttool.errors import CheckFailed, SourceError, UsageError
from porttool.plugins import choose_converter
from porttool.testing.damage import Altered, require_refused, strangers
from porttool.testing.isolation import no_network, require_plain
from porttool.testing.parallel import parallel_logits
from porttool.testing.power import inert_tensors
from porttool.testing.reference import transformers_logits
from porttool.testing.specimen import N_NEW, Specimen, require_close
from porttool.weights import Take, map_tensor, resolve_rules

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor


UNKNOWN_KEY = "porttool_unknown_key"


class FamilyConformance(ABC):
    """A family's proof: say how a tiny source is written and what its model computes.

    Every method `test_…` is a check; it raises CheckFailed. pytest runs those of a subclass whose
    name begins with `Test`, `porttool plugins check` those of every subclass in the plugin's
    module `conformance`. The tiny source needs a number of heads and an MLP that 2 divides,
    better 4, and at least 19 positions.
    """

    family: ClassVar[str]
    config_file: ClassVar[str] = "config.json"
    """The source's config, a JSON object; with another kind override `add_config_key`."""
    options: ClassVar[Mapping[str, Any]] = {}
    """What the converter is to be told, for sources that cannot tell it themselves."""

    _threads: ClassVar[int]
    _specimens: ClassVar[dict[int, Specimen]]
    _folder: ClassVar[tempfile.TemporaryDirectory[str]]

    @abstractmethod
    def write_source(self, path: Path, seed: int) -> None:
        """Write a tiny source in the real layout at `path`, which is not there yet.

        Every parameter is to be drawn from N(0, 0.2) with this seed: see `redraw`.
        """

    def reference_logits(self, path: Path, ids: list[int]) -> Tensor:
        """Return float64 logits [len(ids), vocab_size] by other means than porttool's.

        The default asks transformers, which must know the source's layout.
        """
        return transformers_logits(path, ids)

    def add_config_key(self, path: Path, key: str) -> None:
        """Add a key that nobody knows to the source's config."""
        file = path / self.config_file
        file.write_text(json.dumps({**json.loads(file.read_text()), key: 1}))

    @classmethod
    def setup_class(cls) -> None:
        """Make a place for the sources; pytest calls this.

        One thread: tiny models are many times slower where several wait for a busy processor.
        """
        import torch

        cls._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        cls._folder = tempfile.TemporaryDirectory(prefix="porttool-conformance-")
        cls._specimens = {}

    @classmethod
    def teardown_class(cls) -> None:
        """Take everything away again; pytest calls this."""
        import torch

        torch.set_num_threads(cls._threads)
        for made in cls._specimens.values():
            made.close()
        cls._specimens.clear()
        cls._folder.cleanup()

    def specimen(self, seed: int = 0) -> Specimen:
        """Return the source of a seed, written once and taken as far as has been asked."""
        if seed not in self._specimens:
            folder = Path(tempfile.mkdtemp(dir=self._folder.name))
            self.write_source(folder / "source", seed)
            self._specimens[seed] = Specimen(folder / "source", folder, self.options)
        return self._specimens[seed]

    def test_detection(self) -> None:
        """One installed family recognises the source, and the others keep their own."""
        made = self.specimen()
        if made.converter.family != self.family:
            raise CheckFailed(f"recognised as {made.converter.family!r}, not as {self.family!r}")
        empty = made.folder / "empty"
        empty.mkdir(exist_ok=True)
        (empty / "config.json").write_text('{"model_type": "none of these"}')
        if made.converter.matches(empty) or made.converter.matches(empty / "absent"):
            raise CheckFailed(f"{made.converter.name!r} also recognises what is not its own")
        for family, source in other_sources(self.family, made.folder / "others"):
            if choose_converter(made.registry, source).family == self.family:
                raise CheckFailed(f"a source of the installed family {family!r} is taken for it")

    def test_logits(self) -> None:
        """Logits equal the reference's, for two draws of the weights."""
        for seed in (0, 1):
            made = self.specimen(seed)
            for prompt in made.prompts:
                expected = self.reference_logits(made.source, prompt)
                require_close(made.prefill(prompt), expected, f"seed {seed}, {len(prompt)} tokens")
        draws = [self.specimen(seed).prefill([1, 2, 3]) for seed in (0, 1)]
        if bool((draws[0] - draws[1]).abs().max() < 1e-3):
            raise CheckFailed("seeds 0 and 1 wrote the same weights")

    def test_every_tensor_matters(self) -> None:
        """Turning any canonical tensor round moves the logits: the comparison could fail."""
        if inert := inert_tensors(self.specimen()):
            raise CheckFailed(
                f"turning {inert[0]} round changes no logit; redraw every parameter of the source"
            )

    def test_cached_decode(self) -> None:
        """Tokens fed one at a time give the logits of one prefill."""
        made = self.specimen()
        prompt = made.prompts[0]
        require_close(made.feed(prompt, [1] * len(prompt)), made.prefill(prompt), "one at a time")

    def test_several_tokens_a_step(self) -> None:
        """Tokens fed a few at a time give the logits of one prefill, also after a step back."""
        made = self.specimen()
        prompt = made.prompts[2]
        other = [*prompt[:5], *reversed(prompt[5:])]
        made.feed(other, [5, 6], slot=1)
        for widths in ([4, 3, 4], [2, 9]):
            found = made.feed(prompt, widths, slot=1)
            require_close(found, made.prefill(prompt), f"in steps of {widths}")

    def test_greedy_tokens(self) -> None:
        """Greedy continuations are those that the reference would choose."""
        made = self.specimen()
        for prompt, found in zip(made.prompts, made.greedy(made.prompts), strict=True):
            ids = list(prompt)
            for _ in range(N_NEW):
                ids.append(int(self.reference_logits(made.source, ids)[-1].argmax()))
            if found != ids[len(prompt) :]:
                raise CheckFailed(f"{found} where the reference chooses {ids[len(prompt) :]}")

    def test_batch_and_padding(self) -> None:
        """Neither neighbours, nor order, nor what pads a row changes its logits or tokens."""
        made = self.specimen()
        for padding in (0, made.config.vocab_size - 1):
            for prompt, found in zip(made.prompts, made.batch(padding), strict=True):
                require_close(found, made.prefill(prompt), f"padded with {padding}")
        alone = [made.greedy([prompt])[0] for prompt in made.prompts]
        if made.greedy(made.prompts[::-1])[::-1] != alone:
            raise CheckFailed("the tokens of a prompt depend on its batch")

    def test_tensor_parallel(self) -> None:
        """The slices of 1, 2 and 4 ranks add up to the whole model, where its shape divides."""
        made = self.specimen()
        prompt, tried = made.prompts[0], []
        for world_size in (1, 2, 4):
            try:
                found = parallel_logits(made.checkpoint, world_size, prompt)
            except UsageError:
                continue
            require_close(found, made.prefill(prompt), f"{world_size} ranks")
            tried.append(world_size)
        if tried == [1]:
            raise CheckFailed("neither 2 nor 4 ranks divide the source; give it 4 heads")

    def test_unknown_config_key(self) -> None:
        """A config key that nobody knows is refused by name."""
        made = self.specimen()
        damaged = made.folder / "unknown_key" / "source"
        copy_source(made.source, damaged)
        self.add_config_key(damaged, UNKNOWN_KEY)
        try:
            made.convert("unknown_key_checkpoint", damaged)
        except SourceError as error:
            if UNKNOWN_KEY in str(error):
                return
            raise CheckFailed(f"refused, but the key is not named: {error}") from error
        raise CheckFailed("a config with a key that nobody knows was read")

    def test_missing_tensor(self) -> None:
        """A source without any one of its tensors is refused, and the tensor named."""
        made = self.specimen()
        for name in self._used():
            altered = Altered(made.opened.tensors, without=name)
            require_refused(made.converter, made.opened, altered, name)

    def test_extra_tensor(self) -> None:
        """A tensor of a layer too many, or of another name, is refused by name."""
        made = self.specimen()
        for name in strangers(self._used()):
            altered = Altered(made.opened.tensors, extra=name)
            require_refused(made.converter, made.opened, altered, name)

    def test_round_trip(self) -> None:
        """What is written is, bit for bit, what the source holds, however it is cut into files."""
        made, source = self.specimen(), self.specimen().opened
        cut = made.convert("cut", max_shard_bytes=1 << 12, workers=1)
        if len(cut.weight_files()) < 2:
            raise CheckFailed("the source is too small to be cut in two")
        for name, rule in self._rules().items():
            shape = made.checkpoint.manifest.tensors[name]
            mapped = map_tensor(name, shape, rule, source.tensors, source.config)
            for checkpoint in (made.checkpoint, cut):
                if not checkpoint.file_of(name).load(name).equal(mapped):
                    raise CheckFailed(f"{name} is not what the source holds")

    def test_no_network(self) -> None:
        """Converting, building and running ask nothing of the network."""
        made = self.specimen()
        with no_network():
            made.convert("offline")
            found = made.greedy(made.prompts, made.load(made.build("offline_engine")))
        if found != made.greedy(made.prompts):
            raise CheckFailed("another engine of the same checkpoint gives other tokens")

    def test_no_pickle(self) -> None:
        """Checkpoint and engine hold safetensors, JSON and a tokenizer, nothing that can run."""
        made = self.specimen()
        require_plain(made.checkpoint.path)
        require_plain(made.runner.engine.path)

    def _used(self) -> list[str]:
        return sorted({name for rule in self._rules().values() for name in rule.names})

    def _rules(self) -> Mapping[str, Take]:
        made, source = self.specimen(), self.specimen().opened
        weight_map = source.weight_map or made.converter.weight_map(source.config)
        return resolve_rules(made.checkpoint.names(), weight_map, source.tensors.infos())


def other_sources(family: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the other installed families and a tiny source of each, as their own cases write it."""
    from porttool.testing.cases import case_modules, cases_in, is_there

    for module in case_modules().values():
        for case in cases_in(module) if is_there(module) else ():
            if case.family != family:
                path = folder / case.__name__ / "source"
                path.parent.mkdir(parents=True)
                try:
                    case().write_source(path, 0)
                except Exception as error:
                    raise CheckFailed(
                        f"{case.__name__} of the installed family {case.family!r} writes no "
                        f"source: {explained(error)}; mend it, or name its plugin in {DENY}"
                    ) from error
                yield case.family, path


def copy_source(source: Path, target: Path) -> None:
    """Copy a source, be it a file or a folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
