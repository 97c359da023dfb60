"""Running each side of a comparison over the same prompts, with its speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from porttool.config import Dtype, Sampling
from porttool.device import Device
from porttool.evaluators.agreement import drift_of
from porttool.evaluators.logits import feed, make_step
from porttool.evaluators.reference import (
    ReferenceModel,
    fingerprint_model,
    median_seconds,
)
from porttool.evaluators.results import Continuation, Decoding, SideResult, Speed, Task
from porttool.evaluators.transformers_folder import end_ids
from porttool.evaluators.unfinished import Begun, Unfinished
from porttool.progress import Progress
from porttool.sources.places import SourceFiles
from porttool.text import Tokenizer

if TYPE_CHECKING:
    from porttool.generate import Completion
    from porttool.runner import Runner

ON_DEVICE_DRIFT = 64
"""Prompts run once more for log-probabilities where the timed run decodes on the device."""

ROUNDING_PROMPTS = 32
"""Prompts over which the reference's own rounding is measured."""

Prompts = Sequence[Sequence[int]]


def begin_reference(
    model: ReferenceModel, task: Task, *, batch_size: int, output: Path
) -> Unfinished:
    """Return what a run of the same kind that was stopped has left in `output`."""
    begun = Begun(
        description=model.description,
        source=SourceFiles.of(model.folder).fingerprint,
        batch_size=batch_size,
        task=task,
    )
    return Unfinished(output, begun)


def run_reference(
    model: ReferenceModel,
    tokenizer: Tokenizer,
    prompts: Prompts,
    done: Unfinished,
    *,
    progress: Progress,
) -> SideResult:
    """Summarise with the reference, going on behind what is done."""
    task = done.begun.task
    if done.replaces:
        progress.note(f"{done.path} is of a run with other options or models: it begins anew")
    first = model.first_token_seconds(prompts, task.decoding)
    if done.n_done:
        progress.note(f"{done.path} has {done.n_done} of {len(prompts)} prompts: it goes on")
    if left := prompts[done.n_done :]:
        progress.start("Hugging Face", len(left), unit="prompts")
        began = time.perf_counter()
        for found in model.batches(left, task.decoding, done.begun.batch_size):
            done.add(found, time.perf_counter() - began)
            progress.advance(len(found))
            began = time.perf_counter()
        progress.finish()
    continuations = [c for batch in done.batches for c in batch.continuations]
    return SideResult(
        side="reference",
        description=model.description,
        model=fingerprint_model(model.folder),
        source=done.begun.source,
        ends=end_ids(model.folder),
        dtype=model.dtype,
        task=task,
        speed=speed_of(continuations, done.seconds, first),
        continuations=tuple(with_text(c, tokenizer) for c in continuations),
    )


def measure_rounding(
    folder: Path, device: Device, prompts: Prompts, reference: SideResult, dtype: Dtype
) -> float:
    """Run the reference's own tokens through it in a narrower type; return its drift's 99 %."""
    import numpy as np

    model = ReferenceModel(folder, dtype=dtype, device=device)
    drift: list[float] = []
    pairs = zip(prompts, reference.continuations, strict=True)
    for prompt, found in islice(((p, c) for p, c in pairs if c.tokens), ROUNDING_PROMPTS):
        if found.logprobs is not None:
            logits = model.logits([*prompt, *found.tokens])[len(prompt) - 1 : -1]
            drift += drift_of(logits, found)
    return float(np.quantile(drift, 0.99)) if drift else 0.0


def run_engine(
    runner: Runner, tokenizer: Tokenizer, prompts: Prompts, task: Task, *, progress: Progress
) -> SideResult:
    """Summarise with the engine, all prompts at once: the engine batches them itself."""
    decoding = task.decoding
    at_once = decoding.num_beams == 1 and not runner.decodes_on_device
    sampling = sampling_of(decoding, logprobs=at_once)
    one = Sampling(max_new_tokens=1)
    first = median_seconds(lambda p: generate_all(runner, [p], one, decoding.eos), prompts)
    # Fewer where an end token comes first.
    progress.start("engine", len(prompts) * decoding.max_new_tokens, unit="tokens at most")
    began = time.perf_counter()
    found = generate_all(runner, prompts, sampling, decoding.eos, progress=progress)
    seconds = time.perf_counter() - began
    progress.finish()
    if decoding.num_beams > 1:
        found = [rescored(runner, p, c, decoding) for p, c in zip(prompts, found, strict=True)]
    elif not at_once:
        found = add_logprobs(runner, prompts, found, decoding)
    manifest = runner.engine.manifest
    return SideResult(
        side="engine",
        description=runner.description,
        model=manifest.checkpoint_digest,
        engine=manifest.seal,
        dtype=manifest.dtype,
        task=task,
        speed=speed_of(found, seconds, first),
        continuations=tuple(with_text(c, tokenizer) for c in found),
    )


