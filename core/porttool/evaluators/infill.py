"""Fill in and complete programs with the engine and with Hugging Face, and compare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from porttool.component import Options
from porttool.config import Dtype, InfillTokens
from porttool.device import Device
from porttool.errors import require_extra
from porttool.evaluator import Evaluator, Port, Report, Table, Verdict
from porttool.evaluators.assignment import (
    Assignment,
    Points,
    Resamples,
    SummarizeOptions,
    end_tokens,
    input_len,
    require_fit,
    tokenizer_of,
)
from porttool.evaluators.programs import (
    MEASURES,
    Kind,
    Problem,
    answer_of,
    encode_problems,
    load_problems,
)
from porttool.evaluators.results import Decoding, SideResult, Task, require_sides
from porttool.evaluators.summarize import bounds_of, run_sides
from porttool.progress import SILENT, Progress

if TYPE_CHECKING:
    from porttool.evaluators.comparison import Comparison, Scores


class InfillOptions(Options):
    """Which problems, of a local file, and what the outcome is held to.

    `kind` is `infill`, a gap in a program, or `completion`, a function's body. Bounds that are
    None follow from the types of the two sides; see docs/validation.md.
    """

    dataset: Path
    kind: Kind = "infill"
    max_problems: PositiveInt = 200
    max_new_tokens: PositiveInt = 64
    batch_size: PositiveInt = 8
    reference_dtype: Dtype | None = None
    reference_device: Device = "auto"
    margin: Points | None = None
    min_agreement: float | None = Field(default=None, gt=0, le=1)
    max_drift: PositiveFloat | None = None
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    resamples: Resamples = 10_000
    seed: NonNegativeInt = 0

    @property
    def as_summaries(self) -> SummarizeOptions:
        """The same as `summarize` would be told: the sides run alike."""
        shared = self.model_dump(exclude={"dataset", "kind", "max_problems"})
        return SummarizeOptions.model_validate(shared)


class InfillEvaluator(Evaluator):
    """Exact match, edit similarity and ROUGE of programs filled in or completed."""

    name = "infill"
    Options = InfillOptions
    options: InfillOptions

    def run(self, port: Port, output: Path, *, progress: Progress = SILENT) -> Report:
        """Run the sides that are there, take the other from `output`, and report."""
        from porttool.evaluators.comparison import (
            compare_sides,
            judge,
            judge_rouge,
            measurements_of,
            tables_of,
        )

        options = self.options
        require_extra("eval", "rouge_score")
        require_sides(port, output, self.name)
        problems = load_problems(options.dataset, options.kind, options.max_problems)
        work = assign(options, port, problems)
        sides = run_sides(options.as_summaries, port, work, output, progress)
        engine, reference = (trimmed(side, options.kind) for side in sides)
        plain = compare_sides(work.articles, engine, reference, bounds_of(options.as_summaries))
        found = with_measures(plain, problems)
        verdicts: list[Verdict] = []
        if found.both:
            verdicts = [judge_rouge(found, name) for name in MEASURES]
        return Report(
            evaluator=self.name,
            engine=engine.description if engine else "not run",
            reference=reference.description if reference else "not run",
            verdicts=(*verdicts, *judge(found)),
            tables=(measure_table(found, options.kind), *tables_of(found)),
            measurements={
                "options": options.model_dump(mode="json"),
                "models": {s.side: s.model for s in (engine, reference) if s},
                **measurements_of(found),
            },
        )


def assign(options: InfillOptions, port: Port, problems: list[Problem]) -> Assignment:
    """Encode the prompts, the same for both sides."""
    tokenizer = tokenizer_of(port)
    require_fit(options.as_summaries, port)
    longest = input_len(options.as_summaries.model_copy(update={"max_input_len": None}), port)
    if port.engine is not None:
        longest = port.engine.limits.max_input_len
    tokens = infill_tokens(port)
    prompts = encode_problems(problems, tokenizer, options.kind, tokens, longest)
    articles = [problem.article for problem in problems]
    decoding = Decoding(max_new_tokens=options.max_new_tokens, eos=end_tokens(port))
    task = Task.of(tuple(a.record for a in articles), prompts, decoding)
    return Assignment(articles, prompts, task, tokenizer)


def infill_tokens(port: Port) -> InfillTokens | None:
    """Return the tokens that the engine was built with, or else the source's."""
    if port.engine is not None:
        return port.engine.infill
    if port.converter is not None and port.source is not None:
        return port.converter.open(port.source).infill
    return None


def trimmed(side: SideResult | None, kind: Kind) -> SideResult | None:
    """Return a side's result with every continuation cut to its answer."""
    if side is None:
        return None
    cut = tuple(
        c.model_copy(update={"text": answer_of(c.text, kind)}) for c in side.continuations
    )  # fmt: skip
    return side.model_copy(update={"continuations": cut})


def with_measures(comparison: Comparison, problems: list[Problem]) -> Comparison:
    """Return the comparison of problems, with exact match and edit similarity beside ROUGE."""

    def measured(side: SideResult | None, rouge: Scores) -> Scores:
        if side is None:
            return rouge
        pairs = list(zip(side.continuations, problems, strict=True))
        more = {m: [score(c.text, p.wanted) for c, p in pairs] for m, score in MEASURES.items()}
        return rouge | more

    return replace(
        comparison,
        engine_scores=measured(comparison.engine, comparison.engine_scores),
        reference_scores=measured(comparison.reference, comparison.reference_scores),
        unit="problems",
    )


def measure_table(comparison: Comparison, kind: Kind) -> Table:
    """Return each measure's mean on both sides."""
    rows = tuple((name, *comparison.means(name)) for name in MEASURES)
    title = f"{kind}, {len(comparison.articles)} problems"
    return Table(title=title, columns=("", "engine", "Hugging Face"), rows=rows)
