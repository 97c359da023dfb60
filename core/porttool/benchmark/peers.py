"""Hugging Face's `generate` as a side: eager, and with a static cache and torch.compile."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

import torch
from torch import Tensor

from porttool.benchmark.side import Prompts, Side, SideFailed, Timing
from porttool.evaluators.transformers_folder import load_config, load_model, loading, quiet

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class HuggingFaceModel:
    """A folder's model, loaded when the first of its sides is and shared by them.

    A folder without weights gives random ones of its config's shape.
    """

    def __init__(self, folder: Path, *, dtype: str, device: str) -> None:
        self.folder = folder
        self.dtype = dtype
        self.device = device
        files = [file for pattern in WEIGHTS for file in folder.glob(pattern)]
        self.bytes_on_disk = sum(file.stat().st_size for file in files)
        self._module: Any = None

    @property
    def random_weights(self) -> bool:
        """True where the folder holds a config alone."""
        return not self.bytes_on_disk

    @property
    def module(self) -> Any:
        """The transformers model."""
        if self._module is None:
            kind = getattr(torch, self.dtype)
            if self.random_weights:
                self._module = from_config(self.folder, kind, self.device)
            else:
                self._module = load_model(self.folder, kind).to(self.device)
        return self._module


def from_config(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """Make a model of a config with random weights, on its device."""
    config = load_config(folder)
    from transformers import AutoModelForCausalLM, GenerationConfig

    with loading(folder), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.generation_config = GenerationConfig()
    return model.eval().requires_grad_(False)


class Clock:
    """Notes when tokens are there: a stopping criterion that never stops."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Wait for the step; `generate` is about to wait for it too."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class TransformersSide(Side):
    """`generate` with its defaults: eager, dynamic cache, torch's own attention."""

    name = "HF eager"
    through_torch = True

    def __init__(self, model: HuggingFaceModel) -> None:
        self.model = model
        self.bytes_on_disk = model.bytes_on_disk
        self.random_weights = model.random_weights
        self.how: dict[str, Any] = {}

    def load(self) -> None:
        """Load the model, or find it loaded."""
        try:
            _ = self.model.module
        except torch.OutOfMemoryError as error:
            raise SideFailed(f"out of memory: {error}") from error

    @property
    def description(self) -> str:
        """Version, cache, device and type."""
        import transformers

        made = "random weights" if self.random_weights else "the folder's weights"
        return (
            f"transformers {transformers.__version__} generate, dynamic cache, {self.device}, "
            f"{self.dtype}, {made}"
        )

    @property
    def device(self) -> str:
        """The engine's device."""
        return self.model.device

    @property
    def dtype(self) -> str:
        """The engine's type."""
        return self.model.dtype

    def run(self, prompts: Prompts, output_len: int) -> Timing:
        """Generate, and note when every token was there."""
        clock = Clock(self.device)
        ids = torch.tensor(prompts, device=self.device)
        began = time.perf_counter()
        with torch.inference_mode(), quiet():
            try:
                self._generate(ids, output_len, clock)
            except torch.OutOfMemoryError as error:
                raise SideFailed(f"out of memory: {error}") from error
        total = time.perf_counter() - began
        later = tuple(b - a for a, b in pairwise(clock.times))
        return Timing(clock.times[0] - began, later, total)

    def _generate(self, ids: Tensor, output_len: int, clock: Clock) -> None:
        self.model.module.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=0, do_sample=False,
            max_new_tokens=output_len, min_new_tokens=output_len, stopping_criteria=[clock],
            **self.how,
        )  # fmt: skip


class CompiledSide(TransformersSide):
    """The same with a static cache, so that transformers compiles the decoding step.

    Compiled code of another shape is thrown away before a cell: beyond a few shapes torch would
    go back to eager without a word.
    """

    name = "HF compiled"
    shares_with = TransformersSide.name

    def load(self) -> None:
        """Find the model, and ask for compilation on a CPU too."""
        super().load()
        try:
            from transformers import CompileConfig
        except ImportError as error:
            raise SideFailed(f"this transformers does not compile: {error}") from error
        compiling = CompileConfig()
        compiling._compile_all_devices = True
        self.how = {"cache_implementation": "static", "compile_config": compiling}

    @property
    def description(self) -> str:
        """Version, cache, device and type."""
        return super().description.replace("dynamic cache", "static cache, torch.compile")

    def prepare(self) -> None:
        """Forget the compiled code and the cache's length."""
        torch.compiler.reset()
        vars(self.model.module).pop("_previous_max_cache_length", None)
        vars(self.model.module).pop("_compiled_call", None)
        torch._dynamo.utils.counters.clear()

    def _generate(self, ids: Tensor, output_len: int, clock: Clock) -> None:
        try:
            super()._generate(ids, output_len, clock)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, OSError, SubprocessError) as error:  # torch's and Triton's kinds
            raise SideFailed(f"torch.compile: {first_line(error)}") from error
        if not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
            raise SideFailed("transformers compiled nothing, so this would be eager once more")


def first_line(error: Exception) -> str:
    """Return what an error says first, with its kind."""
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text.strip()}"
