"""What one side produced, in a form that can be saved and compared later."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import ConfigDict, Field, PositiveInt, ValidationError

from porttool.component import explain
from porttool.config import Closed, Dtype
from porttool.errors import UsageError
from porttool.evaluator import Port, missing_side, write_whole

Side = Literal["engine", "reference"]


class Candidate(NamedTuple):
    """A token that a step could have chosen, with its log-probability."""

    token: int
    logprob: float


class Decoding(Closed):
    """How both sides choose tokens: greedy with one beam, beam search with more."""

    max_new_tokens: PositiveInt = 100
    num_beams: PositiveInt = 1
    length_penalty: float = 1.0
    early_stopping: bool = True
    eos: tuple[int, ...] = ()


class Kept(Closed):
    """A record that is read again, numbers that are none included: models overflow, in float16."""

    model_config = ConfigDict(ser_json_inf_nan="constants")


class Continuation(Kept):
    """New tokens of one prompt without the end token; `ended` says that there was one.

    `logprobs` are the chosen tokens'. `candidates` are the reference's best few of every step,
    best first, the step that chose the end token included. `score` is a beam's.
    """

    tokens: tuple[int, ...]
    ended: bool
    logprobs: tuple[float, ...] | None = None
    candidates: tuple[tuple[Candidate, ...], ...] = ()
    score: float | None = None
    text: str = ""


class Speed(Closed):
    """How fast a side was; `first_token_seconds` is of one prompt alone, the median of a few."""

    seconds: float
    n_tokens: int
    n_articles: int
    first_token_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens over all rows."""
        return self.n_tokens / max(self.seconds, 1e-9)

    @property
    def articles_per_second(self) -> float:
        """Finished articles."""
        return self.n_articles / max(self.seconds, 1e-9)


class ArticleRecord(Closed):
    """Which article was used: its id and the SHA-256 of its content."""

    id: str
    sha256: str


class Task(Closed):
    """What both sides must have been given for their results to be compared."""

    articles: tuple[ArticleRecord, ...]
    prompts_sha256: str
    decoding: Decoding

    @classmethod
    def of(
        cls, articles: tuple[ArticleRecord, ...], prompts: list[list[int]], decoding: Decoding
    ) -> Self:
        """Describe a task; the prompts are kept as a hash of their ids."""
        digest = hashlib.sha256(json.dumps(prompts, separators=(",", ":")).encode()).hexdigest()
        return cls(articles=articles, prompts_sha256=digest, decoding=decoding)


class SideResult(Kept):
    """One side's continuations of a task. `model` fingerprints the source or the checkpoint.

    `engine` is the seal of an engine's manifest: one checkpoint gives many engines.
    `source` is a reference's folder as a conversion records it, to be known when it is gone.
    `counterpart` is the other side's model: an engine's, the Hugging Face folder; a reference's,
    what the engine was converted from as its manifest has it, where only the user could say that
    the two are one model. It is None where that is not known.
    `ends` are the ids at which transformers itself would end a reference's texts.
    `rounding` is the reference's own drift in narrower types: 99 % of its tokens'
    log-probabilities move by no more when it is run in them.
    """

    format: Literal["porttool-summaries"] = "porttool-summaries"
    format_version: Literal[1] = 1
    side: Side
    description: str
    model: str
    engine: str | None = None
    source: str | None = None
    counterpart: str | None = None
    ends: tuple[int, ...] = ()
    dtype: Dtype
    task: Task
    speed: Speed
    rounding: dict[Dtype, float] = Field(default_factory=dict)
    continuations: tuple[Continuation, ...]

    def save(self, folder: Path) -> None:
        """Write the result where a later run looks for it."""
        write_whole(result_file(folder, self.side), self.model_dump_json() + "\n")


def result_file(folder: Path, side: Side) -> Path:
    """Return where a side's result is kept."""
    return folder / ("reference.json" if side == "reference" else "engine-summaries.json")


def load_result(folder: Path, side: Side) -> SideResult | None:
    """Read a side's saved result, or None if there is none; UsageError if it is damaged."""
    path = result_file(folder, side)
    if not path.is_file():
        return None
    try:
        return SideResult.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UsageError(f"{path}: not a saved result: {explain(error)}; run it again") from error


