"""Generation on the CUDA path, through the public functions, on every family's tiny model.

What a GPU chose is chosen again on the CPU from the logits that the GPU chose from: then a token
can differ only where two devices round a probability differently. The logits themselves are held
against the canonical decoder in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import tiny
from porttool import api
from porttool.config import Sampling
from porttool.engines.torch import loading
from porttool.generate import Completion, generate
from porttool.nn import Step
from porttool.runner import Runner
from porttool.sampling import Choices, Sampler
from porttool.testing import cases
from porttool.text import Tokenizer

CASES = [
    case
    for module in cases.case_modules().values()
    if module.startswith("porttool_") and cases.is_there(module)
    for case in cases.cases_in(module)
]
SMALL = "BigCodeConformance"
"""The one whose kernels the interpreter runs soonest."""

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
ROWS = 3
PROMPTS = [[5, 9, 2], [7], [1, 50, 33, 4, 8, 19, 2, 6], [3, 3, 3, 3], [40, 1], [22, 8, 8, 30, 1]]
ENDS = (4, 30)
NEW = 20
"""More than are decoded at a time."""

SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 3},
    "filtered": {"temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    "penalised": {
        "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3,
        "bad_words": ((5,), (50, 33), (3, 3, 3, 3, 20)), "min_new_tokens": 18,
    },
    "all": {
        "temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2, "frequency_penalty": 0.2,
        "bad_words": ((9,), (12, 20)), "min_new_tokens": 2,
    },
}  # fmt: skip


class Numbers(Tokenizer):
    """Says every id as a number."""

    n_tokens = 1 << 20

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids) -> str:  # type: ignore[no-untyped-def]
        return "".join(f"{i} " for i in ids)


@dataclass(frozen=True)
class Loaded:
    """A family on the CUDA path, on the CPU path, and as the float64 reference."""

    device: Runner
    cpu: Runner
    exact: Runner

    def load_table(self, table: torch.Tensor | None) -> None:
        for runner in (self.device, self.cpu, self.exact):
            runner.load_prompt_table(table)


def load_case(folder: Path, name: str, device: str) -> Loaded:
    """Take a family's tiny source all the way; `interpreter` runs the kernels on the CPU."""
    case = next(c for c in CASES if c.__name__ == name)
    case().write_source(folder / "source", 0)
    tiny.converted(folder / "source", folder / "checkpoint")
    for dtype in ("float32", "float64"):
        api.build(folder / "checkpoint", folder / dtype, dtype=dtype, max_batch_size=ROWS,
                  max_input_len=12, max_output_len=NEW, max_prompt_rows=4)  # fmt: skip
    options = [
        ("float32", {"device": "cuda"}),
        ("float32", {"device": "cpu"}),
        ("float64", {"device": "cpu", "canonical": True}),
    ]
    if device == "interpreter":
        options[0] = options[1]
    runners = [api.load(folder / d, options=o).runner for d, o in options]
    if device == "interpreter":
        interpret(runners[0])
    return Loaded(*runners)


def interpret(runner: Runner) -> None:
    """Put the kernels' decoder in place of the CPU's."""
    from porttool.engines.torch.cuda import CudaDecoder
    from porttool.engines.torch.loading import load_weights
    from porttool.engines.torch.runner import TorchRunner

    assert isinstance(runner, TorchRunner)
    limits = runner.engine.manifest.limits
    runner._decoder = CudaDecoder(
        runner.config, load_weights(runner.engine), dtype=torch.float32, limits=limits, device="cpu"
    )


@pytest.mark.parametrize("size", [500, loading.PIECE])
@pytest.mark.parametrize("device", [
    pytest.param("cpu:0", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="stands in for a GPU's memory")),
    pytest.param("cuda:0", marks=ON_GPU),
])  # fmt: skip
def test_a_gpus_weights_lie_in_one_allocation(tmp_path: Path, monkeypatch, device, size) -> None:
    from porttool.engines.torch.loading import load_weights

    monkeypatch.setattr(loading, "PIECE", size)  # bytes: tensors come in several

    CASES[0]().write_source(tmp_path / "source", 0)
    tiny.converted(tmp_path / "source", tmp_path / "checkpoint")
    api.build(tmp_path / "checkpoint", tmp_path / "engine", dtype="float16")
    engine = api.load(tmp_path / "engine").runner.engine
    wanted = load_weights(engine)
    with torch.inference_mode():  # as a caller of the library may be
        placed = load_weights(engine, device)
    assert list(placed) == list(wanted)
    assert len({w.untyped_storage().data_ptr() for w in wanted.values()}) == len(wanted)
    assert len({w.untyped_storage().data_ptr() for w in placed.values()}) == 1
    for name, tensor in placed.items():
        assert torch.equal(tensor.cpu(), wanted[name]) and tensor.dtype == wanted[name].dtype
        assert tensor.storage_offset() * tensor.itemsize % 256 == 0


