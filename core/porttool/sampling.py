"""From logits to the next token: penalties, forbidden tokens, temperature, top-k, top-p, min-p.

The order is that of transformers' processors, so that the same settings mean the same
distribution: repetition, presence and frequency, bad words, minimum length, temperature, top-k,
top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from porttool.config import Sampling

FORBIDDEN = float("-inf")


def adjust(
    logits: Tensor,
    sampling: Sampling,
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    eos: tuple[int, ...],
) -> Tensor:
    """Apply penalties and prohibitions to float logits [n, vocab_size], one history a row."""
    logits = logits.clone()
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        penalise(logits[row], sampling, prompt, output)
        for token in bad_tokens(sampling.bad_words, [*prompt, *output]):
            logits[row, token] = FORBIDDEN
        if len(output) < sampling.min_new_tokens and eos:
            logits[row, list(eos)] = FORBIDDEN
    return logits


def penalise(
    logits: Tensor, sampling: Sampling, prompt: Sequence[int], output: Sequence[int]
) -> None:
    """Penalise in place the tokens of one row's history [vocab_size].

    Repetition (Keskar et al. 2019): seen logits are divided, or multiplied where negative.
    Presence and frequency: subtracted once, and once for each occurrence in the output.
    """
    size = logits.shape[0]
    if sampling.repetition_penalty != 1:
        seen = torch.tensor([t for t in {*prompt, *output} if t < size], device=logits.device)
        values = logits[seen]
        factor = sampling.repetition_penalty
        logits[seen] = torch.where(values < 0, values * factor, values / factor)
    if output and (sampling.presence_penalty or sampling.frequency_penalty):
        tokens, counts = torch.tensor(output, device=logits.device).unique(return_counts=True)
        logits[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def bad_tokens(bad_words: Sequence[Sequence[int]], history: Sequence[int]) -> list[int]:
    """Return the tokens that would complete a bad word after this history."""
    return [
        word[-1]
        for word in bad_words
        if len(word) == 1 or tuple(history[1 - len(word) :]) == tuple(word[:-1])
    ]


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return logits [n, vocab_size] over temperature; what the limits exclude is -inf."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, FORBIDDEN)
    if sampling.top_p < 1:
        logits = keep_nucleus(logits, sampling.top_p)
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, FORBIDDEN)
    return logits


def keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of tokens whose probability reaches top_p (Holtzman et al. 2020)."""
    ordered, order = logits.sort(descending=False)
    tail = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    tail[:, -1] = False
    return logits.masked_fill(tail.scatter(1, order, tail), FORBIDDEN)


def draw(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw one token a row [n] from logits [n, vocab_size], each with its own generator.

    The draw is on the CPU, so that a seed means the same token on every device.
    """
    probabilities = logits.softmax(-1).cpu()
    return torch.stack([
        torch.multinomial(p, 1, generator=g)[0]
        for p, g in zip(probabilities, generators, strict=True)
    ])  # fmt: skip
