"""ONNX engines on ONNX Runtime's CUDA provider: every family's tokens, GPT-2 124M's speed.

    python bench/onnx_cuda.py --output bench/results/onnx_cuda.json
    python bench/onnx_cuda.py --device cpu --layers 2 --prompt 32 --new 4    the script itself

Families are the tiny models of their conformance cases, every parameter drawn. Greedy tokens are
held against the torch engine's on a CPU, and each one against the reference's own logits in
float64 behind the same tokens: `gap` is how far below the best the chosen one is, in deviations
of its row, 0 where it is the same. `verify` runs on the same engines.

GPT-2 124M has random weights. A decoded step is (time of N + 1 new tokens - time of 1) / N, wall
clock with the host holding the tokens, the best of a few, every engine in one process.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from porttool import api
from porttool.config import Sampling
from porttool.errors import PorttoolError
from porttool.generate import generate
from porttool.nn import Step
from porttool.runner import Runner
from porttool.testing import cases

NEAR = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}
"""The largest gap, in deviations, that a type's rounding explains."""
LIMITS = {"max_batch_size": 4, "max_input_len": 12, "max_output_len": 8}
WAYS = (("float32", "scatter"), ("float32", "concat"), ("float16", "scatter"),
        ("float16", "concat"), ("bfloat16", "scatter"))  # fmt: skip
Tokens = list[tuple[int, ...]]
Logits = Callable[[list[int]], torch.Tensor]


def main() -> None:
    """Check every family, measure GPT-2, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(2)  # tiny models are slower where many threads wait for each other
    result: dict[str, Any] = {"machine": machine(arguments), "families": {}, "gpt2": {}}
    with tempfile.TemporaryDirectory() as name:
        modules = [m for m in cases.case_modules().values() if m.startswith("porttool_")]
        for case in (c for m in modules if cases.is_there(m) for c in cases.cases_in(m)):
            folder = Path(name) / case.__name__
            folder.mkdir()
            result["families"][case.__name__] = found = check_family(case(), folder, arguments)
            print(case.__name__, json.dumps(found), flush=True)
        save(result, arguments)
        result["prompt table"] = check_prompt_table(Path(name) / "table", arguments)
        print("prompt table", json.dumps(result["prompt table"]), flush=True)
        for dtype, engine, found in measure_gpt2(Path(name) / "gpt2", arguments):
            result["gpt2"].setdefault(dtype, {})[engine] = found
            print(dtype, engine, json.dumps(found), flush=True)
            save(result, arguments)


def save(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write what there is."""
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """Say what it is measured on, and how."""
    import onnxruntime

    on_gpu = arguments.device == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "providers": onnxruntime.get_available_providers(),
        **{name: version(name) for name in ("torch", "transformers", "onnx")},
        "settings": {k: str(v) for k, v in vars(arguments).items() if k != "output"},
    }