@pytest.fixture(scope="module", params=[pytest.param(c.__name__, marks=ON_GPU) for c in CASES])
def loaded(request, tmp_path_factory):
    return load_case(tmp_path_factory.mktemp("cuda"), request.param, "cuda")


def run(runner, prompts=PROMPTS, *, eos=ENDS, on_token=None, **settings):
    sampling = Sampling(**{"max_new_tokens": NEW, **settings})
    return generate(runner, prompts, sampling, eos=eos, tokenizer=Numbers(), on_token=on_token)


def tokens_of(found: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[c.tokens for c in group] for group in found]


def check(loaded: Loaded, prompts: list[list[int]], eos: tuple[int, ...], sampling: Sampling):
    """Generate on the device; hold logits, tokens and log-probabilities against the CPU's."""
    wanted = sampling.model_copy(update={"logprobs": True, "keep_logits": True})
    found = generate(loaded.device, prompts, wanted, eos=eos)
    n = sampling.num_return_sequences
    rows = [(p, c) for p, group in zip(prompts, found, strict=True) for c in group]
    assert len(rows) == n * len(prompts)
    for index, (prompt, row) in enumerate(rows):
        if not row.tokens:
            continue
        assert row.logits is not None and row.logits.device.type == "cpu"
        whole = tiny.full_logits(loaded.exact, [*prompt, *row.tokens])[len(prompt) - 1 : -1]
        atol = 2e-4 * max(1.0, float(whole.std()))
        torch.testing.assert_close(row.logits.double(), whole, rtol=0, atol=atol)
        assert chosen_again(row.logits, prompt, index, sampling, eos) == list(row.tokens)
        likely = whole.log_softmax(-1).gather(1, torch.tensor(row.tokens)[:, None])[:, 0]
        logprobs = torch.tensor(row.logprobs, dtype=torch.float64)
        torch.testing.assert_close(logprobs, likely, rtol=0, atol=2 * atol)
    return found


