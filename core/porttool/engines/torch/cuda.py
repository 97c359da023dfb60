"""The CUDA path of the torch engine: what runs a step, and the graphs that replay it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from porttool.config import Limits, ModelConfig
from porttool.engines.torch.cuda_chains import ClusterChain, StreamChain, WideChain, graph_sizes
from porttool.engines.torch.cuda_compile import CompilerUnavailable
from porttool.engines.torch.cuda_fallback import prompt_attention, usable
from porttool.engines.torch.cuda_launch import Model, embed
from porttool.engines.torch.cuda_limits import (
    overlaps,
    require_memory,
    shared_bytes,
    unsupported,
)
from porttool.engines.torch.cuda_packed import Packed, arrange
from porttool.engines.torch.cuda_persistent import PersistentRow
from porttool.engines.torch.cuda_prompts import Prompts
from porttool.engines.torch.cuda_rule import default_tuning
from porttool.engines.torch.cuda_state import (
    HISTORY,
    DeviceCache,
    Scratch,
    make_rows,
    make_scratch,
    rotary_tables,
)
from porttool.engines.torch.cuda_tuning import SMALL_ROWS, Tuning, gpu_name, shapes, tile_rows
from porttool.engines.torch.cuda_weights import pack_weights
from porttool.engines.torch.device_decoder import DeviceDecoder
from porttool.errors import EngineError, UsageError
from porttool.nn import Step
from porttool.runner import Choose


class CudaDecoder(DeviceDecoder):
    """A decoder on one GPU (or, slowly and for tests, under Triton's interpreter on a CPU).

    weights: the canonical tensors, on any device and in any type; `dtype` float16, bfloat16 or
    float32. `tuning` is what `tune` returned for this model, on this GPU; None takes the rule's
    choice. Without `graphs` every kernel is launched by itself, each layer's in an NVTX range.
    """

    decodes_on_device = True
    samples_on_device = True

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        limits: Limits,
        device: str = "cuda",
        tuning: Mapping[str, Any] | None = None,
        graphs: bool = True,
    ) -> None:
        super().__init__(config, weights, dtype=dtype, limits=limits)
        reason = unsupported(config, dtype)
        if reason:
            raise EngineError(f"the CUDA kernels cannot run this model: {reason}")
        self.device = device
        given = default_tuning(config, device) if tuning is None else Tuning.from_dict(tuning)
        chosen, hopper = usable(given, config, dtype, device)
        self.graphed = graphs and device != "cpu"
        self.description = f"{gpu_name(device)}, Triton kernels" + " and CUDA graphs" * graphs
        self.description += ", not tuned" * (tuning is None) + hopper
        require_memory(config, dtype, limits, device, given=weights)
        shape = (config.n_layer, self.n_slots, config.n_kv_head, self.max_len, config.head_dim)
        cache = DeviceCache(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))
        prompts, said = prompt_attention(config, cache, device)
        self.description += said
        self.model = Model(
            config, pack_weights(config, weights, dtype, device), cache,
            *rotary_tables(config, self.max_len, device), chosen, dtype, overlaps(device),
            shared_bytes(device), prompts,
        )  # fmt: skip
        # one step may carry several tokens of a slot, so that rows can outnumber slots
        self.rows = make_rows(max(self.n_slots, SMALL_ROWS), device)
        self._table: Tensor | None = None
        self._graphs: dict[tuple[str, int, int], torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, Tensor] = {}
        self._scratch: dict[int, Scratch] = {}
        self._prompts = Prompts(self.model)
        try:
            self.use(chosen)
            self.description += ", one row in a persistent kernel" * bool(self._alone)
        except CompilerUnavailable as error:
            self.description += f", no persistent kernel for one row: {error}"

    def use(self, tuning: Tuning) -> None:
        """Run with another tuning from now on; graphs are captured anew."""
        self.tuning = tuning
        self.model = replace(self.model, tuning=tuning, between={})
        self._graphs.clear()
        self._scratch.clear()
        self._works: dict[tuple[str, int], Callable[[], None]] = {}
        self._alone: PersistentRow | None = None
        if self.graphed and tuning.persistent:
            x = self._scratch_of(1).x[0]
            self._alone = PersistentRow(self.model, self.rows, x, tuning.persistent)

    @torch.inference_mode()
    def rewind(self, n: int, context: int) -> None:
        """Put the first n rows back to a context, for measurements."""
        self.rows.cursor.zero_()
        self.rows.positions[:n] = context

    @torch.inference_mode()
    def replay_greedy(self, n: int, tokens: int) -> None:
        """Replay greedy steps of rows that are in place, for measurements."""
        self._replay("greedy", self._bucket(n), tokens)

    @torch.inference_mode()
    def step(self, step: Step, *, all_positions: bool = False) -> Tensor:
        """Feed tokens; float32 logits as the `Runner` contract says."""
        packed = Packed(step)
        if packed.n_tokens > SMALL_ROWS and packed.width > 1:
            return self._prompts.run(
                packed, self._table, all_positions=all_positions, graphed=self.graphed
            )
        return arrange(self._small_step(packed), packed, all_positions=all_positions)

    @torch.inference_mode()
    def decode(self, step: Step, n_tokens: int) -> Tensor:
        """Feed one token a row, then greedy successors: int64 [n, n_tokens] on the device."""
        n_rows, n = self._begin(step, n_tokens)
        pieces = []
        while n_tokens > 0:
            count = min(n_tokens, HISTORY)
            self.rows.cursor.zero_()
            for size in [count] if n == 1 and self._alone else graph_sizes(count):
                self._replay("greedy", n, size)
            pieces.append(self.rows.history[:n_rows, :count].long())
            n_tokens -= count
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    @torch.inference_mode()
    def sample(self, step: Step, n_tokens: int, choose: Choose) -> Tensor:
        """As `decode`, with tokens that `choose` finds in the logits; waits for nothing."""
        n_rows, n = self._begin(step, n_tokens)
        tokens: list[Tensor] = []
        for i in range(n_tokens):
            if tokens:
                self.rows.tokens[:n_rows] = tokens[-1]
                self.rows.positions[:n_rows] += 1
                self._replay("embed", n, 1)
            self._replay("logits", n, 1)
            tokens.append(choose(self._logits_of(n)[:n_rows], i))
        return torch.stack(tokens, dim=1)

    @torch.inference_mode()
    def copy_slots(self, source: list[int], target: list[int]) -> None:
        """Copy whole cache rows, as if at once."""
        where = torch.tensor([source, target], device=self.device)
        self.model.cache.copy_slots(where[0], where[1])

    def load_prompt_table(self, table: Tensor | None) -> None:
        """Use rows of [n_rows, d_model] for ids from vocab_size on; None takes it away."""
        self._table = None if table is None else table.to(self.device, self.dtype).contiguous()
        self._graphs = {key: made for key, made in self._graphs.items() if key[0] != "embed"}

    # ---- steps --------------------------------------------------------------------------------

    def _small_step(self, packed: Packed) -> Tensor:
        n = self._bucket(packed.n_tokens)
        self._put(packed, n)
        self._replay("logits" if packed.width == 1 else "several", n, 1)
        return self._logits_of(n)[: packed.n_tokens].clone()

    # ---- rows and graphs ----------------------------------------------------------------------

    def _begin(self, step: Step, n_tokens: int) -> tuple[int, int]:
        """Put rows of one token each in place; return how many, and how many the graph has."""
        packed = Packed(step)
        if packed.width != 1:
            raise UsageError("decoding on the device starts from one token a row")
        reach = int(step.starts.max()) + n_tokens
        if reach > self.max_len:
            raise UsageError(f"decoding would reach {reach} tokens; a slot holds {self.max_len}")
        self._put(packed, self._bucket(packed.n_rows))
        return packed.n_rows, self._bucket(packed.n_rows)

    def _bucket(self, n: int) -> int:
        """Rows of the graph that runs n rows: exact while skinny, rounded up above."""
        if n <= SMALL_ROWS:
            return n
        step = 8 if n <= 64 else 16
        return min(-(-n // step) * step, max(self.n_slots, n))

    def _put(self, packed: Packed, n: int) -> None:
        """Write tokens, positions and slots of the rows, padding up to n, and their embeddings."""
        self.rows.fed[:, :n] = packed.block(n)
        self._replay("embed", n, 1)

    def _scratch_of(self, n: int) -> Scratch:
        """Return the buffers of steps of n rows; all steps of up to SMALL_ROWS share theirs."""
        n = max(n, SMALL_ROWS)
        if n not in self._scratch:
            t, tiles = self.tuning, self.tuning.wide[str(tile_rows(n))]
            blocks = [tiles["head"].block_n, t.stream["head"].block_n]
            attention = t.wide_attention[str(tile_rows(n))]
            self._scratch[n] = make_scratch(
                self.config, n, splits=max(t.attention.splits, attention.splits),
                sums=max(tiles[name].split * shapes(self.config)[name][0]
                         for name in ("qkv", "out", "down")),
                n_best=-(-self.config.vocab_size // min(blocks)), dtype=self.dtype,
                device=self.device,
            )  # fmt: skip
        return self._scratch[n]

    def _logits_of(self, n: int) -> Tensor:
        if n not in self._logits:
            self._logits[n] = torch.empty(n, self.config.vocab_size, device=self.device)
        return self._logits[n]

    def _replay(self, kind: str, n: int, count: int) -> None:
        """Run a captured step, capturing it first if this is its first time."""
        if self._alone is not None and n == 1 and kind != "embed":
            self._alone.run(count, None if kind == "greedy" else self._logits_of(1))
            return
        if (kind, n) not in self._works:
            self._works[kind, n] = self._work(kind, n)
        if not self.graphed:
            for _ in range(count):
                self._works[kind, n]()
            return
        if (kind, n, count) not in self._graphs:
            self._graphs[kind, n, count] = self._capture(self._works[kind, n], count)
        self._graphs[kind, n, count].replay()

    def _capture(self, work: Callable[[], None], count: int) -> torch.cuda.CUDAGraph:
        """Compile and warm up with every row as padding, then record."""
        r = self.rows
        state = [r.fed, r.cursor, r.history, *(s.x for s in self._scratch.values())]
        kept = [tensor.clone() for tensor in state]
        r.slots.fill_(-1)
        r.positions.zero_()
        work()
        torch.cuda.synchronize()
        for tensor, old in zip(state, kept, strict=True):
            tensor.copy_(old)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                work()
        return graph

    def _work(self, kind: str, n: int) -> Callable[[], None]:
        """Return what enqueues a step of n rows: logits, several (of a slot), greedy; or embed."""
        scratch = self._scratch_of(n)
        if kind == "embed":
            return lambda: embed(self.model, self.rows, scratch.x, n, self._table)
        wide = ClusterChain if str(tile_rows(n)) in self.tuning.cluster else WideChain
        chain: StreamChain | WideChain = (
            StreamChain(self.model, self.rows, scratch) if n == 1
            else wide(self.model, self.rows, scratch, append=kind != "several")
        )  # fmt: skip
        logits = None if kind == "greedy" else self._logits_of(n)

        def work() -> None:
            chain.layers(n)
            chain.head(n, logits)
            if logits is None:
                chain.pick(n)

        return work
