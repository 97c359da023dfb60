"""The CPU path of the torch engine: prefill in torch, decode in compiled code.

Prefill is bound by arithmetic, which torch's matrix products do well; a decode step is bound by
reading the weights, and what surrounds them costs torch more than the reading itself. Where no
compiler is, plain torch does both, and the description says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from porttool.config import Limits, ModelConfig, dtype_name
from porttool.engines.native.library import NativeUnavailable
from porttool.engines.torch.cpu_native import KINDS, NativeModel
from porttool.engines.torch.device_decoder import DeviceDecoder
from porttool.errors import UsageError
from porttool.nn import Decoder, KVCache, Step, meta_decoder
from porttool.nn.decoder import Layer

NATIVE_TOKENS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 16}
"""Tokens of a step up to which compiled code is faster than torch: see bench/cpu_decode.py."""
WIDE_ROWS = 16
"""Rows of a product from which reading a matrix in float32 costs less than it saves."""
READ_AT_ONCE = 1 << 32
"""Bytes of weights that decoding reads before the host sees the tokens: some 200 ms."""


class WideLinear(nn.Linear):
    """A linear map in float32 of what is stored in float16, for processors that multiply no such.

    torch widens there as well, at a quarter of the speed; few rows are as fast either way.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features], in the type of x."""
        if x.numel() < WIDE_ROWS * x.shape[-1]:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)


def widen(module: nn.Module, dtype: torch.dtype) -> None:
    """Let a module's linear maps be wide ones where torch's products in float16 are the slow ones.

    Those are oneDNN's without the processor's help; other libraries are left to themselves.
    """
    slow = torch.backends.mkldnn.is_available() and not multiplies_float16()
    if dtype is torch.float16 and slow:
        for part in module.modules():
            if type(part) is nn.Linear:
                part.__class__ = WideLinear


def multiplies_float16() -> bool:
    """Whether oneDNN has instructions of the processor for float16."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


@dataclass(frozen=True)
class Plan:
    """Where a step's tokens go in the cache, and which keys they see.

    rows       [n_real] row of each real token; `columns` its place in the row
    places     [n_real] position of each real token
    slots      the rows' cache slots, as a slice where they are neighbours: no copy is made then
    reach      keys that the furthest token sees
    mask       [n, 1, width, reach], True where a query sees a key; None for plain causal order
    fresh      whether the rows begin with this step, and none is padded
    """

    step: Step
    rows: Tensor
    columns: Tensor
    places: Tensor
    slots: slice | Tensor
    reach: int
    mask: Tensor | None
    fresh: bool

    @classmethod
    def of(cls, step: Step) -> Plan:
        """Work it out once for all layers."""
        n, width = step.tokens.shape
        positions, reach = step.positions, int((step.starts + step.lengths).max())
        rows, columns = step.real
        begin = not step.starts.any()
        whole = width == 1 and bool((positions == reach - 1).all())
        first = int(step.slots[0])
        neighbours = step.slots.equal(torch.arange(first, first + n))
        return cls(
            step, rows, columns, positions[rows, columns],
            slice(first, first + n) if neighbours else step.slots, reach,
            None if begin or whole else torch.arange(reach) <= positions[:, None, :, None],
            begin and len(rows) == n * width,
        )  # fmt: skip


