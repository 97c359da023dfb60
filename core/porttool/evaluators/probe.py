"""The prompts that both sides are given to compare logits, and what the reference makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from porttool.config import HALF, Sampling
from porttool.device import Device
from porttool.errors import UsageError
from porttool.evaluators.logits import decode_logits, prefill_logits
from porttool.evaluators.reach import Reach
from porttool.evaluators.reference import ReferenceModel
from porttool.evaluators.results import Continuation, Decoding
from porttool.evaluators.sides import generate_all
from porttool.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from porttool.config import Dtype
    from porttool.evaluators.parity import ParityOptions
    from porttool.evaluators.virtual import VirtualTokens
    from porttool.runner import Runner
    from porttool.text import Tokenizer


@dataclass
class Probe:
    """Prompts, the reference's greedy continuations of them, and its logits of both.

    logits  one tensor [prompt + continuation, vocab_size] a prompt, float32 or wider
    own     the same from the reference in the engine's type, where that is asked for
    reach   longer prompts than these, if the engine takes such
    virtual a prompt table, if its tokens precede the prompts
    """

    runner: Runner
    source: Path
    device: Device
    description: str
    prompts: list[list[int]]
    continuations: list[Continuation]
    logits: list[Tensor]
    own: list[Tensor] | None
    reach: Reach | None = None
    virtual: VirtualTokens | None = None
    seen: dict[int, list[Tensor]] = field(default_factory=dict)
    """Logits that the engine gave: in prefill (0), and in decode by width."""

    @classmethod
    def make(
        cls,
        runner: Runner,
        tokenizer: Tokenizer | None,
        source: Path,
        options: ParityOptions,
        virtual: VirtualTokens | None = None,
        progress: Progress = SILENT,
    ) -> Probe:
        """Choose prompts and run the reference; `virtual` tokens come before each prompt."""
        prompts = choose_prompts(runner, tokenizer, options, virtual.longest if virtual else 0)
        prompts = virtual.before(prompts) if virtual else prompts
        rows = virtual.rows if virtual else None
        dtype = runner.engine.manifest.dtype
        wide: Dtype = "float64" if dtype == "float64" else "float32"
        device = options.reference_device
        halves = options.yardstick and dtype in HALF
        passes = (1 + halves) * (len(prompts) + options.long_contexts)
        progress.start("reference", 1 + passes, unit="passes")

        def passed(logits: Tensor) -> Tensor:
            progress.advance(1)
            return logits

        model = ReferenceModel(source, dtype=wide, device=device, rows=rows)
        decoding = Decoding(max_new_tokens=new_tokens(runner, options))
        continuations = model.generate(prompts, decoding)
        progress.advance(1)
        sequences = join(prompts, continuations)
        logits = [passed(model.logits(s)) for s in sequences]
        reach, n_new, covered = None, decoding.max_new_tokens, max(map(len, sequences))
        if options.long_contexts:
            reach = Reach.make(runner, model, covered=covered, n_new=n_new, seed=options.seed)
            progress.advance(1)
        description = model.description
        del model
        own = None
        if halves:
            narrow = ReferenceModel(source, dtype=dtype, device=device, rows=rows)
            own = [passed(narrow.logits(s)) for s in sequences]
            if reach is not None:
                reach.run(narrow)
                progress.advance(1)
        progress.finish()
        return cls(
            runner, source, device, description, prompts, continuations, logits, own, reach, virtual
        )

    @property
    def rows(self) -> Tensor | None:
        """Rows of a prompt table, as its source has them: [n_rows, d_model]."""
        return self.virtual.rows if self.virtual else None

    def reference(self, dtype: Dtype = "float32") -> ReferenceModel:
        """Load the reference once more."""
        return ReferenceModel(self.source, dtype=dtype, device=self.device, rows=self.rows)

    @property
    def sequences(self) -> list[list[int]]:
        """Prompts with their continuations, but for the last token, which nothing follows."""
        return [s[:-1] for s in join(self.prompts, self.continuations)]

    def of_prompts(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """Return what belongs to the prompts."""
        return [row[: len(p)] for row, p in zip(logits, self.prompts, strict=True)]

    def of_continuations(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """Return what belongs to the continuations' tokens."""
        return [row[len(p) : -1] for row, p in zip(logits, self.prompts, strict=True)]

    def prefill(self) -> list[Tensor]:
        """The engine's logits of the prompts."""
        if 0 not in self.seen:
            self.seen[0] = prefill_logits(self.runner, self.prompts)
        return self.seen[0]

    def decode(self, width: int) -> list[Tensor]:
        """The engine's logits of the continuations, in steps of up to `width` tokens."""
        if width not in self.seen:
            lengths = [len(p) for p in self.prompts]
            self.seen[width] = decode_logits(self.runner, self.sequences, lengths, width)
        return self.seen[width]

    def generate(self) -> list[Continuation]:
        """The engine's own greedy continuations."""
        sampling = Sampling(max_new_tokens=len(self.continuations[0].tokens))
        return generate_all(self.runner, self.prompts, sampling, ())


def join(
    prompts: Sequence[Sequence[int]], continuations: Sequence[Continuation]
) -> list[list[int]]:
    """Return prompts with their continuations."""
    return [[*p, *c.tokens] for p, c in zip(prompts, continuations, strict=True)]


def new_tokens(runner: Runner, options: ParityOptions) -> int:
    """Return how many tokens follow a prompt: at least two, so that a decode step is compared."""
    limit = runner.engine.manifest.limits.max_output_len
    if limit < 2:
        raise UsageError("verify needs an engine with --max-output-len 2 or more")
    return max(2, min(options.new_tokens, limit))


def choose_prompts(
    runner: Runner, tokenizer: Tokenizer | None, options: ParityOptions, n_virtual: int = 0
) -> list[list[int]]:
    """Return the texts' ids, or random ids in prompts of very different lengths.

    There is room for `n_virtual` tokens before each.
    """
    limits, config = runner.engine.manifest.limits, runner.config
    room = config.n_positions - new_tokens(runner, options) - n_virtual
    longest = min(options.prompt_len, limits.max_input_len - n_virtual, max(room, 1))
    if longest < 1 or (n_virtual and room < 1):
        raise UsageError(
            f"{n_virtual} virtual tokens leave no room for a prompt; build the engine with a "
            "greater --max-input-len"
        )
    if options.texts:
        if tokenizer is None:
            raise UsageError("texts need a tokenizer; name one with --tokenizer")
        found = [tokenizer.encode(text)[-longest:] for text in options.texts]
        if not all(found):
            raise UsageError("a text is empty; give verify texts with at least one token")
        return found
    random = Random(options.seed)
    n = options.n_prompts
    lengths = [max(1, longest - i * longest // max(n - 1, 1)) for i in range(n)]
    return [[random.randrange(config.vocab_size) for _ in range(k)] for k in lengths]
