"""Is it still the same model? The ladder from config and weights to logits and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

from porttool.component import Options
from porttool.config import HALF
from porttool.device import Device
from porttool.errors import UsageError
from porttool.evaluator import Evaluator, Port, Report, Verdict, evaluate, missing_side
from porttool.progress import SILENT, Progress

if TYPE_CHECKING:
    from porttool.config import Dtype
    from porttool.converter import Converter
    from porttool.evaluators.accounting import Derivation
    from porttool.evaluators.probe import Probe
    from porttool.evaluators.virtual import VirtualTokens
    from porttool.runner import Runner
    from porttool.text import Tokenizer


class ParityOptions(Options):
    """What the engine is fed.

    `n_prompts` random prompts of up to `prompt_len` tokens, or the texts given, then `new_tokens`
    more; with `long_contexts` also prompts up to the longest that the engine takes. `yardstick`
    also runs Hugging Face in a half-precision engine's own type, whose error is what the engine's
    is held to; without it fixed bounds hold. `diagnose` looks for the place and the cause of a
    failure.
    """

    texts: tuple[str, ...] = ()
    n_prompts: PositiveInt = 6
    prompt_len: PositiveInt = 48
    new_tokens: PositiveInt = 16
    seed: int = 0
    reference_device: Device = "auto"
    yardstick: bool = True
    long_contexts: bool = True
    diagnose: bool = True


def verify(
    *,
    runner: Runner,
    source: Path,
    output: Path,
    converter: Converter | None = None,
    origin: Path | None = None,
    tokenizer: Tokenizer | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> Report:
    """Hold an engine against its source: config, weights, logits in prefill and decode, tokens.

    Without a converter that reads the source, or the `origin` that was converted in its place,
    config and weights are left out, and a note says so.
    On failure the report's notes say where the two first part and what the likely cause is.
    """
    port = Port(runner, tokenizer, source, converter, origin)
    return evaluate(ParityEvaluator(options), port, output, progress=progress)


@dataclass
class Findings:
    """What the rungs have found so far."""

    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    measurements: dict[str, Any] = field(default_factory=dict)

    def failed(self, *names: str) -> bool:
        """Return true if any of the named rungs did not pass."""
        return any(v.passed is not True for v in self.verdicts if v.name in names)


class ParityEvaluator(Evaluator):
    """Config, tokenizer, weights, logits and greedy tokens, and where and why they part."""

    name = "parity"
    Options = ParityOptions
    options: ParityOptions

    def run(self, port: Port, output: Path, *, progress: Progress = SILENT) -> Report:
        """Climb the ladder; both sides and the source's converter are needed."""
        from porttool.evaluators.accounting import derived
        from porttool.evaluators.diagnosis import diagnose
        from porttool.evaluators.probe import Probe
        from porttool.evaluators.transformers_folder import require_same_shape

        options = self.options
        if port.runner is None or port.source is None:
            raise UsageError(missing_side(port, "verify"))
        require_same_shape(port.source, port.runner.config)
        findings = Findings()
        with derived(port.converter, port.origin or port.source, output, progress) as derivation:
            climb_tokenizer(port, options, findings)
            if derivation is None:
                findings.notes.append(
                    "no installed family reads the Hugging Face folder: logits and tokens are "
                    "compared, config and weights are not"
                )
            else:
                climb_config(port, port.source, derivation, findings)
                climb_weights(port.runner, derivation, findings, progress)
            virtual = climb_table(port, port.runner, findings)
            probe = Probe.make(port.runner, port.tokenizer, port.source, options, virtual, progress)
            climb_logits(probe, findings, progress)
            climb_reach(probe, options, findings, progress)
            climb_tokens(probe, findings)
            if derivation is not None:
                climb_arithmetic(probe, derivation, findings)
            if options.diagnose and not all(v.passed for v in findings.verdicts):
                diagnose(probe, derivation, findings, named=port.origin is None)
            for note in findings.notes:
                progress.note(note)
            return Report(
                evaluator=self.name,
                engine=port.runner.description,
                reference=probe.description,
                verdicts=tuple(findings.verdicts),
                notes=tuple(findings.notes),
                measurements={
                    "options": options.model_dump(mode="json"),
                    "engine": port.runner.engine.manifest.seal,
                    **findings.measurements,
                },
            )


def climb_tokenizer(port: Port, options: ParityOptions, findings: Findings) -> None:
    """Compare token ids of texts with transformers' own tokenizer, where there is one."""
    from porttool.evaluators.vocabulary import SAMPLES, compare_tokenizers

    if port.tokenizer is None or port.source is None or port.engine is None:
        findings.notes.append("the engine has no tokenizer: prompts are random token ids")
        return
    texts, size = (*options.texts, *SAMPLES), port.engine.config.vocab_size
    found = compare_tokenizers(port.tokenizer, port.source, texts, size)
    if isinstance(found, str):
        findings.notes.append(f"token ids of texts are not compared: {found:.400}")
        return
    findings.verdicts.append(found)


def climb_config(port: Port, source: Path, derivation: Derivation, findings: Findings) -> None:
    """Compare shape, arithmetic and end tokens with the source's, and these with transformers'.

    A folder that was not converted itself may end texts as it likes: that is said, not judged.
    """
    from porttool.evaluators.accounting import judge_config
    from porttool.evaluators.transformers_folder import end_ids
    from porttool.evaluators.vocabulary import judge_ends

    if port.engine is None:
        return
    findings.verdicts.append(judge_config(port.engine, derivation))
    theirs = end_ids(source)
    verdict = judge_ends(port.engine.tokens.eos, theirs)
    if port.origin is None and theirs:
        findings.verdicts.append(verdict)
    elif theirs and not verdict.passed:
        findings.notes.append(f"{source} ends texts at the ids {verdict.bound}, the engine, as "
                              f"its own source says, at {verdict.found}")  # fmt: skip