def sampling_of(decoding: Decoding, *, logprobs: bool) -> Sampling:
    """Say in porttool's words how to decode."""
    beams = decoding.num_beams > 1
    return Sampling(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.num_beams,
        length_penalty=decoding.length_penalty,
        early_stopping=decoding.early_stopping and beams,
        logprobs=logprobs,
    )


def generate_all(
    runner: Runner,
    prompts: Prompts,
    sampling: Sampling,
    eos: tuple[int, ...],
    *,
    progress: Progress | None = None,
) -> list[Continuation]:
    """Continue every prompt with the engine; the best beam where there are several.

    A beam's tokens are known when its search has ended: progress goes by as many prompts as the
    engine searches at a time.
    """
    from porttool.generate import generate

    def count(index: int, token: int) -> None:
        if progress is not None:
            progress.advance(1)

    beams = sampling.num_beams > 1
    at_once = max(runner.n_slots // sampling.num_beams if beams else len(prompts), 1)
    found: list[Continuation] = []
    for first in range(0, len(prompts), at_once):
        some = prompts[first : first + at_once]
        done = generate(runner, some, sampling, eos=eos, on_token=count)
        found += [continuation(completions[0]) for completions in done]
        if beams and progress is not None:
            progress.advance(sum(len(completions[0].tokens) for completions in done))
    return found


def continuation(completion: Completion) -> Continuation:
    """Keep of a completion what is compared."""
    return Continuation(
        tokens=completion.tokens,
        ended=completion.finish == "eos",
        logprobs=completion.logprobs,
        score=completion.score,
    )


def add_logprobs(
    runner: Runner, prompts: Prompts, found: list[Continuation], decoding: Decoding
) -> list[Continuation]:
    """Run the first prompts again, step by step, for the log-probabilities of their tokens.

    Where the second run chose other tokens, the log-probabilities end.
    """
    again = generate_all(
        runner, prompts[:ON_DEVICE_DRIFT], sampling_of(decoding, logprobs=True), decoding.eos
    )
    merged = []
    for first, second in zip(found, again, strict=False):
        pairs = enumerate(zip(first.tokens, second.tokens, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), len(second.tokens))
        kept = (second.logprobs or ())[:same]
        merged.append(first.model_copy(update={"logprobs": kept}))
    return merged + found[len(again) :]


def rescored(
    runner: Runner, prompt: Sequence[int], beam: Continuation, decoding: Decoding
) -> Continuation:
    """Give a beam the score that the engine's own logits give its tokens.

    A search that mixes beams up may return the score of another, which tells nothing of these.
    """
    import torch

    tokens, n = list(beam.tokens), len(prompt)
    whole = [*prompt, *tokens]
    logits = [runner.step(make_step(runner, [whole], [0], [n], None)).cpu()]
    logits += feed(runner, [whole], [n], [len(tokens)]) if tokens else []
    logprobs = torch.cat(logits).double().log_softmax(-1)  # [len(tokens) + 1, vocab_size]
    total = float(logprobs[range(len(tokens)), tokens].sum())
    if beam.ended:
        total += float(logprobs[-1, list(decoding.eos)].max())
    length = len(tokens) + beam.ended
    return beam.model_copy(update={"score": total / length**decoding.length_penalty})


def speed_of(found: Sequence[Continuation], seconds: float, first: float) -> Speed:
    """Count the tokens, end tokens included, of a timed run."""
    n_tokens = sum(len(c.tokens) + c.ended for c in found)
    return Speed(
        seconds=seconds, n_tokens=n_tokens, n_articles=len(found), first_token_seconds=first
    )


def with_text(found: Continuation, tokenizer: Tokenizer) -> Continuation:
    """Add the decoded text, as it came."""
    return found.model_copy(update={"text": tokenizer.decode(found.tokens)})
