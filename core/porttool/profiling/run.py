"""Running an engine under profilers: torch's for every engine, the engine's own beside it."""

from __future__ import annotations

import csv
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from porttool.errors import UsageError
from porttool.nn import Step
from porttool.profiling.costs import Cost, Peak, StepSize, total_cost
from porttool.profiling.peak import measure_peak
from porttool.profiling.table import Line, make_table
from porttool.runner import Runner, TimedNode
from porttool.standing import made_folder

WARM = 2
"""Steps before what is counted: they pack weights, capture graphs, choose kernels."""
PREFIX = "porttool."


@dataclass(frozen=True)
class ProfileShape:
    """What is run: prompts of one length, then so many tokens one at a time."""

    batch: int = 1
    prompt: int = 128
    new: int = 16


@dataclass(frozen=True)
class Profile:
    """What was found. `lines` are by module where the engine can tell, else of whole steps."""

    description: str
    shape: ProfileShape
    peak: Peak
    phases: dict[str, dict[str, float]]
    lines: list[Line]
    kernels: list[tuple[str, int, float]]
    """Name, calls and seconds of its own of every operation that torch's profiler saw."""


def profile(runner: Runner, shape: ProfileShape, output: Path) -> Profile:
    """Profile a prefill and its decoding; write trace.json, layers.csv, kernels.csv, profile.json.

    Raises UsageError for a shape that the engine does not hold.
    """
    require_fit(runner, shape)
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with made_folder(output):
        with torch.profiler.profile(activities=activities) as recorder:
            nodes = runner.profiled(lambda: run_steps(runner, shape))
        trace = export_trace(recorder)
        found = summarize(runner, shape, trace, nodes)
        steps = step_ranges(trace)
        trace["traceEvents"] += as_events(nodes, steps)
        (output / "trace.json").write_text(json.dumps(trace))
        write_tables(found, output)
        for phase, layers in runner.layer_information().items():
            (output / f"layers_{phase}.json").write_text(layers, encoding="utf-8")
            times = layer_times([n for n in nodes if steps[n.run]["name"] == PREFIX + phase])
            (output / f"profile_{phase}.json").write_text(json.dumps(times, indent=1) + "\n")
    return found


def run_unrecorded(runner: Runner, shape: ProfileShape) -> None:
    """Run what `profile` runs, recording nothing: for a profiler around this process.

    Raises UsageError for a shape that the engine does not hold.
    """
    require_fit(runner, shape)
    run_steps(runner, shape)


def require_fit(runner: Runner, shape: ProfileShape) -> None:
    """Refuse a shape beyond the engine's limits."""
    limits = runner.engine.manifest.limits
    beyond = [
        f"{flag} is {wanted}, the engine holds {most}"
        for flag, wanted, most in (
            ("--batch-size", shape.batch, limits.max_batch_size),
            ("--prompt-len", shape.prompt, limits.max_input_len),
            ("--new-tokens", shape.new, limits.max_output_len),
        )
        if wanted > most
    ]
    if beyond:
        raise UsageError(f"{'; '.join(beyond)}: give that or less")


def run_steps(runner: Runner, shape: ProfileShape) -> None:
    """Feed the prompts and decode, each step a named range; the first two steps are warm-up.

    An engine that decodes on its device makes as many tokens in a step as it can.
    """
    tokens = torch.arange(shape.batch * shape.prompt).view(shape.batch, -1)
    tokens %= min(97, runner.config.vocab_size)
    whole = Step.prefill(tokens.tolist())
    with phase("warm-up"):
        runner.step(whole)
    with phase("warm-up"):
        decode(runner, shape, 0)
    with phase("prefill"):
        runner.step(whole)
    made = 0
    while made < shape.new:
        with phase("decode"):
            made += decode(runner, shape, made)


def decode(runner: Runner, shape: ProfileShape, i: int) -> int:
    """Decode behind i tokens that were decoded before; return how many a row it made."""
    n = shape.batch
    step = Step.decode([0] * n, list(range(n)), [shape.prompt + i] * n)
    if runner.decodes_on_device:
        return runner.decode(step, shape.new - i).shape[1]
    runner.step(step)
    return 1


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name a step for torch's profiler and, on a GPU, for nsys; wait for it to end."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.nvtx.range_push(PREFIX + name)
    with record_function(PREFIX + name):
        yield
        if cuda:
            torch.cuda.synchronize()
    if cuda:
        torch.cuda.nvtx.range_pop()


def export_trace(recorder: Any) -> dict[str, Any]:
    """Return torch's Chrome trace."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorder.export_chrome_trace(str(path))
        trace: dict[str, Any] = json.loads(path.read_bytes())
    return trace


def step_ranges(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the ranges of the steps, in order of time."""
    ranges = [
        event for event in trace["traceEvents"]
        if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX)
    ]  # fmt: skip
    return sorted(ranges, key=lambda event: event["ts"])


