"""GPT-2 124M on a CPU in float32: our ONNX engine, our torch engine and transformers.

Each of our engines runs twice: a step in, logits out, and as `run` has it, greedily through the
generation loop, where it need not compute all logits. Like is compared with like.

The weights are drawn, their values do not change the time. The engines take turns, round after
round, so that whatever else the machine does falls on all of them; medians are reported.

    python bench/onnx_cpu.py --rounds 7 --output bench/results/onnx_cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from porttool import api
from porttool.config import Sampling
from porttool.generate import generate
from porttool.nn import Step
from porttool.runner import Runner

RUN = ", run"
"""Ends the name of an engine that is driven as `run` drives it."""


def main() -> None:
    """Build both engines, measure all three, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--caches", nargs="+", default=["scatter", "concat"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        contenders = make_contenders(Path(folder), arguments)
        prompt = torch.randint(0, 50257, (arguments.prompt,), generator=torch.manual_seed(0))
        times = race(contenders, prompt, arguments)
    result = report(times, arguments)
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


class Contender(ABC):
    """A model that continues a prompt greedily."""

    @abstractmethod
    def continued(self, prompt: torch.Tensor, n_new: int) -> tuple[list[int], list[float]]:
        """Return the new tokens, and when each was known."""


class Stepped(Contender):
    """A model that returns logits for every token; the highest is chosen here."""

    @abstractmethod
    def feed(self, tokens: torch.Tensor, start: int) -> int:
        """Feed tokens behind `start` others; return the greedy next one."""

    def continued(self, prompt: torch.Tensor, n_new: int) -> tuple[list[int], list[float]]:
        """Feed the prompt, then token by token."""
        tokens, times = [self.feed(prompt, 0)], [time.perf_counter()]
        while len(tokens) < n_new:
            start = len(prompt) + len(tokens) - 1
            tokens.append(self.feed(torch.tensor(tokens[-1:]), start))
            times.append(time.perf_counter())
        return tokens, times


class Ours(Stepped):
    """One of our engines, asked for logits."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def feed(self, tokens: torch.Tensor, start: int) -> int:
        """Feed tokens behind `start` others; return the greedy next one."""
        n = len(tokens)
        step = Step(*(torch.tensor(v) for v in ([0], [tokens.tolist()], [start], [n])))
        return int(self.runner.step(step)[0].argmax())


class Run(Contender):
    """One of our engines in the generation loop, which asks it for tokens."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def continued(self, prompt: torch.Tensor, n_new: int) -> tuple[list[int], list[float]]:
        """Generate, noting when each token arrives."""
        times: list[float] = []
        sampling = Sampling(max_new_tokens=n_new, ignore_eos=True)

        def note(index: int, token: int) -> None:
            times.append(time.perf_counter())

        found = generate(self.runner, [prompt.tolist()], sampling, eos=(), on_token=note)
        return list(found[0][0].tokens), times


class Theirs(Stepped):
    """The same model in transformers."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: Any = None

    def feed(self, tokens: torch.Tensor, start: int) -> int:
        """Feed tokens behind `start` others; return the greedy next one."""
        if start == 0:
            self.cache = None
        out = self.model(tokens[None], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return int(out.logits[0, -1].argmax())


def make_contenders(folder: Path, arguments: argparse.Namespace) -> dict[str, Contender]:
    """Write a model, port it to every engine, load all."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=arguments.layers)).eval()
    model.save_pretrained(folder / "source")
    api.convert(folder / "source", folder / "checkpoint")
    limits = {"max_batch_size": 1, "max_input_len": arguments.prompt,
              "max_output_len": arguments.new}  # fmt: skip
    contenders: dict[str, Contender] = {"transformers": Theirs(model)}
    for name, engine, options in [
        ("torch", "torch", {}),
        *((f"onnx {cache}", "onnx", {"cache": cache}) for cache in arguments.caches),
    ]:
        built = folder / name.replace(" ", "-")
        api.build(folder / "checkpoint", built, engine=engine, options=options, **limits)
        settings = {"device": "cpu", **({"threads": arguments.threads} if options else {})}
        runner = api.load(built, options=settings).runner
        contenders[name], contenders[name + RUN] = Ours(runner), Run(runner)
        print(runner.description)
    return contenders


def race(
    contenders: dict[str, Contender], prompt: torch.Tensor, arguments: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Let each take a turn a round; return milliseconds of prefill and of a decoded token."""
    times: dict[str, dict[str, list[float]]] = {
        name: {"prefill_ms": [], "token_ms": []} for name in contenders
    }
    chosen: dict[str, list[int]] = {}
    for turn in range(arguments.rounds + 1):
        for name, contender in contenders.items():
            prefill, token, chosen[name] = measure(contender, prompt, arguments.new)
            if turn:  # the first round warms caches and lazily packed weights
                times[name]["prefill_ms"].append(prefill)
                times[name]["token_ms"].append(token)
    if len({tuple(tokens) for tokens in chosen.values()}) != 1:
        raise SystemExit(f"the engines disagree: {chosen}")
    return times


def measure(
    contender: Contender, prompt: torch.Tensor, n_new: int
) -> tuple[float, float, list[int]]:
    """Return milliseconds of the prompt, of each new token, and the tokens."""
    time.sleep(0.2)  # the engine before may still have threads that spin
    begin = time.perf_counter()
    tokens, times = contender.continued(prompt, n_new)
    return 1e3 * (times[0] - begin), 1e3 * (times[-1] - times[0]) / (n_new - 1), tokens


def report(times: dict[str, dict[str, list[float]]], arguments: argparse.Namespace) -> Any:
    """Return medians, ratios and what they were measured on."""
    medians = {
        name: {kind: statistics.median(values) for kind, values in kinds.items()}
        for name, kinds in times.items()
    }
    return {
        "settings": {k: str(v) for k, v in vars(arguments).items() if k != "output"},
        "machine": {"processor": platform.processor() or platform.machine(),
                    "cores": os.cpu_count(), "load": os.getloadavg()},
        "versions": {p: version(p) for p in ("torch", "transformers", "onnxruntime", "onnx")},
        "median": medians,
        "over_torch": {
            name: {k: v / medians["torch" + RUN * name.endswith(RUN)][k] for k, v in kinds.items()}
            for name, kinds in medians.items()
        },
        "all": times,
    }  # fmt: skip


if __name__ == "__main__":
    main()
