"""The one generation loop: rows join a running batch, are fed, choose, stop and leave."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from porttool.config import Limits, Sampling
from porttool.errors import UsageError
from porttool.nn.decoder import Step
from porttool.runner import Runner
from porttool.sampling import adjust, draw, filtered
from porttool.text import Tokenizer

Finish = Literal["eos", "stop", "length"]
OnToken = Callable[[int, int], None]

CHUNK = 16
"""Tokens that a device decodes before the host looks whether a row has ended."""


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt, without the end token that may have finished it.

    `logprobs` are log-probabilities of the tokens under the model itself, before any penalty or
    temperature; `logits` is [len(tokens), vocab_size]; `score` is a beam's.
    """

    tokens: tuple[int, ...]
    finish: Finish
    text: str | None = None
    logprobs: tuple[float, ...] | None = None
    logits: Tensor | None = None
    score: float | None = None


@dataclass
class Row:
    """A prompt on its way: where it lives and what it has produced."""

    index: int
    prompt: list[int]
    slot: int = -1
    cached: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    finish: Finish | None = None


def generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos: tuple[int, ...],
    tokenizer: Tokenizer | None = None,
    on_token: OnToken | None = None,
) -> list[list[Completion]]:
    """Continue every prompt; return its completions, best first, in the order of the prompts.

    All prompts may be of different lengths and more than the engine's batch: they join as others
    leave, and neither batch nor order changes a result. `on_token` is told each prompt's index
    and next token as it is chosen (with one completion a prompt). Limits are checked before
    anything runs.
    """
    vocabulary = runner.config.vocab_size + runner.prompt_rows
    check_prompts(prompts, sampling, runner.engine.manifest.limits, vocabulary)
    if sampling.stop and tokenizer is None:
        raise UsageError("stop strings need a tokenizer")
    ends = () if sampling.ignore_eos else eos
    if sampling.num_beams > 1:
        from porttool.beam import beam_search

        found = beam_search(runner, prompts, sampling, eos=ends)
        return [[with_text(c, sampling, tokenizer) for c in beams] for beams in found]
    n = sampling.num_return_sequences
    rows = [Row(i, list(p)) for i, p in enumerate(p for p in prompts for _ in range(n))]
    Loop(runner, sampling, ends, tokenizer, on_token).run(rows)
    done = [with_text(completed(row, sampling), sampling, tokenizer) for row in rows]
    return [done[i : i + n] for i in range(0, len(done), n)]


def check_prompts(
    prompts: Sequence[Sequence[int]], sampling: Sampling, limits: Limits, vocabulary: int
) -> None:
    """Refuse what the engine was not built for, with the numbers and the fix."""
    if not prompts:
        raise UsageError("there is no prompt")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UsageError(f"prompt {i} is empty; give it at least one token")
        if len(prompt) > limits.max_input_len:
            raise UsageError(
                f"prompt {i} has {len(prompt)} tokens, the engine takes {limits.max_input_len}; "
                f"shorten it, or build with --max-input-len {len(prompt)}"
            )
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            wrong = next(t for t in prompt if not 0 <= t < vocabulary)
            raise UsageError(f"prompt {i} holds the id {wrong}; ids run from 0 to {vocabulary - 1}")
    if sampling.max_new_tokens > limits.max_output_len:
        raise UsageError(
            f"{sampling.max_new_tokens} new tokens asked for, the engine gives at most "
            f"{limits.max_output_len}; build with --max-output-len {sampling.max_new_tokens}"
        )
    width = min(limits.max_beam_width, limits.max_batch_size)
    if sampling.num_beams > width:
        raise UsageError(
            f"{sampling.num_beams} beams asked for, the engine holds {width}; build with "
            f"--max-beam-width {sampling.num_beams} and as large a --max-batch-size"
        )
    for word in sampling.bad_words:
        if not all(0 <= t < vocabulary for t in word):
            raise UsageError(f"bad word {list(word)} has an id outside 0 to {vocabulary - 1}")