def summarize(
    runner: Runner, shape: ProfileShape, trace: dict[str, Any], nodes: Sequence[TimedNode]
) -> Profile:
    """Turn what was recorded into times of phases, modules and kernels."""
    made = runner.engine.manifest
    ranges = step_ranges(trace)
    names = [event["name"].removeprefix(PREFIX) for event in ranges]
    sizes = {
        "prefill": StepSize.prefill(shape.batch, shape.prompt, made.dtype),
        "decode": StepSize.decode(shape.batch, shape.prompt, shape.new, made.dtype),
    }
    on_gpu = "cuda" if any(e.get("cat") == "kernel" for e in trace["traceEvents"]) else "cpu"
    peak = measure_peak(on_gpu, made.dtype)
    phases = {}
    for name, size in sizes.items():
        # all but the last step make as many
        tokens = -(-shape.new // names.count(name)) if name == "decode" else 1
        taken = sorted(e["dur"] / 1e6 / tokens for e in ranges if e["name"] == PREFIX + name)
        cost = total_cost(made.config, size)
        median = taken[len(taken) // 2]
        phases[name] = {
            "seconds": median, "flops": cost.flops, "bytes": cost.nbytes,
            "roofline": cost.seconds(peak) / median,
        }  # fmt: skip
    counted = [(names[n.run], n) for n in nodes if names[n.run] in sizes]
    lines = make_table(
        counted, made.config, sizes=sizes, runs={n: names.count(n) for n in sizes}, peak=peak
    )
    if not lines:
        lines = [
            Line(name, -1, "step", p["seconds"], Cost(p["flops"], p["bytes"]), p["roofline"])
            for name, p in phases.items()
        ]
    since = ranges[WARM]["ts"]
    return Profile(runner.description, shape, peak, phases, lines, kernels_in(trace, since))


def kernels_in(trace: dict[str, Any], since: float) -> list[tuple[str, int, float]]:
    """Add up GPU kernels, or the operations of torch where there is none, by name."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e["ts"] >= since]
    on_gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    found: dict[str, list[float]] = {}
    for event in on_gpu or outermost([e for e in events if e.get("cat") == "cpu_op"]):
        found.setdefault(event["name"], []).append(event["dur"] / 1e6)
    rows = [(name, len(times), sum(times)) for name, times in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def outermost(events: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the events that no other of the same thread contains, so that none counts twice."""
    ends: dict[int, float] = {}
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        if event["ts"] >= ends.get(event["tid"], 0):
            ends[event["tid"]] = event["ts"] + event["dur"]
            yield event


def as_events(nodes: Sequence[TimedNode], ranges: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turn an engine's own times into trace events, each run moved to where its step began."""
    starts: dict[int, float] = {}
    for node in nodes:
        starts[node.run] = min(node.begin, starts.get(node.run, node.begin))
    return [
        {"ph": "X", "cat": "engine", "name": node.name, "pid": "engine", "tid": node.operator,
         "ts": ranges[node.run]["ts"] + node.begin - starts[node.run], "dur": node.duration,
         "args": {"operator": node.operator}}
        for node in nodes
    ]  # fmt: skip


def layer_times(nodes: Sequence[TimedNode]) -> list[dict[str, Any]]:
    """Return layers' times in the form of `trtexec --exportProfile`, which NVIDIA's tools read."""
    runs: dict[str, list[float]] = {}
    for node in nodes:
        runs.setdefault(node.name, []).append(node.duration / 1e3)
    total = sum(map(sum, runs.values()))
    layers = [
        {"name": name, "timeMs": sum(times), "averageMs": statistics.mean(times),
         "medianMs": statistics.median(times), "percentage": 100 * sum(times) / total}
        for name, times in runs.items()
    ]  # fmt: skip
    return [{"count": len({node.run for node in nodes})}, *layers]


def write_tables(found: Profile, output: Path) -> None:
    """Write layers.csv, kernels.csv and profile.json."""
    with (output / "layers.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("phase", "layer", "module", "seconds", "flops", "bytes", "roofline"))
        for line in found.lines:
            rows.writerow((line.phase, line.layer, line.module, f"{line.seconds:.9f}",
                           line.cost.flops, line.cost.nbytes, f"{line.fraction:.4f}"))  # fmt: skip
    with (output / "kernels.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("name", "calls", "seconds"))
        rows.writerows(found.kernels)
    facts = {
        "description": found.description, "shape": vars(found.shape), "peak": vars(found.peak),
        "phases": found.phases,
    }  # fmt: skip
    (output / "profile.json").write_text(json.dumps(facts, indent=1) + "\n")
