"""What both sides of a summarisation are given: options, articles, token ids, end tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from porttool.component import Options
from porttool.config import (
    BEAM_OPTIONS,
    Dtype,
    LengthPenalty,
    Limits,
    PromptTemplate,
    refuse_idle,
)
from porttool.device import Device
from porttool.errors import UsageError
from porttool.evaluator import Port
from porttool.evaluators.results import Decoding, Task
from porttool.text import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from porttool.evaluators.dataset import Article, DatasetRequest

ANCESTOR_INPUT_LEN = 923
"""Prompt tokens that the ancestor's recipe keeps: with 100 new ones they fit 1024 positions."""


Points = Annotated[float, Field(ge=1e-3, le=100)]
"""A difference of scores in percent; of a smaller one no number of articles could say anything."""

Resamples = Annotated[int, Field(ge=100, le=1_000_000)]
"""With fewer a confidence interval need not hold the mean that it is of."""


class SummarizeOptions(Options):
    """What is summarised, how, and what the outcome is held to.

    Bounds that are None follow from the types of the two sides; see docs/validation.md. The
    reference runs in float32 unless `reference_dtype` says otherwise; with `yardstick` it also
    measures what it is off by itself in a half-precision engine's type.
    """

    dataset: str = "abisee/cnn_dailymail"
    dataset_config: str = "3.0.0"
    revision: str | None = None
    split: str = "test"
    id_column: str = "id"
    article_column: str = "article"
    highlights_column: str = "highlights"
    article_ids: Path | None = None
    max_articles: PositiveInt = 200
    shuffle_seed: NonNegativeInt | None = None

    prompt: Literal["auto", "suffix", "instruction"] = "auto"
    suffix: str = " TL;DR: "
    instruction: str = "Summarize the following news article in three sentences."
    max_input_len: PositiveInt | None = None
    max_new_tokens: PositiveInt = 100
    num_beams: PositiveInt = 1
    length_penalty: LengthPenalty = 1.0
    early_stopping: bool = True
    batch_size: PositiveInt = 8

    reference_dtype: Dtype | None = None
    reference_device: Device = "auto"
    yardstick: bool = True

    margin: Points | None = None
    assumed_sd: Points = 2.0
    min_agreement: float | None = Field(default=None, gt=0, le=1)
    max_drift: PositiveFloat | None = None
    rouge1_threshold: float | None = None
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    resamples: Resamples = 10_000
    seed: NonNegativeInt = 0

    n_examples: int = Field(default=4, ge=0)
    parity_report: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_beams == 1:
            refuse_idle(self, BEAM_OPTIONS, "set num_beams above 1")
        if self.article_ids is not None and self.shuffle_seed is not None:
            raise ValueError("article_ids are taken in their order; leave shuffle_seed out")
        return self


@dataclass(frozen=True)
class Assignment:
    """The work itself: articles, their token ids, and the task that saved results must match."""

    articles: list[Article]
    prompts: list[list[int]]
    task: Task
    tokenizer: Tokenizer


def assign(options: SummarizeOptions, port: Port) -> Assignment:
    """Load the articles and encode their prompts."""
    from porttool.evaluators.dataset import load_articles
    from porttool.evaluators.prompts import Recipe, encode_articles

    require_fit(options, port)
    tokenizer = tokenizer_of(port)
    articles = load_articles(request_of(options))
    recipe = Recipe(
        options.suffix, options.instruction, template_of(options, port), input_len(options, port)
    )
    prompts = encode_articles(articles, tokenizer, recipe)
    decoding = Decoding(
        max_new_tokens=options.max_new_tokens,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        early_stopping=options.early_stopping,
        eos=end_tokens(port),
    )
    task = Task.of(tuple(a.record for a in articles), prompts, decoding)
    return Assignment(articles, prompts, task, tokenizer)


def tokenizer_of(port: Port) -> Tokenizer:
    """Return the tokenizer that the prompts of both sides are encoded with."""
    found = port.tokenizer or (load_tokenizer(port.source) if port.source else None)
    if found is None:
        raise UsageError("the engine has no tokenizer; name a folder with --tokenizer")
    return found