def check_family(family: Any, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Take a family's tiny model to both engines in every type, and compare."""
    source = folder / "source"
    family.write_source(source, 0)
    size = api.convert(source, folder / "checkpoint").config.vocab_size
    prompts = [[(7 * i + 3 * j + 1) % size for j in range(2 + 3 * i)] for i in range(4)]
    api.build(folder / "checkpoint", folder / "torch", dtype="float32", **LIMITS)
    plain = greedy(api.load(folder / "torch", options={"device": "cpu"}).runner, prompts, 8)
    beside = folder / "reference"
    reference = beside if beside.is_dir() else source
    found: dict[str, Any] = {}
    for dtype, cache in WAYS:
        out = folder / f"onnx-{dtype}-{cache}"
        try:
            api.build(folder / "checkpoint", out, engine="onnx", dtype=dtype,
                      options={"cache": cache}, **LIMITS)  # fmt: skip
            runner = api.load(out, options={"device": arguments.device}).runner
            tokens = greedy(runner, prompts, 8)
            gaps = gaps_of(prompts, tokens, lambda ids: family.reference_logits(source, ids))
            report = api.evaluate("parity", out, hf_model=reference,
                                  runner_options={"device": arguments.device})  # fmt: skip
        except PorttoolError as error:
            found[f"{dtype} {cache}"] = {"error": str(error)[:600]}
            continue
        found[f"{dtype} {cache}"] = {
            "as the torch engine": tokens == plain,
            "tokens": len(gaps), "other than the reference's": sum(g > 0 for g in gaps),
            "largest gap": max(gaps), "wrong": sum(g > NEAR[dtype] for g in gaps),
            "verify": {v.name: v.passed for v in report.verdicts},
        }  # fmt: skip
    return found


def greedy(runner: Runner, prompts: Sequence[Sequence[int]], n: int) -> Tokens:
    """Return each prompt's n greedy tokens."""
    return [row[0].tokens for row in generate(runner, prompts, Sampling(max_new_tokens=n), eos=())]


def gaps_of(prompts: Sequence[Sequence[int]], tokens: Tokens, logits: Logits) -> list[float]:
    """Return how far below the reference's best every token is, in deviations of its row."""
    found = []
    for prompt, chosen in zip(prompts, tokens, strict=True):
        rows = logits([*prompt, *chosen])[len(prompt) - 1 : -1].double().cpu()
        taken = rows.gather(1, torch.tensor(chosen)[:, None])[:, 0]
        found += ((rows.amax(1) - taken) / rows.std(1)).tolist()
    return found


def gpt2(**sizes: Any) -> Any:
    """Return a GPT-2 of transformers with random weights, its attention spelled out."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    config = GPT2Config(**ends, **sizes, attn_implementation="eager")
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def make(folder: Path, name: str, device: str, **choices: Any) -> Runner:
    """Build and load an engine: `torch`, not tuned, or ONNX with the cache of that name."""
    torch_engine = {"options": {"tune": False}}
    options = torch_engine if name == "torch" else {"engine": "onnx", "options": {"cache": name}}
    out = folder / "-".join((name, *map(str, choices.values())))
    api.build(folder / "checkpoint", out, **options, **choices)
    return api.load(out, options={"device": device}).runner


def check_prompt_table(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Feed virtual tokens to both engines, as embeddings to transformers; largest differences."""
    model = gpt2(n_layer=2, n_embd=48, n_head=4, vocab_size=97, n_positions=64)
    for parameter in model.parameters():
        parameter.normal_(0, 0.2)
    model.save_pretrained(folder / "source")
    api.convert(folder / "source", folder / "checkpoint")
    table, ids = torch.randn(4, 48) * 0.2, [97, 99, 98, 100, 5, 9, 2]
    embedded = torch.cat((model.transformer.wte.weight, table))[ids]
    wanted = model(inputs_embeds=embedded[None]).logits[0, -1]
    apart = {}
    for name in ("torch", "scatter", "concat"):
        device = "cpu" if name == "torch" else arguments.device
        runner = make(folder, name, device, dtype="float32", max_prompt_rows=4, **LIMITS)
        runner.load_prompt_table(table)
        got = runner.step(Step.prefill([ids]))[0].cpu()
        apart[name] = float((got - wanted).abs().max() / wanted.std())
    return apart


def measure_gpt2(
    folder: Path, arguments: argparse.Namespace
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Time GPT-2 of 124M in both engines and in transformers, and compare their tokens."""
    model = gpt2(n_layer=arguments.layers)
    model.save_pretrained(folder / "source")
    api.convert(folder / "source", folder / "checkpoint")
    size = (max(arguments.batches), arguments.prompt)
    prompts = torch.randint(0, 50257, size, generator=torch.Generator().manual_seed(1)).tolist()
    limits = {"max_batch_size": size[0], "max_input_len": size[1],
              "max_output_len": arguments.new + 8}  # fmt: skip
    model = model.to(arguments.device)

    def reference(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids], device=arguments.device)).logits[0]

    for dtype in ("float16", "float32"):
        for name in ("torch", "scatter", "concat"):
            try:
                runner = make(folder, name, arguments.device, dtype=dtype, **limits)
            except PorttoolError as error:
                yield dtype, name, {"error": str(error)[:600]}
                continue
            found = {
                "description": runner.description,
                **timings(partial(greedy, runner), prompts, arguments),
                **against(reference, prompts, greedy(runner, prompts, arguments.new)),
                **({} if name == "torch" else inside(runner, arguments)),
            }
            yield dtype, name, found
            del runner
        peer = copy.deepcopy(model).to(getattr(torch, dtype))
        yield dtype, "transformers", timings(partial(eager, peer), prompts, arguments)
        del peer


def eager(model: Any, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
    """Let transformers generate greedily."""
    ids = torch.tensor(prompts, device=model.device)
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n,
                             min_new_tokens=n, do_sample=False)  # fmt: skip
    return list(out[:, ids.shape[1] :].tolist())


def timings(
    run: Callable[[Any, int], Any], prompts: list[list[int]], arguments: argparse.Namespace
) -> dict[str, float]:
    """Return milliseconds of a prompt's first token and of each one after it, by batch."""
    found = {}
    for batch in arguments.batches:
        few, many = (partial(run, prompts[:batch], n) for n in (1, arguments.new + 1))
        short, long = best(few), best(many)
        found[f"b{batch} prompt ms"] = short
        found[f"b{batch} token ms"] = (long - short) / arguments.new
    return found


def best(run: Callable[[], object], repeats: int = 3) -> float:
    """Return the least wall-clock milliseconds of a few runs after two that warm up."""
    times = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - begin))
    return min(times[2:])


