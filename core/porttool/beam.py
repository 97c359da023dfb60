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
from porttool.sampling import adjust


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
    scores: Tensor
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
    logits = runner.step(Step.prefill(prompts, [g.slots[0] for g in groups]))
    runner.copy_slots(
        [g.slots[0] for g in groups for _ in g.slots], [s for g in groups for s in g.slots]
    )
    logits = logits.repeat_interleave(n, dim=0)
    active = groups
    while active:
        moves: list[tuple[int, int]] = []
        for group, part in zip(active, logits.split(n), strict=True):
            moves += extend(group, part, sampling, eos)
        active = [g for g in active if not g.done]
        if active:
            if moves:
                runner.copy_slots([a for a, _ in moves], [b for _, b in moves])
            logits = runner.step(next_step(active))
    return [collect(group, sampling) for group in groups]


def first_scores(n_beams: int) -> Tensor:
    """Return starting scores: all beams are equal copies, so only the first may branch."""
    scores = torch.full((n_beams,), -1e9)
    scores[0] = 0.0
    return scores


def next_step(groups: list[BeamGroup]) -> Step:
    """Feed the last token of every beam."""
    rows = [(g, b) for g in groups for b in range(len(g.slots))]
    return Step(
        torch.tensor([g.slots[b] for g, b in rows]),
        torch.tensor([g.tokens[b][-1:] for g, b in rows]),
        torch.tensor([len(g.prompt) + len(g.tokens[b]) - 1 for g, b in rows]),
        torch.ones(len(rows), dtype=torch.int64),
    )


def extend(
    group: BeamGroup, logits: Tensor, sampling: Sampling, eos: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Choose the next beams from logits [n_beams, vocab_size]; return slot copies (from, to).

    Twice as many candidates as beams are looked at, so that enough go on when some end.
    """
    n, vocab = len(group.slots), logits.shape[-1]
    logprobs = logits.float().log_softmax(-1).cpu()
    if sampling.adjusts:
        logprobs = adjust(logprobs, sampling, [group.prompt] * n, group.tokens, eos)
    total = logprobs + group.scores[:, None]
    values, flat = total.flatten().topk(min(max(2, 1 + len(eos)) * n, n * vocab))
    ranked = zip(values.tolist(), flat.tolist(), strict=True)
    candidates = [(value, place // vocab, place % vocab) for value, place in ranked]
    length = len(group.tokens[0]) + 1
    last = length == sampling.max_new_tokens
    going: list[tuple[float, int, int]] = []
    for rank, (value, beam, token) in enumerate(candidates):
        if token in eos or last:
            if rank < n:
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


def adopt(group: BeamGroup, going: list[tuple[float, int, int]]) -> list[tuple[int, int]]:
    """Make the chosen candidates the group's beams; return the slot copies they need."""
    moves = [
        (group.slots[beam], group.slots[i]) for i, (_, beam, _) in enumerate(going) if beam != i
    ]
    group.tokens = [[*group.tokens[beam], token] for _, beam, token in going]
    group.scores = torch.tensor([value for value, _, _ in going])
    return moves


def collect(group: BeamGroup, sampling: Sampling) -> list[Completion]:
    """Return the best finished hypotheses as completions."""
    best = group.finished[: sampling.num_return_sequences]
    return [Completion(h.tokens, h.finish, score=h.score) for h in best]