def chosen_again(logits, prompt, index, sampling, eos) -> list[int]:
    """Return what the CPU chooses from kept logits [n_tokens, vocab_size]."""
    sampler = Sampler(sampling, eos, 1, logits)
    sampler.begin(0, prompt, index)
    return [int(Choices(sampler, [0], [i])(logits[i : i + 1], 0)) for i in range(len(logits))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run the kernels")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on masked lanes
def test_under_the_interpreter(tmp_path, monkeypatch):
    """Chunks of two, a prompt table, everything that changes or keeps logits at once."""
    monkeypatch.setattr("porttool.generate.CHUNK", 2)
    loaded = load_case(tmp_path, SMALL, "interpreter")
    table = torch.randn(4, loaded.cpu.config.d_model, generator=torch.Generator().manual_seed(1))
    loaded.load_table(table * 0.2)
    first = loaded.cpu.config.vocab_size
    prompts = [[first + 3, 5], [1, first, 4]]
    sampling = Sampling(**{**SETTINGS["all"], "max_new_tokens": 4})
    found = check(loaded, prompts, (22,), sampling)
    assert tokens_of(found) == tokens_of(generate(loaded.cpu, prompts, sampling, eos=(22,)))


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_logits_and_logprobs(loaded, name):
    found = check(loaded, PROMPTS, ENDS, Sampling(**{**SETTINGS[name], "max_new_tokens": NEW}))
    assert any(len(c.tokens) > 17 for (c,) in found)  # over the end of a chunk


def test_greedy_tokens_need_no_logits(loaded):
    """The graphs that choose by themselves, and those that give logits: the same tokens."""
    kept = check(loaded, PROMPTS, (), Sampling(max_new_tokens=NEW))
    assert tokens_of(run(loaded.device, eos=())) == tokens_of(kept)


@pytest.mark.parametrize("name", ["sampled", "filtered", "all"])
def test_a_seed_means_the_same_token(loaded, name):
    """On every device, again, and with other neighbours; another seed means another.

    Not over 50 000 tokens: there the border between two is never far from a random number.
    """
    settings = SETTINGS[name]
    found = tokens_of(run(loaded.device, **settings))
    assert found == tokens_of(run(loaded.device, **settings))
    assert found != tokens_of(run(loaded.device, **{**settings, "seed": 77}))
    if loaded.cpu.config.vocab_size < 1000:
        assert found == tokens_of(run(loaded.cpu, **settings))
        assert found[:2] == tokens_of(run(loaded.device, PROMPTS[:2], **settings))


def test_several_samples_of_a_prompt(loaded):
    sampling = Sampling(temperature=1.0, num_return_sequences=3, max_new_tokens=NEW)
    found = check(loaded, PROMPTS[:2], ENDS, sampling)
    assert all(len({c.tokens for c in group}) == 3 for group in found)


@pytest.mark.parametrize("name", ["greedy", "sampled", "penalised"])
def test_streaming(loaded, name):
    told: list[tuple[int, int]] = []
    found = run(loaded.device, on_token=lambda i, t: told.append((i, t)), **SETTINGS[name])
    for i, (completion,) in enumerate(found):
        assert [t for row, t in told if row == i] == list(completion.tokens)


@pytest.mark.parametrize("name", ["greedy", "penalised"])
def test_beams(loaded, name):
    settings = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 10, **SETTINGS[name]}
    settings["min_new_tokens"] = 5
    found, wanted = (run(r, **settings) for r in (loaded.device, loaded.cpu))
    for ours, theirs in zip(found, wanted, strict=True):
        scores = [torch.tensor([c.score for c in group]) for group in (ours, theirs)]
        torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
        apart = scores[1][:-1] - scores[1][1:]
        if bool((apart > 1e-3).all()):  # else their order is anybody's
            assert [c.tokens for c in ours] == [c.tokens for c in theirs]


@pytest.mark.parametrize("name", ["greedy", "all"])
def test_prompt_table(loaded, name):
    c = loaded.cpu.config
    table = torch.randn(4, c.d_model, generator=torch.Generator().manual_seed(1)) * 0.2
    virtual = [[c.vocab_size + i % 4, c.vocab_size + 3, *p] for i, p in enumerate(PROMPTS)]
    loaded.load_table(table)
    try:
        sampling = Sampling(**{**SETTINGS[name], "max_new_tokens": NEW})
        with_table = check(loaded, virtual, ENDS, sampling)
    finally:
        loaded.load_table(None)
    assert tokens_of(with_table) != tokens_of(run(loaded.device, **SETTINGS[name]))


@pytest.mark.parametrize("name", ["greedy", "penalised", "sampled"])
def test_stop_strings(loaded, name):
    """Each row's text ends before the string, and its tokens with the one that completes it."""
    whole = run(loaded.device, eos=(), **SETTINGS[name])
    texts = [c.text for (c,) in whole]
    stop = " ".join(texts[0].split()[3:5]) + " "
    stopped = run(loaded.device, eos=(), stop=(stop,), **SETTINGS[name])
    for text, (full,), (found,) in zip(texts, whole, stopped, strict=True):
        assert found.text == text.split(stop)[0]
        assert found.tokens == full.tokens[: len(found.tokens)]
        assert (found.finish == "stop") == (stop in text)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", SETTINGS)
def test_no_token_waits_for_the_host(loaded, monkeypatch, name):
    """From the first token of a chunk to its last nothing asks the device for anything."""
    settings = {**SETTINGS[name], "logprobs": True, "keep_logits": True}
    expected = tokens_of(run(loaded.device, **settings))  # captures the graphs
    decoder, chunks = loaded.device._decoder, []
    sample = decoder.sample

    def watched(step: Step, n_tokens: int, choose):  # type: ignore[no-untyped-def]
        def quiet(logits, i):  # type: ignore[no-untyped-def]
            torch.cuda.set_sync_debug_mode("error")
            return choose(logits, i)

        chunks.append(n_tokens)
        try:
            return sample(step, n_tokens, quiet)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(decoder, "sample", watched)
    assert tokens_of(run(loaded.device, **settings)) == expected
    assert max(chunks) > 2
