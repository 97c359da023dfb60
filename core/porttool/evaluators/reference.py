"""The Hugging Face side: the source itself, run by transformers on the very same token ids."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from porttool.config import Dtype
from porttool.device import Device, choose_device
from porttool.evaluators.results import Candidate, Continuation, Decoding
from porttool.evaluators.transformers_folder import load_model, quiet
from porttool.huggingface_export import MARK

if TYPE_CHECKING:
    from torch import Tensor, nn

N_CANDIDATES = 10
"""Alternatives kept of every step, to tell a tie with any of them from a real difference."""

NEAR = 1.0
"""Candidates beyond the second are kept only if they are this near to the best, in log p."""

EDGE = 1 << 20
"""Bytes at either end of a weight file that its fingerprint covers."""


class ReferenceModel:
    """The source in transformers, of the given type, on one device.

    Ids from the vocabulary's size on are `rows` of a prompt table, [n_rows, d_model].

    Raises MissingExtra without transformers, SourceError for a folder that it cannot load whole.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: Dtype = "float32",
        device: Device = "auto",
        rows: Tensor | None = None,
    ) -> None:
        import torch

        from porttool.evaluators.virtual import extend_embedding

        self.device = choose_device(device)
        self.dtype = dtype
        self.folder = folder
        self._model = load_model(folder, getattr(torch, dtype)).to(self.device)
        if rows is not None:
            extend_embedding(self._model, rows)

    @property
    def description(self) -> str:
        """Which library, of which version, on which device and in which type."""
        import transformers

        own = ", of porttool's own export" if (self.folder / MARK).is_file() else ""
        return f"transformers {transformers.__version__} on {self.device}, {self.dtype}{own}"

    def generate(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, *, batch_size: int = 8
    ) -> list[Continuation]:
        """Continue every prompt: all `batches` of them."""
        return [c for batch in self.batches(prompts, decoding, batch_size) for c in batch]

    def batches(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, batch_size: int
    ) -> Iterator[list[Continuation]]:
        """Continue prompts, greedily or by beams; yield each batch when it is done.

        Batches are padded on the left, with a mask. Greedy steps keep the log-probabilities of
        the best candidates.
        """
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            yield self._generate_batch([list(prompt) for prompt in batch], decoding)

    def first_token_seconds(self, prompts: Sequence[Sequence[int]], decoding: Decoding) -> float:
        """Median time from one prompt to its first token, after one more as a warm-up."""
        one = decoding.model_copy(update={"max_new_tokens": 1, "num_beams": 1})
        return median_seconds(lambda p: self.generate([p], one), prompts)

    def logits(self, tokens: Sequence[int], positions: Sequence[int] | None = None) -> Tensor:
        """Teacher-forced logits [len(tokens), vocab_size] of one row, on the CPU.

        Of some `positions` alone, if they are given, which takes less memory.
        """
        import torch

        ids = torch.tensor([list(tokens)], device=self.device)
        kept = {"logits_to_keep": torch.tensor(positions, device=self.device)} if positions else {}
        with torch.inference_mode(), quiet():
            out = self._model(input_ids=ids, **kept).logits[0]
        wide: Tensor = out.to(torch.promote_types(out.dtype, torch.float32)).cpu()
        return wide

    def trace(self, tokens: Sequence[int], modules: Mapping[str, str]) -> dict[str, Tensor]:
        """Run one row; return what went into and came out of modules (canonical name → source)."""
        import torch

        from porttool.nn.trace import record_calls

        found = self.find_modules(modules)
        ids = torch.tensor([list(tokens)], device=self.device)
        with torch.inference_mode(), quiet():
            record, logits = record_calls(found, lambda: self._model(input_ids=ids).logits)
        return {**record, "logits": logits.cpu()}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every module's own weight by its name; a tied head's is the embedding's."""
        for name, weight in self._model.named_parameters():
            if name.endswith(".weight"):
                yield name.removesuffix(".weight"), weight

    def find_modules(self, names: Mapping[str, str]) -> dict[str, nn.Module]:
        """Return the modules whose full name is, or ends in, the name given."""
        modules = dict(self._model.named_modules())
        found: dict[str, nn.Module] = {}
        for canonical, name in names.items():
            full = [m for m in modules if m == name or m.endswith(f".{name}")]
            if len(full) == 1:
                found[canonical] = modules[full[0]]
        return found

    def _generate_batch(self, prompts: list[list[int]], decoding: Decoding) -> list[Continuation]:
        import torch

        pad = decoding.eos[0] if decoding.eos else 0
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        recorder = Recorder() if decoding.num_beams == 1 else None
        with torch.inference_mode(), quiet():
            out = self._model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                generation_config=generation_config(decoding, pad),
                logits_processor=[recorder] if recorder else [],
            )
        rows = out.sequences[:, width:].tolist()
        if recorder is not None:
            return recorder.continuations(rows, decoding.eos)
        scores = out.sequences_scores.tolist()
        cuts = [cut(row, decoding.eos) for row in rows]
        return [
            Continuation(tokens=tuple(tokens), ended=ended, score=score)
            for (tokens, ended), score in zip(cuts, scores, strict=True)
        ]


