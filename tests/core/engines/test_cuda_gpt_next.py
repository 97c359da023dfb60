"""GPT-Next's greedy tokens on the CUDA path are those of another's model: StableLM and Nemotron.

The model reads every continuation in float64. A token that is not its own choice must be as good
as tied with it; where all are its own, they are what it would have generated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("yaml")

import nemo_reference
import nemo_writer as nemo
import tiny
from porttool import api
from porttool.config import Dtype, Sampling
from porttool.generate import generate
from porttool.runner import Runner

VARIANTS = {
    "stablelm": (nemo_reference.stablelm, {"activation": "fast-swiglu"}),
    "nemotron": (nemo_reference.nemotron, {"activation": "squared-relu", "num_query_groups": 2}),
}
SMALL = {"num_layers": 2, "encoder_seq_length": 128}
MIDDLE = {
    "hidden_size": 320, "ffn_hidden_size": 601, "num_attention_heads": 4, "kv_channels": 80,
    "num_layers": 6, "encoder_seq_length": 160,
}  # fmt: skip
N_PROMPTS, N_NEW = 32, 64
TIE: dict[Dtype, float] = {"float32": 1e-3, "float16": 0.02}
"""Logits deviate by 1.2; this far apart, rounding may decide."""
DRAWN_FOR = 32
"""The width at which the writer's tensors keep activations near one."""


@dataclass(frozen=True)
class Case:
    """A checkpoint and the model that it must agree with."""

    model: torch.nn.Module
    checkpoint: Path
    vocab_size: int
    dtype: Dtype

    def runner(self, folder: Path, device: str, rows: int) -> Runner:
        api.build(self.checkpoint, folder / "engine", dtype=self.dtype, max_batch_size=rows,
                  max_input_len=48, max_output_len=N_NEW, options={"tune": False})  # fmt: skip
        return api.load(folder / "engine", options={"device": device}).runner

    def prompts(self, n: int) -> list[list[int]]:
        """Draw prompts of 1 to 40 tokens."""
        generator = torch.Generator().manual_seed(5)
        lengths = torch.randint(1, 41, (n,), generator=generator).tolist()
        return [
            torch.randint(0, self.vocab_size, (k,), generator=generator).tolist() for k in lengths
        ]


def make(
    folder: Path, name: str, sizes: dict[str, Any], *, vocab: int, dtype: Dtype = "float32"
) -> Case:
    """Draw a model that says many different things, its weights exact in `dtype`."""
    reference, changes = VARIANTS[name]
    values = {**nemo.GPT_2B, **sizes, **changes}
    tensors = nemo.draw(values, vocab)
    for key, tensor in tensors.items():
        if key.startswith("embedding."):
            tensor *= 5
        elif tensor.ndim == 2:
            tensor *= (DRAWN_FOR / tensor.shape[1]) ** 0.5
        tensor.copy_(tensor.to(getattr(torch, dtype)))
    source = nemo.write(folder / "model.nemo", values, tensors)
    checkpoint = tiny.converted(source, folder / "checkpoint")
    return Case(reference(values, tensors), checkpoint.path, vocab, dtype)


def continued(runner: Runner, prompts: list[list[int]], n_new: int) -> list[tuple[int, ...]]:
    """Return greedy tokens, as many prompts at a time as the engine has rows."""
    found = generate(runner, prompts, Sampling(max_new_tokens=n_new), eos=())
    return [completion.tokens for (completion,) in found]


def steps_of(model: torch.nn.Module, prompt: list[int], tokens: tuple[int, ...]) -> Tensor:
    """Return the model's logits [len(tokens), vocab_size] at every token's place, on the CPU."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]], device=device)).logits[0]
    return logits[len(prompt) - 1 : -1].cpu()


def gaps_of(case: Case, prompts: list[list[int]], found: list[tuple[int, ...]]) -> Tensor:
    """How much likelier (natural log) the model finds its own choice; and that, its second."""
    gaps = []
    for prompt, tokens in zip(prompts, found, strict=True):
        logits = steps_of(case.model, prompt, tokens)
        first, second = logits.topk(2).values.T
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        gaps.append(torch.stack((first - chosen, first - second)))
    return torch.cat(gaps, dim=1)


class Missed(AssertionError):
    """A token is no tie."""


def check(case: Case, runner: Runner, n_prompts: int = N_PROMPTS, n_new: int = N_NEW) -> None:
    """Raise `Missed` for a token that the model would not have chosen."""
    prompts = case.prompts(n_prompts)
    found = continued(runner, prompts, n_new)
    assert {len(tokens) for tokens in found} == {n_new}
    assert len({t for tokens in found for t in tokens}) > min(20, n_new)  # no loop of a few
    missed, margin = gaps_of(case, prompts, found)
    tie = TIE[case.dtype]
    assert (margin > tie).double().mean() > 0.9  # most tokens have no other that would do
    if bool(missed.max() > tie):
        raise Missed(f"the model finds a token {float(missed.max()):.3g} less likely than its own")


@pytest.mark.parametrize("name", VARIANTS)
def test_on_the_cpu(tmp_path: Path, name: str) -> None:
    case = make(tmp_path, name, SMALL, vocab=101)
    check(case, case.runner(tmp_path, "cpu", 5))


def test_another_model_is_noticed(tmp_path: Path) -> None:
    """StableLM whose norms weigh 0.2 less."""
    case = make(tmp_path, "stablelm", SMALL, vocab=101)
    runner = case.runner(tmp_path, "cpu", 5)
    for key, parameter in case.model.named_parameters():
        if "norm" in key and key.endswith("weight"):
            parameter.sub_(0.2)
    with pytest.raises(Missed):
        check(case, runner)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run the kernels")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on masked lanes
@pytest.mark.parametrize("name", VARIANTS)
def test_under_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:  # fmt: skip
    from porttool.engines.torch.runner import TorchRunner

    monkeypatch.setattr(TorchRunner, "_make_decoder", TorchRunner._cuda)
    case = make(tmp_path, name, {**SMALL, "num_layers": 1}, vocab=101)
    runner = case.runner(tmp_path, "cpu", 2)
    assert "Triton" in runner.description
    check(case, runner, n_prompts=2, n_new=3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("rows", [1, N_PROMPTS])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_on_a_gpu(tmp_path: Path, name: str, dtype: Dtype, rows: int) -> None:
    case = make(tmp_path, name, MIDDLE, vocab=1003, dtype=dtype)
    case.model.to("cuda")
    runner = case.runner(tmp_path, "cuda", rows)
    assert "Triton" in runner.description
    check(case, runner)
