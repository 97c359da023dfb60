"""Generations of every kind, one after another in one process, while its memory is watched."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from porttool import api
from porttool.config import Sampling
from porttool.generate import generate

DEMO = Path(__file__).parent.parent / "examples" / "demo" / "gpt2-news"
MAX_INPUT, MAX_NEW, MAX_BATCH = 32, 12, 4
PAGE = os.sysconf("SC_PAGE_SIZE")
PROBE = ([[5, 6, 7, 8]], Sampling(max_new_tokens=8, ignore_eos=True))


@dataclass(frozen=True)
class Sample:
    """The process after so many generations: resident bytes, open files, threads."""

    generation: int
    seconds: float
    rss: int
    files: int
    threads: int


def build_engine(folder: Path, kind: str) -> api.LoadedEngine:
    """Convert, build and load the demo model."""
    checkpoint, engine = folder / "checkpoint", folder / f"engine-{kind}"
    if not checkpoint.exists():
        api.convert(DEMO, checkpoint, model="gpt2")
    api.build(checkpoint, engine, engine=kind, max_batch_size=MAX_BATCH, max_input_len=MAX_INPUT,
              max_output_len=MAX_NEW)  # fmt: skip
    return api.load(engine, options={"threads": 1} if kind == "onnx" else {})


def draw_sampling(rng: Random) -> Sampling:
    """Return one of all ways to choose tokens."""
    new = rng.randint(1, MAX_NEW)
    temperature = rng.uniform(0.3, 1.5)
    kinds: tuple[Callable[[], Sampling], ...] = (
        lambda: Sampling(max_new_tokens=new),
        lambda: Sampling(max_new_tokens=new, ignore_eos=True, logprobs=True, keep_logits=True),
        lambda: Sampling(max_new_tokens=new, min_new_tokens=new // 2, repetition_penalty=1.2,
                         presence_penalty=0.3, bad_words=((5,), (6, 7)), stop=("the", ".")),
        lambda: Sampling(max_new_tokens=new, temperature=temperature, top_k=rng.choice((0, 1, 40)),
                         top_p=rng.uniform(0.5, 1), seed=rng.randrange(1 << 30)),
        lambda: Sampling(max_new_tokens=new, temperature=temperature, min_p=0.05, logprobs=True,
                         num_return_sequences=rng.randint(1, 4)),
        lambda: Sampling(max_new_tokens=new, num_beams=(beams := rng.randint(2, 4)),
                         num_return_sequences=rng.randint(1, beams), length_penalty=0.8,
                         early_stopping=rng.random() < 0.5),
    )  # fmt: skip
    return rng.choice(kinds)()


def generate_one(loaded: api.LoadedEngine, rng: Random) -> int:
    """Do one generation with drawn prompts and settings; return how many tokens it gave."""
    sampling = draw_sampling(rng)
    vocabulary = loaded.runner.config.vocab_size
    prompts = [
        [rng.randrange(vocabulary) for _ in range(rng.randint(1, MAX_INPUT))]
        for _ in range(rng.randint(1, MAX_BATCH + 2))
    ]
    streamed: list[int] = []
    on_token = (lambda _, token: streamed.append(token)) if rng.random() < 0.5 else None
    eos = loaded.engine.manifest.tokens.eos
    found = generate(loaded.runner, prompts, sampling, eos=eos, tokenizer=loaded.tokenizer,
                     on_token=on_token)  # fmt: skip
    n_tokens = sum(len(c.tokens) for completions in found for c in completions)
    if on_token and sampling.num_beams == 1:
        assert len(streamed) >= n_tokens
    return n_tokens


def probe(loaded: api.LoadedEngine) -> tuple[int, ...]:
    """Return what the engine says to a prompt that is always the same."""
    prompts, sampling = PROBE
    return generate(loaded.runner, prompts, sampling, eos=())[0][0].tokens


def soak(
    loaded: api.LoadedEngine, n_generations: int, *, seed: int, every: int
) -> Iterator[Sample]:
    """Generate, yielding a sample now and then; the answer to the probe must stay the same."""
    rng = Random(seed)
    expected = probe(loaded)
    began = time.monotonic()
    for number in range(1, n_generations + 1):
        generate_one(loaded, rng)
        if number % every == 0:
            assert probe(loaded) == expected, f"another answer after {number} generations"
            yield take_sample(number, time.monotonic() - began)


def take_sample(generation: int, seconds: float) -> Sample:
    """Look at this process; what Python alone still holds in cycles is let go first."""
    gc.collect()
    return Sample(
        generation,
        round(seconds, 2),
        int(Path("/proc/self/statm").read_text().split()[1]) * PAGE,
        len(list(Path("/proc/self/fd").iterdir())),
        len(list(Path("/proc/self/task").iterdir())),
    )


def growth(samples: list[Sample]) -> float:
    """Bytes of resident memory a generation, by least squares."""
    fitted = statistics.linear_regression(
        [float(s.generation) for s in samples], [float(s.rss) for s in samples]
    )
    return fitted.slope