class Recorder:
    """Keeps the best candidates of every step; a logits processor that changes nothing."""

    def __init__(self) -> None:
        self._steps: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Record from scores [n, vocab_size]."""
        import torch

        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        best = wide.topk(min(N_CANDIDATES, wide.shape[-1]))
        logprobs = best.values - wide.logsumexp(-1, keepdim=True)
        self._steps.append((best.indices, logprobs))
        return scores

    def continuations(self, rows: list[list[int]], eos: tuple[int, ...]) -> list[Continuation]:
        """Return every row up to its end token, with what was recorded on the way."""
        import torch

        ids = torch.stack([i for i, _ in self._steps], dim=1).tolist()  # [n, steps, candidates]
        logprobs = torch.stack([p for _, p in self._steps], dim=1).tolist()
        results = []
        for row, row_ids, row_logprobs in zip(rows, ids, logprobs, strict=True):
            tokens, ended = cut(row, eos)
            steps = list(zip(row_ids, row_logprobs, strict=True))[: len(tokens) + ended]
            candidates = tuple(near_best(*step) for step in steps)
            chosen = tuple(c[0].logprob for c in candidates[: len(tokens)])
            results.append(
                Continuation(
                    tokens=tuple(tokens), ended=ended, logprobs=chosen, candidates=candidates
                )
            )
        return results


def near_best(tokens: list[int], logprobs: list[float]) -> tuple[Candidate, ...]:
    """Return a step's two best candidates, and those that come near the best."""
    pairs = [Candidate(t, round(p, 7)) for t, p in zip(tokens, logprobs, strict=True)]
    return tuple(c for i, c in enumerate(pairs) if i < 2 or c.logprob > pairs[0].logprob - NEAR)


def cut(row: list[int], eos: tuple[int, ...]) -> tuple[list[int], bool]:
    """Return a row before its first end token, and whether there was one."""
    end = next((i for i, token in enumerate(row) if token in eos), None)
    return (row, False) if end is None else (row[:end], True)


def median_seconds(
    run: Callable[[Sequence[int]], Any], prompts: Sequence[Sequence[int]], most: int = 5
) -> float:
    """Median seconds of a call over the first prompts, after one call that does not count."""
    run(prompts[0])
    times = []
    for prompt in prompts[:most]:
        began = time.perf_counter()
        run(prompt)
        times.append(time.perf_counter() - began)
    return median(times)


def generation_config(decoding: Decoding, pad: int) -> Any:
    """Say in transformers' words how to decode, leaving nothing to a checkpoint's own defaults."""
    from transformers import GenerationConfig

    beams: dict[str, Any] = {}
    if decoding.num_beams > 1:
        beams = {
            "length_penalty": decoding.length_penalty,
            "early_stopping": decoding.early_stopping,
            "output_scores": True,
        }
    return GenerationConfig(
        do_sample=False,
        num_beams=decoding.num_beams,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=list(decoding.eos) or None,
        pad_token_id=pad,
        return_dict_in_generate=True,
        **beams,
    )


def fingerprint_model(folder: Path) -> str:
    """Return a hash of a folder's config and of the size and both ends of every weight file.

    It is the same on every machine, and costs little whatever the model's size.
    """
    total = hashlib.sha256((folder / "config.json").read_bytes())
    for pattern in ("*.safetensors", "*.bin"):
        for path in sorted(folder.glob(pattern)):
            size = path.stat().st_size
            total.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                total.update(file.read(EDGE))
                file.seek(max(0, size - EDGE))
                total.update(file.read())
    return total.hexdigest()