def climb_weights(
    runner: Runner, derivation: Derivation, findings: Findings, progress: Progress
) -> None:
    """Account for every weight, if the engine's files can be read as canonical tensors."""
    from porttool.evaluators.accounting import check_weights

    check = check_weights(runner.engine, derivation, progress=progress)
    if check is None:
        findings.notes.append(
            f"weights are not compared one by one: a {runner.engine.manifest.kind} engine keeps "
            "them in a form of its own; its logits are"
        )
        return
    findings.verdicts.append(check.verdict)
    findings.measurements["differing_weights"] = dict(check.differing)


def climb_table(port: Port, runner: Runner, findings: Findings) -> VirtualTokens | None:
    """Compare a prompt table with its source, and load it into the engine."""
    from porttool.evaluators.virtual import VirtualTokens

    if port.prompt_table is None or port.taught is None:
        return None
    port.prompt_table.check(runner.config)
    virtual = VirtualTokens(port.prompt_table, port.taught, runner.config.vocab_size)
    findings.verdicts.append(virtual.judge())
    runner.load_prompt_table(port.prompt_table.tensor())
    return virtual


def climb_logits(probe: Probe, findings: Findings, progress: Progress) -> None:
    """Compare teacher-forced logits in prefill, in decode, and with several tokens a step."""
    from porttool.evaluators.logits import judge_logits, measure

    progress.start("logits", 3, unit="passes")
    dtype: Dtype = probe.runner.engine.manifest.dtype
    for name, run, part in (
        ("prefill", probe.prefill, probe.of_prompts),
        ("decode", lambda: probe.decode(1), probe.of_continuations),
        ("decode, several tokens a step", lambda: probe.decode(3), probe.of_continuations),
    ):
        ours = run()
        error = measure(ours, part(probe.logits))
        yardstick = measure(part(probe.own), part(probe.logits)) if probe.own else None
        findings.verdicts.append(judge_logits(name, error, dtype, yardstick))
        findings.measurements[name] = asdict(error)
        if yardstick is not None:
            findings.measurements[f"{name}, Hugging Face in {dtype}"] = asdict(yardstick)
        progress.advance(1)
    progress.finish()


def climb_reach(
    probe: Probe, options: ParityOptions, findings: Findings, progress: Progress
) -> None:
    """Compare logits as far on as the engine goes; say where they part if only that is wrong."""
    if probe.reach is None:
        if not options.long_contexts:
            findings.notes.append("long contexts are not compared: long_contexts is false")
        return
    verdict, error, where = probe.reach.judge(probe.runner, progress)
    findings.measurements[verdict.name] = asdict(error)
    if where and not findings.failed("prefill", "decode", "decode, several tokens a step"):
        findings.notes.append(where)
    findings.verdicts.append(verdict)


def climb_tokens(probe: Probe, findings: Findings) -> None:
    """Compare greedy continuations, with an eye for ties."""
    from porttool.evaluators.agreement import compare_continuations, tolerance_for

    tolerance = tolerance_for(probe.runner.engine.manifest.dtype)
    found = [
        compare_continuations(ours, theirs, (), tolerance)
        for ours, theirs in zip(probe.generate(), probe.continuations, strict=True)
    ]
    real = [(i, a) for i, a in enumerate(found) if a.outcome == "different"]
    ties = sum(a.outcome == "tie" for a in found)
    parts = [f"{ties} part at a tie"] if ties else []
    parts += [f"prompt {i} from token {a.position}, gap {a.gap:.2g}" for i, a in real[:3]]
    findings.verdicts.append(
        Verdict(
            name="greedy tokens",
            passed=not real,
            found=f"{len(found) - len(real)} of {len(found)} prompts",
            bound=f"all, tie ≤ {tolerance.gap:g}",
            detail="; ".join(parts),
        )
    )


def climb_arithmetic(probe: Probe, derivation: Derivation, findings: Findings) -> None:
    """Compute in float32 what a half-precision engine's config says; a wider engine did so."""
    from porttool.evaluators.arithmetic import check_arithmetic, shapes_of

    if probe.runner.engine.manifest.dtype not in HALF:
        return
    if shapes_of(derivation.config) != derivation.shapes:
        findings.notes.append("the family has a decoder of its own: nothing is computed in float32")
        return
    verdict, error = check_arithmetic(probe, derivation)
    findings.verdicts.append(verdict)
    if error is not None:
        findings.measurements[verdict.name] = asdict(error)
    if probe.runner.engine.manifest.dtype == "float16" and not findings.failed("prefill"):
        climb_hidden(probe, derivation, findings)


def climb_hidden(probe: Probe, derivation: Derivation, findings: Findings) -> None:
    """Look for small mistakes of a float16 engine's own; bfloat16's rounding hides them."""
    from porttool.evaluators.arithmetic import check_hidden

    found = check_hidden(probe, derivation)
    if found is None:
        findings.notes.append("another form of GELU, or another epsilon, in the engine's own "
                              "arithmetic would be too small to be told from rounding")  # fmt: skip
        return
    verdict, mistakes = found
    findings.verdicts.append(verdict)
    if mistakes:
        findings.measurements["cause"] = "; ".join(mistakes)
        findings.notes += [f"in the engine's own arithmetic: {text}" for text in mistakes]
