"""Small decoders with every feature of ModelConfig, and steps to try them with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from porttool.config import Limits, ModelConfig
from porttool.engines.torch.cuda_compile import CompilerUnavailable
from porttool.engines.torch.cuda_rule import default_tuning
from porttool.engines.torch.cuda_tuning import Tuning
from porttool.nn import Decoder, KVCache, Step

BASE: dict[str, Any] = {
    "vocab_size": 101, "n_positions": 64, "n_layer": 2, "n_head": 3, "n_kv_head": 3,
    "head_dim": 16, "d_model": 48, "d_ff": 80, "activation": "gelu_tanh", "attention_scale": 0.25,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "learned": {},
    "multi-query": {"n_head": 6, "n_kv_head": 1, "inverse_layer_scale": True},
    "gated rotary": {
        "n_head": 4, "n_kv_head": 4, "head_dim": 12, "activation": "gelu", "position": "rotary",
        "rotary_fraction": 0.5, "norm": "layernorm1p", "gated": True, "qkv_bias": False,
        "mlp_bias": False, "out_bias": False, "tied_head": False,
    },
    "grouped rms": {
        "n_head": 6, "n_kv_head": 2, "head_dim": 20, "activation": "silu", "position": "rotary",
        "norm": "rmsnorm", "norm_bias": False, "gated": True, "tied_head": False,
    },
}  # fmt: skip

TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of logits on a GPU. Plain torch on the same steps: up to 0.011 in float16, 0.075 in bfloat16."""
_LONG = {"n_positions": 640, "vocab_size": 1003}
GPU_SHAPES: dict[str, dict[str, Any]] = {
    "learned": {"head_dim": 64, "d_model": 192, "d_ff": 770, **_LONG},
    "multi-query": {"head_dim": 128, "d_model": 768, "d_ff": 1000, **_LONG},
    "gated rotary": {"head_dim": 80, "d_model": 320, "d_ff": 600, **_LONG},
    "grouped rms": {"head_dim": 160, "d_model": 960, "d_ff": 600, **_LONG},
}


class TunedDecoder:
    """In place of a decoder on a GPU: what it was told to use; subclasses say what that takes."""

    dtype, device = torch.float16, "cuda"

    def __init__(self, shape: ModelConfig) -> None:
        self.config, self.used = shape, [default_tuning(shape, "cpu")]

    @property
    def tuning(self) -> Tuning:
        """What it would run in."""
        return self.used[-1]

    def use(self, tuning: Tuning) -> None:
        """Take a tuning, unless it does not compile."""
        if self.refuses(tuning):
            raise CompilerUnavailable("it does not compile")
        self.used.append(tuning)

    def refuses(self, tuning: Tuning) -> bool:
        """Whether a tuning does not compile."""
        raise NotImplementedError

    def milliseconds(self) -> float:
        """What a step takes."""
        raise NotImplementedError


def config(case: str, **changes: Any) -> ModelConfig:
    """Return a case's shape with some of it changed."""
    return ModelConfig(**{**BASE, **CASES[case], **changes})


def limits(n_slots: int, max_len: int) -> Limits:
    """Return limits of so many rows of so many tokens."""
    return Limits(max_batch_size=n_slots, max_input_len=max_len - 1, max_output_len=1)


def drawn(shape: ModelConfig, dtype: torch.dtype, device: str = "cpu") -> Decoder:
    """Return a float64 decoder whose parameters are drawn and exact in `dtype`."""
    torch.manual_seed(0)
    decoder = Decoder(shape).double().requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        spread = 0.2 if parameter.ndim == 1 else min(0.2, 1.5 * parameter.shape[-1] ** -0.5)
        value = torch.randn_like(parameter) * spread
        if "norm" in name and name.endswith("weight") and shape.norm != "layernorm1p":
            value += 1
        parameter.copy_(value.to(dtype))
    return decoder.to(device)


def prompts(lengths: list[int], seed: int = 1) -> list[list[int]]:
    """Draw prompts of these lengths for the shapes of GPU_SHAPES."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 1003, (n,), generator=generator).tolist() for n in lengths]


def one_token(slots: list[int], tokens: Tensor, starts: list[int]) -> Step:
    """Return the step that feeds one token to each slot."""
    ones = torch.ones(len(slots), dtype=torch.int64)
    return Step(torch.tensor(slots), tokens.reshape(-1, 1), torch.tensor(starts), ones)


def reference(decoder: Decoder, cache: KVCache, step: Step) -> Tensor:
    """Return float64 logits [n, vocab_size] of each row's last real token, on the CPU."""
    device = decoder.embedding.weight.device
    logits = decoder(step.to(device), cache).cpu()
    return logits[torch.arange(len(logits)), step.lengths - 1]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference over the norm of what is right."""
    return float((found.double().cpu() - wanted).norm() / wanted.norm())


def graphed_without_gpu(made: Any) -> None:
    """Let a decoder on a CPU run as if its graphs were replayed, one step each."""
    made.graphed = True
    made._capture = lambda work, count: SimpleNamespace(replay=work)


def assert_same_bits_in_any_batch(made: Any) -> None:
    """A row's logits are the same bits in batches of 2 to 16, and of several tokens at once."""
    lengths = [40 + 7 * i for i in range(16)]
    made.step(Step.prefill(prompts(lengths)))
    tokens = torch.arange(16)
    whole = made.step(one_token(list(range(16)), tokens, lengths)).clone()
    for n in (2, 5, 15):
        part = made.step(one_token(list(range(n)), tokens[:n], lengths[:n]))
        assert torch.equal(part, whole[:n])
    drafted = torch.stack([tokens[:4], tokens[:4] + 1, tokens[:4] + 2], dim=1)
    step = Step(torch.arange(4), drafted, torch.tensor(lengths[:4]), torch.tensor([3, 1, 3, 2]))
    assert torch.equal(made.step(step, all_positions=True)[:, 0], whole[:4])


def assert_tokens_repeat_and_equal_single_steps(made: Any, lengths: list[int]) -> None:
    """40 greedy tokens of rows that have so many: twice the same, and those of 40 single steps."""
    n = len(lengths)
    made.step(Step.prefill(prompts(lengths)))
    begin = one_token(list(range(n)), torch.arange(n), lengths)
    tokens = made.decode(begin, 40).cpu()
    assert torch.equal(made.decode(begin, 40).cpu(), tokens)
    fed = torch.arange(n)
    for i in range(40):
        step = one_token(list(range(n)), fed, [length + i for length in lengths])
        fed = made.step(step).argmax(-1).cpu()
        assert torch.equal(fed, tokens[:, i])
