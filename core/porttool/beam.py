"""Beam search over the same runner contract, with transformers' scores and stopping rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from porttool.config import Sampling
from porttool.errors import UsageError
from porttool.generate import Completion, Finish
from porttool.nn.decoder import Step
from porttool.runner import Runner
from porttool.sampling import Penalties

Candidate = tuple[float, int, int]
"""Score, beam and token."""


@dataclass(frozen=True)
class Hypothesis:
    """A finished beam; its score is the sum of log-probabilities over length ** penalty."""

    tokens: tuple[int, ...]
    score: float
    finish: Finish


@dataclass
class BeamGroup:
    """All beams of one prompt. Beam b lives in slots[b]; the tokens exclude the prompt."""

    index: int
    prompt: list[int]
    slots: list[int]
    tokens: list[list[int]]
    scores: list[float]
    finished: list[Hypothesis] = field(default_factory=list)
    done: bool = False


def beam_search(
    runner: Runner, prompts: Sequence[Sequence[int]], sampling: Sampling, *, eos: tuple[int, ...]
) -> list[list[Completion]]:
    """Return the best `num_return_sequences` completions of each prompt, best first."""
    if sampling.keep_logits or sampling.logprobs:
        raise UsageError("beam search reports a score for each beam, not log-probabilities")
    at_once = runner.n_slots // sampling.num_beams
    results: list[list[Completion]] = []
    for first in range(0, len(prompts), at_once):
        batch = [list(p) for p in prompts[first : first + at_once]]
        results += search_batch(runner, batch, sampling, eos)
    return results


def search_batch(
    runner: Runner, prompts: list[list[int]], sampling: Sampling, eos: tuple[int, ...]
) -> list[list[Completion]]:
    """Search for as many prompts as the engine has room for."""
    n = sampling.num_beams
    groups = [
        BeamGroup(i, p, list(range(i * n, (i + 1) * n)), [[] for _ in range(n)], first_scores(n))
        for i, p in enumerate(prompts)
    ]
    logits = runner.prefill(prompts, [g.slots[0] for g in groups])
    runner.copy_slots(
        [g.slots[0] for g in groups for _ in g.slots], [s for g in groups for s in g.slots]
    )
    logits = logits.repeat_interleave(n, dim=0)
    penalties = Penalties(sampling, eos, n * len(groups), logits)
    for group in groups:
        for slot in group.slots:
            penalties.begin(slot, group.prompt)
    active = groups
    while active:
        moves: list[tuple[int, int]] = []
        ranked = rank(active, logits, penalties, max(2, 1 + len(eos)))
        for group, candidates in zip(active, ranked, strict=True):
            moves += extend(group, candidates, sampling, eos)
        active = [g for g in active if not g.done]
        if active:
            if moves:
                runner.copy_slots([a for a, _ in moves], [b for _, b in moves])
            step = next_step(active)
            if sampling.adjusts:
                follow(penalties, moves, step)
            logits = runner.step(step)
    return [collect(group, sampling) for group in groups]


def first_scores(n_beams: int) -> list[float]:
    """Return starting scores: all beams are equal copies, so only the first may branch."""
    return [0.0] + [-1e9] * (n_beams - 1)


def follow(penalties: Penalties, moves: list[tuple[int, int]], step: Step) -> None:
    """Let the penalties' tables follow the beams: slot copies, then the tokens of the next step."""
    if moves:
        source, target = torch.tensor(moves, device=penalties.device).T
        penalties.copy(source, target)
    penalties.add(*torch.stack([step.slots, step.tokens[:, 0]]).to(penalties.device))


def rank(
    groups: list[BeamGroup], logits: Tensor, penalties: Penalties, factor: int
) -> list[list[Candidate]]:
    """Return `factor` times as many candidates as beams for each group, the best first.

    From logits [n_groups * n_beams, vocab_size]; only what is returned leaves the device.
    """
    n, vocab = len(groups[0].slots), logits.shape[-1]
    slots = [slot for g in groups for slot in g.slots]
    written = [len(tokens) for g in groups for tokens in g.tokens]
    where = torch.tensor([slots, written], device=logits.device)
    scores = torch.tensor([score for g in groups for score in g.scores], device=logits.device)
    total = penalties.apply(logits.float().log_softmax(-1), where[0], where[1]) + scores[:, None]
    found = total.view(len(groups), n * vocab).topk(min(factor * n, n * vocab))
    return [
        [(value, place // vocab, place % vocab) for value, place in zip(*best, strict=True)]
        for best in zip(found.values.tolist(), found.indices.tolist(), strict=True)
    ]


def next_step(groups: list[BeamGroup]) -> Step:
    """Feed the last token of every beam."""
    beams = [(g, tokens) for g in groups for tokens in g.tokens]
    return Step.decode(
        [tokens[-1] for _, tokens in beams],
        [slot for g in groups for slot in g.slots],
        [len(g.prompt) + len(tokens) - 1 for g, tokens in beams],
    )


def extend(
    group: BeamGroup, candidates: list[Candidate], sampling: Sampling, eos: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Choose the next beams from ranked candidates; return slot copies (from, to).

    There are twice as many candidates as beams or more, so that enough go on when some end.
    """
    n = len(group.slots)
    length = len(group.tokens[0]) + 1
    last = length == sampling.max_new_tokens
    going: list[Candidate] = []
    for place, (value, beam, token) in enumerate(candidates):
        if token in eos or last:
            if place < n:
                finish(group, beam, token, value, eos, sampling)
        elif len(going) < n:
            going.append((value, beam, token))
    keep_best(group, n)
    group.done = last or not going or is_settled(group, going[0][0], length, sampling)
    return [] if group.done else adopt(group, going)


def finish(
    group: BeamGroup, beam: int, token: int, value: float, eos: tuple[int, ...], sampling: Sampling
) -> None:
    """Add a beam that ended, by an end token or at the longest length."""
    ended = token in eos
    length = len(group.tokens[beam]) + 1
    tokens = [*group.tokens[beam], *([] if ended else [token])]
    score = value / length**sampling.length_penalty
    group.finished.append(Hypothesis(tuple(tokens), score, "eos" if ended else "length"))


def keep_best(group: BeamGroup, n: int) -> None:
    """Keep the n best finished hypotheses."""
    group.finished = sorted(group.finished, key=lambda h: -h.score)[:n]


def is_settled(group: BeamGroup, best: float, length: int, sampling: Sampling) -> bool:
    """Return true when no running beam can still enter the finished ones, by HF's estimate."""
    if len(group.finished) < len(group.slots):
        return False
    return sampling.early_stopping or (
        best / length**sampling.length_penalty <= group.finished[-1].score
    )


def adopt(group: BeamGroup, going: list[Candidate]) -> list[tuple[int, int]]:
    """Make the chosen candidates the group's beams; return the slot copies they need."""
    moves = [
        (group.slots[beam], group.slots[i]) for i, (_, beam, _) in enumerate(going) if beam != i
    ]
    group.tokens = [[*group.tokens[beam], token] for _, beam, token in going]
    group.scores = [value for value, _, _ in going]
    return moves


def collect(group: BeamGroup, sampling: Sampling) -> list[Completion]:
    """Return the best finished hypotheses as completions."""
    best = group.finished[: sampling.num_return_sequences]
    return [Completion(h.tokens, h.finish, score=h.score) for h in best]
