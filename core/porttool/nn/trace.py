"""Recording what goes into and comes out of every weight-bearing operation of a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from porttool.nn.decoder import Decoder, Step


@torch.inference_mode()
def traced(decoder: Decoder, step: Step) -> dict[str, Tensor]:
    """Run a step without a cache; return `<module>.in` and `.out` of each leaf, and `logits`."""
    leaves = {name: m for name, m in decoder.named_modules() if name and not list(m.children())}
    record, logits = record_calls(leaves, lambda: decoder(step))
    return {**record, "logits": logits}


def record_calls(
    modules: Mapping[str, nn.Module], run: Callable[[], Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """Call `run` while the modules' inputs and outputs are recorded under the names given."""
    record: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            record[f"{name}.in"] = inputs[0].detach().cpu()
            record[f"{name}.out"] = output.detach().cpu()

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        return record, run()
    finally:
        for handle in handles:
            handle.remove()
