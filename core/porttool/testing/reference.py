"""Making tiny models whose every parameter matters, and asking transformers what they compute."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from porttool.errors import importing, require_extra

if TYPE_CHECKING:
    from torch import Tensor, nn

M = TypeVar("M", bound="nn.Module")

SPREAD = 0.2
"""Standard deviation of redrawn parameters: wide enough that every mistake moves the logits."""


def redraw(module: M, seed: int) -> M:
    """Draw every parameter from N(0, 0.2), as numbers that float32 holds exactly; return it.

    With default initialisation norms are ones and biases zeros: exchanging two norms then changes
    nothing, and no test sees it.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(drawn * SPREAD)
    return module


def widened() -> AbstractContextManager[Any]:
    """Return a context in which torch code that asks for float32 is given float64.

    Reference models compute norms, rotary angles and softmax in float32 even when their weights
    are wider. That rounding is theirs, not the port's; without it 1e-9 can be asked for.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    def widen(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    class Widened(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called = torch.Tensor.double if func is torch.Tensor.float else func
            named = {name: widen(value) for name, value in (kwargs or {}).items()}
            return called(*map(widen, args), **named)

    return Widened()


def transformers_logits(path: Path, ids: list[int]) -> Tensor:
    """Logits [len(ids), vocab_size] in float64 of a Hugging Face folder, as transformers has them.

    The folder's own code is never run. MissingExtra if transformers is not installed.
    """
    import torch

    with widened(), torch.inference_mode():
        logits: Tensor = transformers_model(path)(input_ids=torch.tensor([ids])).logits[0]
    return logits


@lru_cache(maxsize=4)
def transformers_model(path: Path) -> Any:
    """Load a folder into transformers in float64, once."""
    import torch

    os.environ["HF_HUB_OFFLINE"] = "1"
    require_extra("reference", "transformers")
    with importing("reference", "transformers"):
        from transformers import AutoModelForCausalLM
    with widened():
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float64, trust_remote_code=False
        )
    return model.eval().requires_grad_(False)