class Loop:
    """A running batch on one runner."""

    def __init__(
        self,
        runner: Runner,
        sampling: Sampling,
        eos: tuple[int, ...],
        tokenizer: Tokenizer | None,
        on_token: OnToken | None,
    ) -> None:
        self.runner = runner
        self.sampling = sampling
        self.eos = eos
        self.tokenizer = tokenizer
        self.on_token = on_token
        self.generators: dict[int, torch.Generator] = {}
        self.greedy = sampling.temperature == 0
        self.chained = (
            runner.decodes_on_device
            and self.greedy
            and not (sampling.adjusts or sampling.logprobs or sampling.keep_logits)
        )

    def run(self, rows: Sequence[Row]) -> None:
        """Feed every row until it has finished."""
        waiting = deque(rows)
        free = list(range(self.runner.n_slots))[::-1]
        active: list[Row] = []
        while waiting or active:
            joining: list[Row] = []
            while waiting and free:
                row = waiting.popleft()
                row.slot = free.pop()
                joining.append(row)
            if joining:
                self.accept(joining, self.prefill(joining))
                active += joining
            active = self.release(active, free)
            if active:
                self.advance(active)
                active = self.release(active, free)

    def release(self, active: list[Row], free: list[int]) -> list[Row]:
        """Take finished rows out and give their slots back."""
        free.extend(row.slot for row in active if row.finish)
        return [row for row in active if not row.finish]

    def prefill(self, rows: list[Row]) -> Tensor:
        """Feed the prompts of joining rows; return logits [n, vocab_size]."""
        logits = self.runner.step(Step.prefill([r.prompt for r in rows], [r.slot for r in rows]))
        for row in rows:
            row.cached = len(row.prompt)
        return logits

    def advance(self, rows: list[Row]) -> None:
        """Feed each row's last token and take what follows."""
        step = Step(
            torch.tensor([r.slot for r in rows]),
            torch.tensor([r.tokens[-1:] for r in rows]),
            torch.tensor([r.cached for r in rows]),
            torch.ones(len(rows), dtype=torch.int64),
        )
        if not self.chained:
            logits = self.runner.step(step)
            for row in rows:
                row.cached += 1
            self.accept(rows, logits)
            return
        room = min(self.sampling.max_new_tokens - len(r.tokens) for r in rows)
        decoded = self.runner.decode(step, min(room, CHUNK)).tolist()
        for row, tokens in zip(rows, decoded, strict=True):
            row.cached += len(tokens)
            for token in tokens:
                if not row.finish:
                    self.append(row, token)

    def accept(self, rows: list[Row], logits: Tensor) -> None:
        """Choose each row's next token from logits [n, vocab_size] and take it."""
        tokens = self.choose(rows, logits)
        if self.sampling.logprobs:
            chosen = logits.log_softmax(-1).gather(1, tokens.to(logits.device)[:, None])
            for row, value in zip(rows, chosen[:, 0].tolist(), strict=True):
                row.logprobs.append(value)
        if self.sampling.keep_logits:
            for row, values in zip(rows, logits.float().cpu(), strict=True):
                row.logits.append(values)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            self.append(row, token)

    def choose(self, rows: list[Row], logits: Tensor) -> Tensor:
        """Return the next token of each row [n]."""
        if self.sampling.adjusts:
            prompts, outputs = [r.prompt for r in rows], [r.tokens for r in rows]
            logits = adjust(logits, self.sampling, prompts, outputs, self.eos)
        if self.greedy:
            return logits.argmax(-1)
        generators = [self.generator(row.index) for row in rows]
        return draw(filtered(logits, self.sampling), generators)

    def generator(self, index: int) -> torch.Generator:
        """Return a row's own generator: its draws do not depend on its neighbours."""
        if index not in self.generators:
            seed = self.sampling.seed + index
            self.generators[index] = torch.Generator().manual_seed(seed)
        return self.generators[index]

    def append(self, row: Row, token: int) -> None:
        """Add a token to a row and see whether it ends there."""
        if token in self.eos:
            row.finish = "eos"
            return
        row.tokens.append(token)
        if self.on_token is not None:
            self.on_token(row.index, token)
        if self.sampling.stop and self.tokenizer is not None:
            tail = row.tokens[-stop_window(self.sampling.stop) :]
            if find_stop(self.tokenizer.decode(tail), self.sampling.stop) is not None:
                row.finish = "stop"
        if row.finish is None and len(row.tokens) >= self.sampling.max_new_tokens:
            row.finish = "length"


def stop_window(stop: Sequence[str]) -> int:
    """Return how many last tokens can hold a stop string: each is at least one byte of it."""
    return max(len(s.encode()) for s in stop) + 4


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return where the first stop string begins, or None."""
    found = [i for i in (text.find(s) for s in stop) if i >= 0]
    return min(found) if found else None


def completed(row: Row, sampling: Sampling) -> Completion:
    """Return what a finished row has produced."""
    n = len(row.tokens)
    return Completion(
        tokens=tuple(row.tokens),
        finish=row.finish or "length",
        logprobs=tuple(row.logprobs[:n]) if sampling.logprobs else None,
        logits=torch.stack(row.logits[:n]) if sampling.keep_logits and n else None,
    )


def with_text(
    completion: Completion, sampling: Sampling, tokenizer: Tokenizer | None
) -> Completion:
    """Add the text, cut before the first stop string."""
    if tokenizer is None:
        return completion
    text = tokenizer.decode(completion.tokens)
    return replace(completion, text=text[: find_stop(text, sampling.stop)])