class CpuDecoder(DeviceDecoder):
    """A decoder on the CPU, in any type. `native` false keeps to plain torch."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        limits: Limits,
        native: bool = True,
    ) -> None:
        super().__init__(config, weights, dtype=dtype, limits=limits)
        self.module: Decoder = meta_decoder(config).eval().requires_grad_(False)
        self.module.load_state_dict(
            {name: w.to(dtype).contiguous() for name, w in weights.items()}, assign=True
        )
        widen(self.module, dtype)
        self.cache = KVCache(config, self.n_slots, self.max_len, dtype=dtype)
        self.native: NativeModel | None = None
        try:
            self.native = self._compiled(native)
            self.description = "cpu, compiled decode"
        except NativeUnavailable as reason:
            self.description = f"cpu, plain torch ({reason})"
        self.decodes_on_device = self.native is not None
        n_bytes = sum(weight.nbytes for weight in self.module.parameters())
        self.tokens_at_once = min(self.tokens_at_once, max(1, READ_AT_ONCE // n_bytes))

    @torch.inference_mode()
    def step(self, step: Step, *, all_positions: bool) -> Tensor:
        """Run a few tokens in compiled code, many in torch."""
        self._check_ids(step)
        self.cache.begin(step)
        plan = Plan.of(step)
        if self.native is None or len(plan.rows) > NATIVE_TOKENS[self.dtype]:
            return self._torch_step(plan, all_positions=all_positions)
        last = torch.arange(len(plan.rows)) if all_positions else step.lengths.cumsum(0) - 1
        tokens, slots = step.tokens[plan.rows, plan.columns], step.slots[plan.rows]
        logits = self.native.step(tokens, slots, plan.places, last)
        if not all_positions:
            return logits
        out = logits.new_empty(*step.tokens.shape, self.config.vocab_size)
        out[plan.rows, plan.columns] = logits
        return out

    @torch.inference_mode()
    def decode(self, step: Step, n_tokens: int) -> Tensor:
        """Decode greedily; larger batches than compiled code is good for go step by step.

        A large model gives fewer tokens at a time, which the host then need not wait for.
        Raises UsageError for what the cache does not hold: compiled code would write elsewhere.
        """
        self._check_ids(step)
        n_tokens = min(n_tokens, self.tokens_at_once)
        reach, slot = int(step.starts.max()) + n_tokens, int(step.slots.max())
        if reach > self.max_len or slot >= self.n_slots:
            raise UsageError(
                f"decoding would reach {reach} tokens in slot {slot}; "
                f"there are {self.n_slots} slots of {self.max_len}"
            )
        if self.native is not None and len(step.slots) <= NATIVE_TOKENS[self.dtype]:
            ends = (step.starts + n_tokens).tolist()
            self.cache.prepare(step.slots.tolist(), step.starts.tolist(), ends)
            return self.native.decode(
                step.tokens[:, 0].contiguous(), step.slots, step.starts, n_tokens
            )
        out = torch.empty(len(step.slots), n_tokens, dtype=torch.int64)
        for i in range(n_tokens):
            out[:, i] = self.step(step, all_positions=False).argmax(-1)
            step = Step(step.slots, out[:, i : i + 1], step.starts + 1, step.lengths)
        return out

    def copy_slots(self, source: list[int], target: list[int]) -> None:
        """Copy whole cache rows."""
        self.cache.copy_slots(torch.tensor(source), torch.tensor(target))

    def load_prompt_table(self, table: Tensor | None) -> None:
        """Keep the rows in the engine's type."""
        self.module.prompt_table = None if table is None else table.to("cpu", self.dtype)
        if self.native is not None:
            self.native.load_prompt_table(self.module.prompt_table)

    def _compiled(self, wanted: bool) -> NativeModel:
        if not wanted:
            raise NativeUnavailable("as asked")
        if self.dtype not in KINDS:
            raise NativeUnavailable(f"no compiled code for {dtype_name(self.dtype)}")
        return NativeModel(self.module, self.cache)

    def _check_ids(self, step: Step) -> None:
        table = self.module.prompt_table
        top = self.config.vocab_size + (0 if table is None else len(table))
        if not 0 <= int(step.tokens.min()) <= int(step.tokens.max()) < top:
            raise UsageError(
                f"token ids run from {int(step.tokens.min())} to {int(step.tokens.max())}, "
                f"but the model's from 0 to {top - 1}"
            )

    def _torch_step(self, plan: Plan, *, all_positions: bool) -> Tensor:
        step, module = plan.step, self.module
        positions = step.positions
        x = module.embed(step.tokens, positions)  # [n, width, d_model]
        for index in range(self.config.n_layer):
            layer: Layer = module.layers[index]  # type: ignore[assignment]
            last = index + 1 == self.config.n_layer and not all_positions and x.shape[1] > 1
            ends = step.lengths - 1 if last else None
            attended = self._attend(layer, layer.norm1(x), positions, plan, ends)
            x = (x if ends is None else x[torch.arange(len(x)), ends, None]) + attended
            x = x + layer.mlp(layer.norm2(x))
        logits = module.logits(module.norm(x if all_positions else x[:, 0]))
        return logits.to(torch.promote_types(self.dtype, torch.float32))

    def _attend(
        self, layer: Layer, x: Tensor, positions: Tensor, plan: Plan, ends: Tensor | None
    ) -> Tensor:
        """Attention [n, width, d_model] of all positions, or [n, 1, d_model] of the n at `ends`.

        The last layer's others are of no use where only the last tokens' logits are wanted.
        """
        attention = layer.attention
        query, key, value = attention.project(x, positions)
        keys, values = (c[attention.layer] for c in (self.cache.keys, self.cache.values))
        where = (plan.step.slots[plan.rows], slice(None), plan.places)
        keys[where] = key[plan.rows, :, plan.columns]
        values[where] = value[plan.rows, :, plan.columns]
        if not plan.fresh:  # otherwise everything there is to see is in this step
            key = keys[plan.slots, :, : plan.reach]
            value = values[plan.slots, :, : plan.reach]
        mask = plan.mask
        if ends is not None:
            query = query[torch.arange(len(query)), :, ends, None]
            mask = torch.arange(key.shape[2]) <= (plan.step.starts + ends)[:, None, None, None]
        mixed = F.scaled_dot_product_attention(
            query, key, value,
            attn_mask=mask,
            is_causal=mask is None and query.shape[2] > 1,
            scale=attention.scale,
            enable_gqa=self.config.n_head != self.config.n_kv_head,
        )  # [n, n_head, width, head_dim]  # fmt: skip
        return attention.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