def against(logits: Logits, prompts: list[list[int]], tokens: Tokens) -> dict[str, Any]:
    """Hold tokens against transformers in float32 behind the same tokens."""
    gaps = gaps_of(prompts, tokens, logits)
    others = sum(gap > 0 for gap in gaps)
    return {"tokens": len(gaps), "other than the reference's": others, "largest gap": max(gaps)}


def inside(runner: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Decode a few tokens under both profilers: on which provider nodes run, what is copied."""
    from torch.profiler import ProfilerActivity, profile

    from porttool.engines.onnx.export import MODEL
    from porttool.engines.onnx.program import SessionProgram
    from porttool.engines.onnx.session import make_session

    ones, steps = torch.ones(1, dtype=torch.int64), 4
    step = Step(0 * ones, ones[:, None], 9 * ones, ones)
    with tempfile.TemporaryDirectory() as name:
        settings = replace(runner._settings, profile=Path(name) / "times")
        session = make_session(runner._folder / MODEL, settings, runner._folder)
        with runner._graph.using(SessionProgram(session, settings.device, runner._folder)):
            runner.step(step)
        events = json.loads(Path(session.end_profiling()).read_text())
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if arguments.device == "cuda" else []
        runner.step(step)
        with profile(activities=activities) as recorder:
            for _ in range(steps):
                runner.step(step)
        recorder.export_chrome_trace(f"{name}/trace.json")
        trace = json.loads(Path(name, "trace.json").read_text())["traceEvents"]
    nodes = [e["args"] for e in events if e.get("cat") == "Node" and "provider" in e["args"]]
    copied: Counter[str] = Counter()
    for event in trace:
        if event.get("cat") == "gpu_memcpy":
            copied[event["name"]] += event["args"].get("bytes", 0) // steps
    return {
        "nodes by provider": Counter(n["provider"] for n in nodes),
        "not on the device": Counter(n["op_name"] for n in nodes if "CPU" in n["provider"]),
        "cache bytes": runner._graph.cache.keys.nbytes * 2,
        "bytes copied a step": copied,
        "kernels a step": sum(e.get("cat") == "kernel" for e in trace) / steps,
    }


if __name__ == "__main__":
    main()
