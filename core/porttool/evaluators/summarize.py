"""Summarise the same articles with the engine and with Hugging Face, and compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porttool.config import HALF
from porttool.errors import UsageError, require_extra
from porttool.evaluator import REPORT, Evaluator, Port, Report, Verdict, evaluate, telling
from porttool.evaluators.assignment import Assignment, SummarizeOptions, assign
from porttool.evaluators.results import (
    Side,
    SideResult,
    Task,
    counterpart_of_engine,
    counterpart_of_reference,
    load_result,
    require_same_engine,
    require_same_model,
    require_same_task,
    require_sides,
    result_file,
)
from porttool.evaluators.unfinished import unfinished_file
from porttool.progress import SILENT, Progress

if TYPE_CHECKING:
    from porttool.converter import Converter
    from porttool.evaluators.comparison import Bounds, Comparison
    from porttool.runner import Runner
    from porttool.text import Tokenizer

PINS = "articles.txt"

UNSEEN = (
    "what half precision hides was not computed in float32: for that the engine has to run, "
    "greedily, beside a float32 reference and what it was converted from"
)
"""What is said where a half-precision engine's arithmetic is not compared in float32."""


def summarize(
    *,
    output: Path,
    runner: Runner | None = None,
    tokenizer: Tokenizer | None = None,
    source: Path | None = None,
    converter: Converter | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> Report:
    """Summarise with the engine, with the source in Hugging Face, or with both.

    A side that is not given is taken from what an earlier run left in `output`. The folder gets
    report.json, report.html, report.png, each side's results and the list of articles.
    """
    port = Port(runner, tokenizer, source, converter)
    return evaluate(SummarizeEvaluator(options), port, output, progress=progress)


class SummarizeEvaluator(Evaluator):
    """ROUGE, token agreement and log-probabilities on articles with human summaries."""

    name = "summarize"
    Options = SummarizeOptions
    options: SummarizeOptions

    def run(self, port: Port, output: Path, *, progress: Progress = SILENT) -> Report:
        """Run the sides that are there, take the other from `output`, and report."""
        from porttool.evaluators.comparison import compare_sides, judge, measurements_of, tables_of
        from porttool.evaluators.dataset import write_pins
        from porttool.evaluators.page import read_parity, write_page
        from porttool.evaluators.transformers_folder import require_same_shape

        options = self.options
        require_extra("eval", "matplotlib", "rouge_score")
        require_sides(port, output, self.name)
        if port.runner is not None and port.source is not None:
            require_same_shape(port.source, port.runner.config)
        place = options.parity_report or output.parent / "parity" / REPORT
        parity = read_parity(place, named=options.parity_report is not None)
        work = assign(options, port)
        notes = [*plan_notes(options, port, work)]
        for note in notes:
            progress.note(note)
        engine, reference = run_sides(options, port, work, output, progress)
        write_pins(output / PINS, work.articles)
        comparison = compare_sides(work.articles, engine, reference, bounds_of(options))
        notes += outcome_notes(comparison, output)
        wide = [*judge_wide(port, work, reference, output, progress)]
        if engine and reference and engine.dtype in HALF and not wide:
            notes.append(UNSEEN)
        if parity and (engine is None or parity.measurements.get("engine") != engine.engine):
            notes += [f"{place} is not of this engine, and not shown"] if engine else []
            parity = None
        if parity and not parity.passed:
            failed = ", ".join(v.name for v in parity.failed)
            notes.append(f"verify says no to this engine, whatever stands here: {failed} ({place})")
        report = Report(
            evaluator=self.name,
            engine=engine.description if engine else "not run",
            reference=reference.description if reference else "not run",
            verdicts=(*judge(comparison), *wide, *judge_tokenizer(port, comparison)),
            tables=tables_of(comparison),
            notes=tuple(notes),
            measurements={
                "options": options.model_dump(mode="json"),
                "models": {s.side: s.model for s in (engine, reference) if s},
                "engine": engine.engine if engine else None,
                **measurements_of(comparison),
            },
        )
        with telling(report, progress):
            write_page(output, report, comparison, n_examples=options.n_examples, parity=parity)
        return report


def judge_wide(
    port: Port, work: Assignment, reference: SideResult | None, output: Path, progress: Progress
) -> Iterator[Verdict]:
    """Yield what a half-precision engine hides, if the source is there to compute it in float32."""
    from porttool.evaluators.accounting import derived
    from porttool.evaluators.arithmetic import judge_chosen, shapes_of

    where = port.origin or port.source
    if port.runner is None or reference is None or where is None:
        return
    half = port.runner.engine.manifest.dtype in HALF
    if not half or reference.dtype != "float32" or work.task.decoding.num_beams > 1:
        return
    config = port.runner.config
    with derived(port.converter, where, output, progress) as derivation:
        if derivation is not None and shapes_of(config) == derivation.shapes:
            yield judge_chosen(derivation, config, work.prompts, reference.continuations)


def judge_tokenizer(port: Port, comparison: Comparison) -> Iterator[Verdict]:
    """Yield whether the tokenizer, which both sides are given, is that of the engine's source.

    Of one that transformers cannot run, or that is gone, nothing is yielded.
    """
    from porttool.evaluators.vocabulary import SAMPLES, compare_tokenizers

    if not comparison.both or port.runner is None or port.tokenizer is None:
        return
    source = Path(port.runner.engine.manifest.source.path)
    if (source / "config.json").is_file():
        size = port.runner.config.vocab_size
        found = compare_tokenizers(port.tokenizer, source, SAMPLES, size)
        if not isinstance(found, str):
            yield found


def bounds_of(options: SummarizeOptions) -> Bounds:
    """Return what the verdicts are held to."""
    from porttool.evaluators.comparison import Bounds

    return Bounds(
        margin=options.margin,
        min_agreement=options.min_agreement,
        max_drift=options.max_drift,
        rouge1_threshold=options.rouge1_threshold,
        resamples=options.resamples,
        confidence=options.confidence,
        seed=options.seed,
    )


def plan_notes(options: SummarizeOptions, port: Port, work: Assignment) -> list[str]:
    """Say before the run what is compared and what the run can show."""
    from porttool.evaluators.agreement import TOLERANCES
    from porttool.evaluators.comparison import power_note

    lengths = sorted(map(len, work.prompts))
    dtype = port.runner.engine.manifest.dtype if port.runner else "float32"
    margin = options.margin or TOLERANCES[dtype].margin
    return [
        f"{len(work.articles)} articles of {options.dataset}, prompts of {lengths[0]} to "
        f"{lengths[-1]} tokens, median {lengths[len(lengths) // 2]}",
        power_note(len(work.articles), options.assumed_sd, margin, options.confidence, "assumed"),
    ]


def outcome_notes(comparison: Comparison, output: Path) -> list[str]:
    """Say after the run what was measured, and what is still to do."""
    from porttool.evaluators.comparison import power_note

    notes = []
    for side in comparison.sides:
        if empty := sum(not c.text.strip() for c in side.continuations):
            notes.append(f"{side.side}: {empty} of {len(comparison.articles)} summaries are empty")
    if comparison.both:
        found = comparison.estimate(comparison.differences("rouge1"))
        margin, level = comparison.tolerance.margin, comparison.bounds.confidence
        notes.append(power_note(found.n, found.sd, margin, level, "measured"))
    else:
        done, missing = ("engine", "reference") if comparison.engine else ("reference", "engine")
        notes.append(f"the {done}'s results are kept in {output}; run the {missing} with the "
                     "same options and output to compare")  # fmt: skip
    return notes


def run_sides(
    options: SummarizeOptions, port: Port, work: Assignment, output: Path, progress: Progress
) -> tuple[SideResult | None, SideResult | None]:
    """Return engine and reference, each run now or else as saved; saved ones are checked first."""
    engine = None if port.runner else saved_engine(port, work.task, output)
    reference = None
    if port.source is None:
        reference = saved_reference(options, port, work.task, output, progress)
    else:
        made = make_reference(options, port, port.source, work, output, progress)
        reference = made.model_copy(update={"counterpart": counterpart_of_reference(port)})
        reference.save(output)
        unfinished_file(output).unlink(missing_ok=True)
    if port.runner is not None:
        from porttool.evaluators.sides import run_engine

        try:
            done = run_engine(
                port.runner, work.tokenizer, work.prompts, work.task, progress=progress
            )
        except KeyboardInterrupt as stop:
            if reference is not None:
                kept = result_file(output, "reference")
                stop.add_note(f"{kept} is complete: the same command with --test-engine goes on")
            raise
        engine = done.model_copy(update={"counterpart": counterpart_of_engine(port)})
        engine.save(output)
    return engine, reference


def saved_engine(port: Port, task: Task, output: Path) -> SideResult | None:
    """Return the engine's kept result, which has to belong to the reference that runs."""
    saved = saved_side(output, "engine", task)
    if saved is not None:
        require_same_engine(saved, port, result_file(output, "engine"))
    return saved


def saved_reference(
    options: SummarizeOptions, port: Port, task: Task, output: Path, progress: Progress
) -> SideResult | None:
    """Return the reference's kept result, which has to be of the engine's model."""
    saved, kept = saved_side(output, "reference", task), result_file(output, "reference")
    if saved is None:
        return None
    require_same_model(saved, port, kept)
    if port.compare and port.engine:
        there = Path(port.engine.source.path).exists()
        why = "is no Hugging Face folder" if there else "is gone"
        progress.note(f"what the engine was converted from {why}: {kept} is compared")
    if options.reference_dtype not in (None, saved.dtype):
        raise UsageError(
            f"{kept} was made in {saved.dtype}, not {options.reference_dtype}; leave "
            "reference_dtype out, or run the reference again"
        )
    return saved


def saved_side(output: Path, side: Side, task: Task) -> SideResult | None:
    """Return a saved result of the same task, or None if nothing was saved."""
    saved = load_result(output, side)
    if saved is not None:
        require_same_task(saved, task, result_file(output, side))
    return saved


def make_reference(
    options: SummarizeOptions, port: Port, source: Path, work: Assignment, output: Path,
    progress: Progress,
) -> SideResult:  # fmt: skip
    """Load the source in Hugging Face, run it, and let it go again.

    Then its own rounding is measured: in the engine's type if it is half precision, or, for
    engines yet to come, in both such types.
    """
    from porttool.evaluators.reference import ReferenceModel
    from porttool.evaluators.sides import begin_reference, measure_rounding, run_reference

    device, dtype = options.reference_device, options.reference_dtype or "float32"
    model = ReferenceModel(source, dtype=dtype, device=device)
    done = begin_reference(model, work.task, batch_size=options.batch_size, output=output)
    with done.told_when_stopped():
        found = run_reference(model, work.tokenizer, work.prompts, done, progress=progress)
        del model
        if dtype != "float32" or not options.yardstick or options.num_beams > 1:
            return found
        engine = port.runner.engine.manifest.dtype if port.runner else None
        halves = [half for half in HALF if engine in (None, half)]
        rounding = {h: measure_rounding(source, device, work.prompts, found, h) for h in halves}
    return found.model_copy(update={"rounding": rounding})
