"""From logits to the next token: penalties, forbidden tokens, temperature, top-k, top-p, min-p.

The order is that of transformers' processors, so that the same settings mean the same
distribution: repetition, presence and frequency, bad words, minimum length, temperature, top-k,
top-p, min-p. All of it happens on the device that the logits are on, and never waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from porttool.config import Sampling

FORBIDDEN = float("-inf")

READ = 1 << 30
"""What a row's table holds for a token of the prompt; what is below counts it in the output."""

NOTHING, ANYTHING = -1, -2
"""In place of a token: before a row's first one, and in a bad word where any will do."""

WHOLE = 2.0**40
"""Probabilities become whole numbers of this, whose sums are exact in any order."""


class Penalties:
    """Penalties and prohibitions, with tables of what each row has read and written.

    Rows are known by their cache slots. `like` [n, vocab_size] are logits: it says where the
    tables live and how wide they are. Ids of a prompt table have no logit and no penalty.
    """

    def __init__(
        self, sampling: Sampling, eos: tuple[int, ...], n_slots: int, like: Tensor
    ) -> None:
        self.sampling = sampling
        self.device, vocab = like.device, like.shape[-1]
        s, words = sampling, [word for word in sampling.bad_words if word[-1] < vocab]
        self.counts = bool(s.presence_penalty or s.frequency_penalty)
        wide = vocab if self.counts or s.repetition_penalty != 1 else 0
        self.table = torch.zeros(n_slots, wide, dtype=torch.int32, device=self.device)
        longest = max((len(word) for word in words), default=1) - 1
        self.last = torch.full((n_slots, longest), NOTHING, device=self.device)
        begins = [[ANYTHING] * (longest + 1 - len(word)) + list(word[:-1]) for word in words]
        self.begins = torch.tensor(
            begins, dtype=torch.int64, device=self.device
        )  # [words, longest]
        self.completes = torch.tensor([word[-1] for word in words], device=self.device)  # [words]
        self.ends = torch.zeros(vocab, dtype=torch.bool)
        self.ends[[token for token in eos if token < vocab]] = True
        self.ends = self.ends.to(self.device)

    def begin(self, slot: int, prompt: Sequence[int]) -> None:
        """Forget who lived in a slot: from now on a row with this prompt does."""
        wide, longest = self.table.shape[1], self.last.shape[1]
        if wide:
            ids = torch.tensor([t for t in {*prompt} if t < wide], dtype=torch.int64)
            self.table[slot].zero_().index_fill_(0, ids.to(self.device), READ)
        tail = list(prompt[max(len(prompt) - longest, 0) :])
        self.last[slot] = torch.tensor([NOTHING] * (longest - len(tail)) + tail)

    def add(self, slots: Tensor, tokens: Tensor) -> None:
        """Note the tokens [n] that the rows in these slots [n] have written."""
        if self.table.shape[1]:
            self.table[slots, tokens] += 1
        self.last[slots] = torch.cat([self.last[slots], tokens[:, None]], dim=1)[:, 1:]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy whole rows, as if at once."""
        self.table[target] = self.table[source]
        self.last[target] = self.last[source]

    def apply(self, logits: Tensor, slots: Tensor, written: Tensor) -> Tensor:
        """Return logits [n, vocab_size] with every change; rows have `written` [n] tokens."""
        s = self.sampling
        if self.table.shape[1]:
            logits = self._penalised(logits, self.table.index_select(0, slots))
        if len(self.completes):
            same = (self.last[slots][:, None] == self.begins) | (self.begins == ANYTHING)
            hits = logits.new_zeros(same.shape[:2]).masked_fill(same.all(-1), FORBIDDEN)
            logits = logits.scatter_add(1, self.completes.expand_as(hits), hits)
        if s.min_new_tokens:
            early = (written < s.min_new_tokens)[:, None]
            logits = logits.masked_fill(early & self.ends, FORBIDDEN)
        return logits

    def _penalised(self, logits: Tensor, table: Tensor) -> Tensor:
        """Repetition (Keskar et al. 2019): seen logits are divided, or multiplied where negative.

        Presence and frequency: subtracted once, and once for each occurrence in the output.
        """
        s = self.sampling
        if s.repetition_penalty != 1:
            factor = s.repetition_penalty
            # dividing or multiplying, whichever moves the logit down (up with a factor below 1)
            least = torch.minimum if factor > 1 else torch.maximum
            logits = torch.where(table > 0, least(logits * factor, logits / factor), logits)
        if self.counts:
            count = table & (READ - 1)
            less = logits - (s.presence_penalty + s.frequency_penalty * count)
            logits = torch.where(count > 0, less, logits)
        return logits


class Sampler:
    """Chooses tokens for rows that are known by their cache slots, as the settings say.

    A row's random numbers are drawn when it begins, from its own seed, one for each token that it
    may write: no neighbour, batch, device or pause changes them.
    """

    def __init__(
        self, sampling: Sampling, eos: tuple[int, ...], n_slots: int, like: Tensor
    ) -> None:
        self.sampling = sampling
        self.device = like.device
        self.penalties = Penalties(sampling, eos, n_slots, like) if sampling.adjusts else None
        most = sampling.max_new_tokens if sampling.temperature else 0
        self.numbers = torch.zeros(n_slots, most, dtype=torch.float64, device=self.device)

    def begin(self, slot: int, prompt: Sequence[int], index: int) -> None:
        """Let row `index` of the whole request begin in a slot."""
        if self.penalties is not None:
            self.penalties.begin(slot, prompt)
        seeded = torch.Generator().manual_seed(self.sampling.seed + index)
        most = self.numbers.shape[1]
        self.numbers[slot] = torch.rand(most, generator=seeded, dtype=torch.float64)

    def choose(self, logits: Tensor, slots: Tensor, written: Tensor) -> Tensor:
        """Return the next token [n] of rows in these slots [n] that have `written` [n] tokens."""
        if self.penalties is not None:
            logits = self.penalties.apply(logits, slots, written)
        if self.sampling.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            tokens = draw(filtered(logits, self.sampling), self.numbers[slots, written])
        if self.penalties is not None:
            self.penalties.add(slots, tokens)
        return tokens


class Choices:
    """One row's or many rows' next tokens, and what is to be kept beside them.

    Made for one call of `Runner.decode`, which calls it for every token. `logprobs` holds [n] and
    `logits` [n, vocab_size] for each; the latter are on their way to the host, and there when
    the tokens are.
    """

    def __init__(self, sampler: Sampler, slots: Sequence[int], written: Sequence[int]) -> None:
        self.sampler = sampler
        self.slots, self.written = torch.tensor([slots, written], device=sampler.device)
        self.logprobs: list[Tensor] = []
        self.logits: list[Tensor] = []

    def __call__(self, logits: Tensor, i: int) -> Tensor:
        """Return the tokens [n] that follow the i of this call, from logits [n, vocab_size]."""
        tokens = self.sampler.choose(logits, self.slots, self.written + i)
        if self.sampler.sampling.logprobs:
            self.logprobs.append(logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
        if self.sampler.sampling.keep_logits:
            # a runner may write the next logits over these
            self.logits.append(logits.to("cpu", torch.float32, non_blocking=True, copy=True))
        return tokens


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
    ordered, order = logits.sort(stable=True)
    reached = shares(ordered).cumsum(-1)
    tail = reached <= (1 - top_p) * reached[:, -1:]
    tail[:, -1] = False
    return logits.masked_fill(tail.scatter(1, order, tail), FORBIDDEN)


def shares(logits: Tensor) -> Tensor:
    """Return probabilities [n, vocab_size] in whole parts of 2**-40, int64.

    Devices add in different orders, and one device in an order that depends on the batch.
    """
    return (logits.softmax(-1) * WHOLE).long()


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """Return the tokens [n] where `numbers` [n], uniform in [0, 1), fall among probabilities.

    The first token at which the sum of probabilities exceeds the number's part of their total:
    one of probability 0 never is.
    """
    reached = shares(logits).cumsum(-1)  # [n, vocab_size]
    place = (numbers[:, None] * reached[:, -1:]).long()  # below the total: 1 - 2**-53 rounds down
    found = torch.searchsorted(reached, place, right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)  # only when logits are NaN