def require_same_task(saved: SideResult, task: Task, path: Path) -> None:
    """Refuse a saved result of other articles, other token ids or other decoding."""
    differing = [
        name
        for name, before, now in (
            ("articles", saved.task.articles, task.articles),
            ("token ids of the prompts", saved.task.prompts_sha256, task.prompts_sha256),
            ("decoding", saved.task.decoding, task.decoding),
        )
        if before != now
    ]
    if differing:
        raise UsageError(
            f"{path} was made with different {' and '.join(differing)}; use the same options "
            "(max_input_len among them: its default depends on the engine), run the "
            f"{saved.side} again, or take that file away"
        )
    if len(saved.continuations) != len(task.articles):
        raise UsageError(f"{path} holds {len(saved.continuations)} results of "
                         f"{len(task.articles)} articles; run the {saved.side} again")  # fmt: skip


def require_same_model(saved: SideResult, port: Port, path: Path) -> None:
    """Refuse a reference of another model than the folder named, or than the engine's source.

    A source that is gone is known by the fingerprint that its conversion recorded. One that is no
    Hugging Face folder is the reference's model where the user said so when that was made.
    """
    if port.runner is None:
        return
    record = port.runner.engine.manifest.source
    folder = port.named or Path(record.path)
    ours, theirs = saved.model, model_in(folder) or "no config.json"
    if not folder.exists():
        ours, theirs = saved.source or "none recorded", record.fingerprint
    vouched = port.named is None and saved.counterpart == record.fingerprint
    if ours != theirs and not (vouched and model_in(folder) is None):
        raise UsageError(
            f"{path} was made with another model (fingerprint {ours[:14]}, {folder}: "
            f"{theirs[:14]}); run --test-hf again, or name with --hf-model the folder that "
            "it was made with"
        )


def require_same_engine(saved: SideResult, port: Port, path: Path) -> None:
    """Refuse an engine's result that the reference that is to run does not belong to.

    It must be of the engine that was named, else have been set beside the reference's folder.
    """
    if port.source is None:
        return
    if port.engine is not None:
        kept, ours = saved.engine, port.engine.seal
        unsaid, wrong = "which engine it was", f"another engine ({saved.description})"
    else:
        kept, ours = saved.counterpart, model_in(port.source) or "no config.json"
        unsaid = "of which Hugging Face folder its engine was"
        wrong = (f"an engine of another model (its source: {kept!s:.14}, {port.source}: "
                 f"{ours:.14})")  # fmt: skip
    if kept == ours:
        return
    known = "name the engine that it was made with (ENGINE), " if saved.engine else ""
    raise UsageError(
        f"{path} {f'was made with {wrong}' if kept else f'does not say {unsaid} made'}; {known}"
        "run --test-engine again, or choose another --output"
    )


def model_in(folder: Path) -> str | None:
    """Return the fingerprint of the model in a Hugging Face folder, None if it is no such folder.

    It is the same wherever the folder lies.
    """
    from porttool.evaluators.reference import fingerprint_model

    return fingerprint_model(folder) if (folder / "config.json").is_file() else None


def counterpart_of_reference(port: Port) -> str | None:
    """Return the source of the engine that the user named a reference of, if no file can tell."""
    if port.named is None or port.engine is None:
        return None
    record = port.engine.source
    return None if model_in(Path(record.path)) else record.fingerprint


def counterpart_of_engine(port: Port) -> str | None:
    """Return the model of the folder that an engine is set beside; None if there is none."""
    recorded = port.engine.source.path if port.engine else ""
    return model_in(port.source or port.named or Path(recorded))


def require_sides(port: Port, output: Path, command: str) -> None:
    """Refuse before anything runs what can compare nothing: a kept reference is a side too."""
    if port.runner is None and port.source is None:
        raise UsageError("neither an engine nor a Hugging Face folder was given")
    kept = result_file(output, "reference").is_file()
    if port.compare and port.source is None and not kept:
        raise UsageError(missing_side(port, command))
