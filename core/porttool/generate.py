"""The one generation loop: rows join a running batch, are fed, choose, stop and leave."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from porttool.config import ModelConfig, Sampling
from porttool.errors import CheckpointError, UsageError
from porttool.nn.decoder import Step
from porttool.runner import Runner
from porttool.sampling import Choices, Sampler
from porttool.text import Tokenizer, find_stop

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
    leave, and none changes another's result. Of the completions of all prompts, counted from 0,
    number i is drawn with `sampling.seed` + i. `on_token` is told each prompt's index and next
    token as it is chosen (with one completion a prompt). Limits are checked before anything runs.
    """
    check_prompts(prompts, runner)
    check_sampling(sampling, runner)
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


def advise(flag: str, length: int, config: ModelConfig) -> str:
    """Say how to build for a length, or that the model has no positions for it."""
    if config.position == "learned" and length >= config.n_positions:
        return f"take another model: this one has {config.n_positions} positions"
    return f"build with {flag} {length}"


def vocabulary_of(runner: Runner) -> int:
    """Return how many ids there are, those of virtual tokens included."""
    return runner.config.vocab_size + runner.prompt_rows


def check_prompts(prompts: Sequence[Sequence[int]], runner: Runner) -> None:
    """Refuse prompts that the engine was not built for, with the numbers and the fix."""
    most, vocabulary = runner.engine.manifest.limits.max_input_len, vocabulary_of(runner)
    if not prompts:
        raise UsageError("there is no prompt")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UsageError(f"prompt {i} is empty; give it at least one token")
        if len(prompt) > most:
            raise UsageError(
                f"prompt {i} has {len(prompt)} tokens, the engine takes {most}; "
                f"shorten it, or {advise('--max-input-len', len(prompt), runner.config)}"
            )
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            wrong = next(t for t in prompt if not 0 <= t < vocabulary)
            virtual = ", those of virtual tokens, from there on, need --prompt-table"
            raise UsageError(
                f"prompt {i} holds the id {wrong}; ids run from 0 to {vocabulary - 1}"
                + (virtual if wrong > 0 and not runner.prompt_rows else "")
            )


def check_sampling(sampling: Sampling, runner: Runner) -> None:
    """Refuse settings that the engine was not built for, with the numbers and the fix."""
    limits, vocabulary = runner.engine.manifest.limits, vocabulary_of(runner)
    if sampling.max_new_tokens > limits.max_output_len:
        raise UsageError(
            f"{sampling.max_new_tokens} new tokens asked for, the engine gives at most "
            f"{limits.max_output_len}; "
            f"{advise('--max-output-len', sampling.max_new_tokens, runner.config)}"
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
        self.hidden_stops = hidden_stops(sampling.stop, tokenizer)
        self.on_token = on_token
        self.sampler: Sampler | None = None
        self.greedy = not (
            sampling.temperature or sampling.adjusts or sampling.logprobs or sampling.keep_logits
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
                self.prefill(joining)
                active += joining
            active = self.release(active, free)
            if active:
                self.advance(active)
                active = self.release(active, free)

    def release(self, active: list[Row], free: list[int]) -> list[Row]:
        """Take finished rows out and give their slots back."""
        free.extend(row.slot for row in active if row.finish)
        return [row for row in active if not row.finish]

    def prefill(self, rows: list[Row]) -> None:
        """Feed the prompts of joining rows and take what follows."""
        logits = self.runner.prefill([r.prompt for r in rows], [r.slot for r in rows])
        if not self.greedy and self.sampler is None:
            self.sampler = Sampler(self.sampling, self.eos, self.runner.n_slots, logits)
        for row in rows:
            row.cached = len(row.prompt)
            if self.sampler is not None:
                self.sampler.begin(row.slot, row.prompt, row.index)
        choices = self.choices(rows)
        tokens = logits.argmax(-1) if choices is None else choices(logits, 0)
        self.take(rows, tokens[:, None], choices)

    def advance(self, rows: list[Row]) -> None:
        """Feed each row's last token and take what follows."""
        step = Step.decode(
            [r.tokens[-1] for r in rows], [r.slot for r in rows], [r.cached for r in rows]
        )
        room = min(self.sampling.max_new_tokens - len(r.tokens) for r in rows)
        choices = self.choices(rows)
        tokens = self.runner.decode(step, min(room, CHUNK), choices)
        for row in rows:
            row.cached += tokens.shape[1]
        self.take(rows, tokens, choices)

    def choices(self, rows: list[Row]) -> Choices | None:
        """Return what chooses the rows' next tokens; None where the likeliest is all there is."""
        if self.sampler is None:
            return None
        return Choices(self.sampler, [r.slot for r in rows], [len(r.tokens) for r in rows])

    def take(self, rows: list[Row], tokens: Tensor, choices: Choices | None) -> None:
        """Give each row its tokens [n, several], and what was kept of them, up to its end."""
        listed = tokens.tolist()
        logprobs = [part.tolist() for part in choices.logprobs] if choices else []
        logits = choices.logits if choices else []
        for r, row in enumerate(rows):
            for i, token in enumerate(listed[r]):
                if row.finish:
                    break
                if logprobs:
                    row.logprobs.append(logprobs[i][r])
                if logits:
                    row.logits.append(logits[i][r])
                self.append(row, token)

    def append(self, row: Row, token: int) -> None:
        """Add a token to a row and see whether it ends there."""
        if token in self.eos:
            row.finish = "eos"
            return
        if token in self.hidden_stops:
            row.finish = "stop"
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


def hidden_stops(stop: Sequence[str], tokenizer: Tokenizer | None) -> set[int]:
    """Return the ids of stop strings that are special tokens, which no text shows."""
    found: set[int] = set()
    if tokenizer is None:
        return found
    for text in stop:
        with suppress(CheckpointError):  # a vocabulary may lack a piece of it
            ids = tokenizer.encode(text)
            found.update(ids if len(ids) == 1 and not tokenizer.decode(ids) else ())
    return found


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