def request_of(options: SummarizeOptions) -> DatasetRequest:
    """Say which articles are wanted."""
    from porttool.evaluators.dataset import DatasetRequest

    return DatasetRequest(
        name=options.dataset,
        config=options.dataset_config,
        revision=options.revision,
        split=options.split,
        columns=(options.id_column, options.article_column, options.highlights_column),
        max_articles=options.max_articles,
        seed=options.shuffle_seed,
        ids=options.article_ids,
    )


def template_of(options: SummarizeOptions, port: Port) -> PromptTemplate | None:
    """Return the model's instruction template if it is to be used."""
    found = port.converter.prompt if port.converter else None
    if port.engine is not None:
        found = port.engine.prompt
    if options.prompt == "instruction" and found is None:
        raise UsageError("this model has no instruction template; use the prompt 'suffix'")
    template = None if options.prompt == "suffix" else found
    used, idle = ("instruction", "suffix") if template else ("suffix", "instruction")
    if getattr(options, idle) != SummarizeOptions.model_fields[idle].default:
        raise UsageError(f"{idle} would change nothing: articles are put to this model with the "
                         f"prompt {used!r}")  # fmt: skip
    return template


def require_fit(options: SummarizeOptions, port: Port) -> None:
    """Refuse what the engine does not hold or the model has no positions for, before any run."""
    if beyond := list(beyond_limits(options, engine_limits(port))):
        raise UsageError("; ".join(beyond))
    wanted = options.max_input_len
    positions = positions_of(port, firm=wanted is not None)
    if positions is not None and (wanted or 1) + options.max_new_tokens > positions:
        asked = f"--max-input-len {wanted} plus " if wanted else ""
        raise UsageError(
            f"{asked}--max-new-tokens {options.max_new_tokens} is too much: the model has "
            f"{positions} positions for a prompt and its new tokens; give less"
        )


def beyond_limits(options: SummarizeOptions, limits: Limits | None) -> Iterator[str]:
    """Yield what an engine does not hold, and what can be done about it."""
    if limits is None:
        return
    beams = min(limits.max_beam_width, limits.max_batch_size)
    for flag, wanted, most, cure in (
        ("--max-input-len", options.max_input_len, limits.max_input_len, "--max-input-len"),
        ("--max-new-tokens", options.max_new_tokens, limits.max_output_len, "--max-output-len"),
        ("--num-beams", options.num_beams, beams, "--max-beam-width and --max-batch-size"),
    ):
        if wanted is not None and wanted > most:
            yield (
                f"{flag} is {wanted}, the engine holds {most}: give {most} or less, or build the "
                f"engine with {cure} {wanted}"
            )


def engine_limits(port: Port) -> Limits | None:
    """Return the engine's limits, also where it does not run itself."""
    return port.engine.limits if port.engine is not None else None


def positions_of(port: Port, *, firm: bool = False) -> int | None:
    """Return the model's positions, by the engine or else by the source's config.

    `firm` are learned ones alone, beyond which nothing can run; rotary ones go on.
    """
    from porttool.huggingface import read_config

    if port.engine is not None:
        config = port.engine.config
        return None if firm and config.position != "learned" else config.n_positions
    if port.source is None:
        return None
    values = read_config(port.source)
    positions = values.get("n_positions", None if firm else values.get("max_position_embeddings"))
    return positions if isinstance(positions, int) else None


def input_len(options: SummarizeOptions, port: Port) -> int:
    """Return how many prompt ids are kept: as asked, or the ancestor's number within limits."""
    if options.max_input_len is not None:
        return options.max_input_len
    limits, positions = engine_limits(port), positions_of(port)
    most = [ANCESTOR_INPUT_LEN]
    most += [limits.max_input_len] if limits is not None else []
    most += [positions - options.max_new_tokens] if positions is not None else []
    return min(most)


def end_tokens(port: Port) -> tuple[int, ...]:
    """Return the ids that end a text: the engine's, or else the source's."""
    from porttool.huggingface import check_special_ids, read_config, special_ids

    if port.engine is not None:
        return port.engine.tokens.eos
    source = port.source or Path()
    if port.converter is not None:
        return port.converter.open(port.origin or source).tokens.eos
    vocab_size = int(read_config(source)["vocab_size"])
    return check_special_ids(special_ids(source), vocab_size, source).eos
