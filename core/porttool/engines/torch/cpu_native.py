"""Calling the compiled decode step: `decode.cpp` as Python sees it."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from porttool.engines.native.head import HeadFields, ScreenedHead
from porttool.engines.native.library import load_library
from porttool.nn import Decoder, KVCache
from porttool.nn.attention import rotary_angles

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "silu")


class LayerFields(ctypes.Structure):
    """Mirrors `Layer` in decode.cpp."""

    _matrices = ("qkv", "out", "up", "down")
    _vectors = (
        "norm1", "norm1_bias", "qkv_bias", "out_bias",
        "norm2", "norm2_bias", "up_bias", "down_bias",
    )  # fmt: skip
    _fields_ = [*((name, c_void_p) for name in _matrices + _vectors), ("scale", c_float)]


class ModelFields(ctypes.Structure):
    """Mirrors `Model` in decode.cpp."""

    _sizes = (
        "n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_ff", "vocab_size",
        "n_positions", "rotary_dim", "n_slots", "capacity", "gated", "activation", "norm",
    )  # fmt: skip
    _pointers = (
        "embedding", "position", "prompt_table", "final_norm", "final_norm_bias",
        "frequencies", "keys", "values",
    )  # fmt: skip
    _fields_ = [
        *((name, c_int64) for name in _sizes),
        ("norm_eps", c_float),
        ("layers", POINTER(LayerFields)),
        *((name, c_void_p) for name in _pointers),
        ("head", HeadFields),
    ]


class TokensFields(ctypes.Structure):
    """Mirrors `Tokens` in decode.cpp."""

    _fields_ = [
        ("n", c_int64),
        ("n_out", c_int64),
        *((name, c_void_p) for name in ("ids", "slots", "positions", "out")),
    ]


class NativeModel:
    """A canonical decoder's weights and cache, as the compiled step sees them.

    Matrices and cache are shared with torch; norms and biases are copied to float32, and the head
    gets an int8 copy that lets greedy decoding skip most of its rows without changing a token.
    """

    def __init__(self, module: Decoder, kv: KVCache) -> None:
        self.library = load_library()
        self.kind = KINDS[kv.keys.dtype]
        self.vocab_size = module.config.vocab_size
        self.kept: list[Tensor] = []
        self.layers = (LayerFields * module.config.n_layer)(
            *(self._layer(module, i) for i in range(module.config.n_layer))
        )
        self.fields = self._model(module, kv)

    def step(self, ids: Tensor, slots: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
        """Feed tokens [n], each row's in order; return float32 logits [len(wanted), vocab_size]."""
        threads = torch.get_num_threads()
        logits = torch.empty(len(wanted), self.vocab_size)
        scratch = self._scratch(len(ids), threads)
        self.library.porttool_step(
            byref(self.fields), byref(tokens_fields(ids, slots, positions, wanted)), self.kind,
            address(scratch), address(logits), threads,
        )  # fmt: skip
        return logits

    def decode(self, ids: Tensor, slots: Tensor, positions: Tensor, n_tokens: int) -> Tensor:
        """Feed a token a row [n], then its greedy successors: [n, n_tokens]."""
        n, threads = len(ids), torch.get_num_threads()
        ids, positions, wanted = ids.clone(), positions.clone(), torch.arange(n)
        scratch, near = self._scratch(n, threads), torch.empty(n, self.vocab_size)
        out = torch.empty(n, n_tokens, dtype=torch.int64)
        self.library.porttool_decode(
            byref(self.fields), byref(tokens_fields(ids, slots, positions, wanted)), self.kind,
            address(ids), address(positions), n_tokens,
            address(scratch), address(near), address(out), threads,
        )  # fmt: skip
        return out

    def load_prompt_table(self, table: Tensor | None) -> None:
        """Use rows in the storage type for ids from vocab_size on."""
        self.table = None if table is None else table.contiguous()
        self.fields.prompt_table = address(self.table)

    def _scratch(self, n: int, threads: int) -> Tensor:
        return torch.empty(self.library.porttool_scratch(byref(self.fields), n, threads))

    def _matrix(self, weight: Tensor) -> int | None:
        self.kept.append(weight.detach())
        return address(weight)

    def _vector(self, weight: Tensor | None, plus: float = 0) -> int | None:
        if weight is None:
            return None
        self.kept.append(weight.detach().to(torch.float32, copy=True) + plus)
        return address(self.kept[-1])

    def _layer(self, module: Decoder, index: int) -> LayerFields:
        layer: Any = module.layers[index]
        attention, mlp = layer.attention, layer.mlp
        linears = {"qkv": attention.qkv, "out": attention.out, "up": mlp.up, "down": mlp.down}
        fields: dict[str, Any] = {"scale": attention.scale}
        for name, linear in linears.items():
            fields[name] = self._matrix(linear.weight)
            fields[f"{name}_bias"] = self._vector(linear.bias)
        for name in ("norm1", "norm2"):
            fields |= self._norm(name, getattr(layer, name))
        return LayerFields(**fields)

    def _norm(self, name: str, norm: Any) -> dict[str, int | None]:
        plus = 1 if norm.kind == "layernorm1p" else 0
        return {name: self._vector(norm.weight, plus), f"{name}_bias": self._vector(norm.bias)}

    def _model(self, module: Decoder, kv: KVCache) -> ModelFields:
        c = module.config
        self.head = ScreenedHead((module.embedding if c.tied_head else module.head).weight)
        same = ("n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_ff", "vocab_size")
        rotary = c.position == "rotary"
        frequencies = rotary_angles(c, torch.ones(1), torch.float32) if rotary else None
        return ModelFields(
            **{name: getattr(c, name) for name in (*same, "n_positions", "gated", "norm_eps")},
            rotary_dim=c.rotary_dim if rotary else 0,
            n_slots=kv.keys.shape[1],
            capacity=kv.keys.shape[3],
            activation=ACTIVATIONS.index(c.activation),
            norm=int(c.norm == "rmsnorm"),
            layers=ctypes.cast(self.layers, POINTER(LayerFields)),
            embedding=self._matrix(module.embedding.weight),
            position=None if rotary else self._matrix(module.position.weight),
            frequencies=self._vector(frequencies),
            keys=self._matrix(kv.keys),
            values=self._matrix(kv.values),
            head=self.head.fields,
            **self._norm("final_norm", module.norm),
        )


def address(tensor: Tensor | None) -> int | None:
    """Return where a contiguous tensor's data lie."""
    return None if tensor is None else tensor.data_ptr()


def tokens_fields(ids: Tensor, slots: Tensor, positions: Tensor, wanted: Tensor) -> TokensFields:
    """Point at the int64 vectors of a step; the caller keeps them alive."""
    return TokensFields(len(ids), len(wanted), *map(address, (ids, slots, positions, wanted)))
