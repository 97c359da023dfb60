"""The CUDA path of the torch engine: what runs a step, and the graphs that replay it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from porttool.config import ModelConfig
from porttool.engines.torch.cuda_skinny import Model, Parts, SkinnyChain, append, attend, embed
from porttool.engines.torch.cuda_skinny import merge, pick
from porttool.engines.torch.cuda_state import (
    HISTORY,
    DeviceCache,
    Rows,
    make_rows,
    make_scratch,
    rotary_tables,
)
from porttool.engines.torch.cuda_tuning import (
    SKINNY_ROWS,
    Tuning,
    default_tuning,
    gpu_name,
)
from porttool.engines.torch.cuda_weights import Linear, pack_weights
from porttool.engines.torch.cuda_wide import attend_packed, wide_layers, wide_logits
from porttool.errors import UsageError
from porttool.nn import Step

TOKENS_A_GRAPH = 8
"""Greedy tokens in the long graph; the rest of a request is replayed one by one."""

PREFILL_TOKENS = 16384
"""Prompt tokens that go through the layers together; bounds the activations' memory."""


class CudaDecoder:
    """A decoder on one GPU (or, slowly and for tests, under Triton's interpreter on a CPU).

    weights: the canonical tensors, on any device and in any type; `dtype` float16, bfloat16 or
    float32. `tuning` is what `tune` returned for this model, on this GPU; None takes the rule's
    choice.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        n_slots: int,
        max_len: int,
        device: str = "cuda",
        tuning: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.n_slots, self.max_len = n_slots, max_len
        chosen = default_tuning(config, device) if tuning is None else Tuning.from_dict(tuning)
        self.tuning = chosen
        shape = (config.n_layer, n_slots, config.n_kv_head, max_len, config.head_dim)
        cache = DeviceCache(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))
        self.model = Model(
            config, pack_weights(config, weights, dtype, device), cache,
            *rotary_tables(config, max_len, device), chosen, dtype, device != "cpu",
        )  # fmt: skip
        head = chosen.tiles["head"]
        n_best = -(-config.vocab_size // head.block_n)
        # one step may carry several tokens of a slot, so that rows can outnumber slots
        self.rows = make_rows(max(n_slots, SKINNY_ROWS), device)
        self.scratch = make_scratch(config, SKINNY_ROWS, splits=chosen.splits, n_best=n_best,
                                    dtype=dtype, device=device)  # fmt: skip
        self.chain = SkinnyChain(self.model, self.rows, self.scratch)
        self._table: Tensor | None = None
        self._graphs: dict[tuple[str, int, int], torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, Tensor] = {}
        self._x: dict[int, Tensor] = {}

    @property
    def description(self) -> str:
        """Where it runs and how it is tuned."""
        return f"{gpu_name(self.device)}, Triton kernels and CUDA graphs"



    def order_of(self, name: str) -> Linear:
        """Return the first matrix of a kind: qkv, out, up, down or head."""
        w = self.model.weights
        linear: Linear = w.head if name == "head" else getattr(w.layers[0], name)
        return linear

    def step(self, step: Step, *, all_positions: bool = False) -> Tensor:
        """Feed tokens; float32 logits as the `Runner` contract says. May be overwritten later."""
        packed = _Packed(step)
        if packed.n_tokens <= SKINNY_ROWS:
            logits = self._skinny_step(packed)
        elif packed.width == 1:
            logits = self._wide_step(packed)
        else:
            return self._prefill(packed, all_positions=all_positions)
        return _arrange(logits, packed, all_positions=all_positions)

    def decode(self, step: Step, n_tokens: int) -> Tensor:
        """Feed one token a row, then greedy successors: int64 [n, n_tokens] on the device."""
        packed = _Packed(step)
        if packed.width != 1:
            raise UsageError("decoding on the device starts from one token a row")
        reach = int(step.starts.max()) + n_tokens
        if reach > self.max_len:
            raise UsageError(f"decoding would reach {reach} tokens; a slot holds {self.max_len}")
        n = self._bucket(packed.n_rows)
        self._put(packed, n)
        embed(self.model, self.rows, self._stream_of(n), n, self._table)
        pieces = []
        while n_tokens > 0:
            count = min(n_tokens, HISTORY)
            self.rows.cursor.zero_()
            for size in [TOKENS_A_GRAPH] * (count // TOKENS_A_GRAPH) + [1] * (
                count % TOKENS_A_GRAPH
            ):
                self._replay("greedy", n, size)
            pieces.append(self.rows.history[: packed.n_rows, :count].long())
            n_tokens -= count
        return torch.cat(pieces, dim=1)

    def copy_slots(self, source: list[int], target: list[int]) -> None:
        """Copy whole cache rows, as if at once."""
        where = torch.tensor([source, target], device=self.device)
        self.model.cache.copy_slots(where[0], where[1])

    def load_prompt_table(self, table: Tensor | None) -> None:
        """Use rows of [n_rows, d_model] for ids from vocab_size on; None takes it away."""
        self._table = None if table is None else table.to(self.device, self.dtype).contiguous()

    # ---- steps --------------------------------------------------------------------------------

    def _skinny_step(self, packed: _Packed) -> Tensor:
        n = packed.n_tokens
        self._put(packed, n)
        embed(self.model, self.rows, self.scratch.x, n, self._table)
        self._replay("logits" if packed.width == 1 else "several", n, 1)
        return self._logits_of(n)[:n]

    def _wide_step(self, packed: _Packed) -> Tensor:
        n = self._bucket(packed.n_rows)
        self._put(packed, n)
        embed(self.model, self.rows, self._stream_of(n), n, self._table)
        self._replay("logits", n, 1)
        return self._logits_of(n)[: packed.n_rows]

    def _prefill(self, packed: _Packed, *, all_positions: bool) -> Tensor:
        c = self.config
        width = (packed.width,) if all_positions else ()
        out = torch.zeros(packed.n_rows, *width, c.vocab_size, device=self.device)
        for group in packed.groups(PREFILL_TOKENS):
            rows = group.rows(self.device)
            x = torch.empty(group.n_tokens, c.d_model, device=self.device)
            embed(self.model, rows, x, group.n_tokens, self._table)
            slots, starts, first = group.bounds(self.device)

            def attend_group(layer: int, qkv: Tensor) -> Tensor:
                query = qkv.new_empty(qkv.shape[0], c.n_head * c.head_dim)
                append(self.model, rows, layer, qkv, query, qkv.shape[0])
                return attend_packed(
                    self.model, layer, query, slots, starts, first, group.width
                )

            normed = wide_layers(self.model, x, attend_group)
            if not all_positions:
                last = normed[first[1:].long() - 1]
                out[group.first_row : group.first_row + group.n_rows] = self._project(last)
                continue
            for i, (a, b) in enumerate(group.spans()):
                out[group.first_row + i, : b - a] = self._project(normed[a:b])
        return out

    def _project(self, normed: Tensor) -> Tensor:
        return wide_logits(normed, self.model.weights.head.weight)

    # ---- rows and graphs ----------------------------------------------------------------------

    def _bucket(self, n: int) -> int:
        """Rows of the graph that runs n rows: exact while skinny, rounded up above."""
        if n <= SKINNY_ROWS:
            return n
        step = 8 if n <= 64 else 16
        return min(-(-n // step) * step, max(self.n_slots, n))

    def _put(self, packed: _Packed, n: int) -> None:
        """Write tokens, positions and slots of the rows, padding up to n."""
        block = packed.block(n).to(self.device)
        self.rows.tokens[:n], self.rows.positions[:n], self.rows.slots[:n] = block

    def _stream_of(self, n: int) -> Tensor:
        if n <= SKINNY_ROWS:
            return self.scratch.x
        if n not in self._x:
            self._x[n] = torch.empty(n, self.config.d_model, device=self.device)
        return self._x[n]

    def _logits_of(self, n: int) -> Tensor:
        if n not in self._logits:
            shape = (n, self.config.vocab_size)
            self._logits[n] = torch.empty(shape, device=self.device)
        return self._logits[n]

    def _replay(self, kind: str, n: int, count: int) -> None:
        """Run a captured step, capturing it first if this is its first time."""
        work = self._work(kind, n)
        if self.device == "cpu":
            for _ in range(count):
                work()
            return
        key = (kind, n, count)
        if key not in self._graphs:
            self._graphs[key] = self._capture(work, count)
        self._graphs[key].replay()

    def _capture(self, work: Callable[[], None], count: int) -> torch.cuda.CUDAGraph:
        """Compile and warm up with every row as padding, then record."""
        kept = [t.clone() for t in (self.rows.tokens, self.rows.positions, self.rows.slots,
                                    self.rows.cursor, self.rows.history)]  # fmt: skip
        stream, x = torch.cuda.Stream(), {n: t.clone() for n, t in self._x.items()}
        small = self.scratch.x.clone()
        self.rows.slots.fill_(-1)
        self.rows.positions.zero_()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, old in zip((self.rows.tokens, self.rows.positions, self.rows.slots,
                                self.rows.cursor, self.rows.history), kept, strict=True):  # fmt: skip
            tensor.copy_(old)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                work()
        self.scratch.x.copy_(small)
        for n, old in x.items():
            self._x[n].copy_(old)
        return graph

    def _work(self, kind: str, n: int) -> Callable[[], None]:
        if n <= SKINNY_ROWS:
            return lambda: self._skinny_work(kind, n)
        return lambda: self._wide_work(kind, n)

    def _skinny_work(self, kind: str, n: int) -> None:
        self.chain.layers(n, append=kind != "several")
        if kind == "greedy":
            self.chain.head(n, None)
            self.chain.pick(n)
        else:
            self.chain.head(n, self._logits_of(n))

    def _wide_work(self, kind: str, n: int) -> None:
        c, x = self.config, self._stream_of(n)
        parts = self._wide_parts(n)

        def attend_rows(layer: int, qkv: Tensor) -> Tensor:
            out = qkv.new_empty(n, c.n_head * c.head_dim)
            attend(self.model, self.rows, layer, qkv, out, parts, n)
            if parts.splits > 1:
                merge(self.model, parts, out, n)
            return out

        logits = self._project(wide_layers(self.model, x, attend_rows))
        if kind == "greedy":
            pick(self.model, self.rows, x, n, logits, None)
        else:
            self._logits_of(n).copy_(logits)

    def _wide_parts(self, n: int) -> Parts:
        """Split the context only when rows and heads alone do not fill the GPU."""
        c = self.config
        splits = 1
        while splits < 16 and n * c.n_kv_head * splits < 528:
            splits *= 2
        part = torch.empty(n, c.n_head, splits, c.head_dim, device=self.device)
        top, total = (torch.empty(n, c.n_head, splits, device=self.device) for _ in range(2))
        return Parts(splits, part, top, total)


class _Packed:
    """A step's real tokens, one after the other without padding; all of it on the CPU."""

    def __init__(self, step: Step, first_row: int = 0) -> None:
        self.step, self.first_row = step, first_row
        self.lengths = [int(v) for v in step.lengths]
        self.n_rows, self.n_tokens = len(self.lengths), sum(self.lengths)
        self.width = max(self.lengths)

    def flat(self) -> Tensor:
        """Tokens, positions and slots of the real tokens: int32 [3, n_tokens]."""
        s = self.step
        column = torch.arange(s.tokens.shape[1])
        real = column < s.lengths[:, None]
        slots = s.slots[:, None].expand_as(s.tokens)
        position = s.starts[:, None] + column
        return torch.stack([t[real] for t in (s.tokens, position, slots)]).int()

    def block(self, n: int) -> Tensor:
        """As `flat`, filled up to n columns with padding."""
        out = torch.zeros(3, n, dtype=torch.int32)
        out[2] = -1
        out[:, : self.n_tokens] = self.flat()
        return out

    def rows(self, device: str) -> Rows:
        """The packed tokens as rows on the device."""
        tokens, positions, slots = self.flat().to(device)
        return Rows(tokens, positions, slots, tokens, tokens)

    def spans(self) -> list[tuple[int, int]]:
        """First and past-last packed token of each row."""
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return [(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]

    def bounds(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Slots [n], starts [n] and first packed tokens [n + 1] of the rows, int32."""
        first = torch.tensor([0, *(b for _, b in self.spans())], dtype=torch.int32)
        return (self.step.slots.int().to(device), self.step.starts.int().to(device),
                first.to(device))  # fmt: skip

    def groups(self, limit: int) -> list[_Packed]:
        """Cut into runs of whole rows of at most `limit` tokens, one row at least."""
        out, begin, size = [], 0, 0
        for i, length in enumerate([*self.lengths, limit + 1]):
            if size and size + length > limit:
                s, part = self.step, slice(begin, i)
                cut = Step(s.slots[part], s.tokens[part], s.starts[part], s.lengths[part])
                out.append(_Packed(cut, begin))
                begin, size = i, 0
            size += length
        return out


def _arrange(logits: Tensor, packed: _Packed, *, all_positions: bool) -> Tensor:
    """Give packed logits [tokens, vocab] the contract's shape."""
    if packed.width == 1:
        return logits[:, None] if all_positions else logits
    if not all_positions:
        return logits[[b - 1 for _, b in packed.spans()]]
    out = logits.new_zeros(packed.n_rows, packed.width, logits.shape[1])
    for i, (a, b) in enumerate(packed.spans()):
        out[i, : b - a] = logits[a:b]
    return out
