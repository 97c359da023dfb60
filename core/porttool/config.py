"""Closed models of what a decoder is: its shape, its prompt tables, how to sample from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "silu"]
Norm = Literal["layernorm", "layernorm1p", "rmsnorm"]
Position = Literal["learned", "rotary"]
Dtype = Literal["float64", "float32", "float16", "bfloat16"]
ITEMSIZE = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2,
    "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
"""Bytes of an element, by torch's name of its type."""

HALF: tuple[Dtype, ...] = ("float16", "bfloat16")
"""Types of 16 bits, whose rounding hides small mistakes."""

MAX_DIMENSION = 1 << 24
"""No dimension of a language model comes near this; a larger one is a damaged or hostile file."""


def dtype_name(dtype: object) -> str:
    """Return the name of one of torch's types, as `float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")


class Closed(BaseModel):
    """A frozen model that refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


EXTREME = 1e6
"""Penalties beyond this, and temperatures below its inverse, take logits out of float32's range."""

Penalty = Annotated[float, Field(ge=-EXTREME, le=EXTREME)]

LengthPenalty = Annotated[float, Field(ge=-32, le=32)]
"""An exponent of lengths: beyond this, no float holds what it makes of a long one."""

BEAM_OPTIONS = ("length_penalty", "early_stopping")
"""Options that only beam search has a use for."""


def refuse_idle(options: BaseModel, names: Sequence[str], cure: str) -> None:
    """Raise ValueError for those of the named fields that are not at their defaults."""
    fields = type(options).model_fields
    if idle := ", ".join(n for n in names if getattr(options, n) != fields[n].default):
        raise ValueError(f"{idle} would change nothing; {cure}")


class ModelConfig(Closed):
    """The shape of a decoder-only transformer: everything that changes its arithmetic.

    Weights are [out, in]. The fused projection `attention.qkv` has rows q | k | v, each head after
    head; a gated MLP's `mlp.up` has rows gate (activated) | linear. `layernorm1p` stores its
    weight minus one. Query and key are rotated in halves (GPT-NeoX order) over the first
    `rotary_fraction` of each head.
    """

    vocab_size: PositiveInt = Field(le=MAX_DIMENSION)
    n_positions: PositiveInt = Field(le=MAX_DIMENSION)
    n_layer: PositiveInt = Field(le=1024)
    n_head: PositiveInt = Field(le=MAX_DIMENSION)
    n_kv_head: PositiveInt = Field(le=MAX_DIMENSION)
    head_dim: PositiveInt = Field(le=MAX_DIMENSION)
    d_model: PositiveInt = Field(le=MAX_DIMENSION)
    d_ff: PositiveInt = Field(le=MAX_DIMENSION)
    activation: Activation
    gated: bool = False
    norm: Norm = "layernorm"
    norm_eps: PositiveFloat = 1e-5
    position: Position = "learned"
    rotary_fraction: float = Field(default=1.0, gt=0, le=1)
    rotary_base: PositiveFloat = 10000.0
    attention_scale: PositiveFloat
    inverse_layer_scale: bool = False
    upcast_attention: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    tied_head: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}"
            )
        if self.n_head * self.head_dim > MAX_DIMENSION:
            raise ValueError(f"n_head {self.n_head} times head_dim {self.head_dim} is no dimension")
        if self.position == "rotary" and self.rotary_dim % 2:
            raise ValueError(f"rotary dimension {self.rotary_dim} is odd")
        if self.norm == "rmsnorm" and self.norm_bias:
            raise ValueError("rmsnorm has no bias: set norm_bias to false")
        return self

    @property
    def rotary_dim(self) -> int:
        """Leading elements of each head that are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of queries, of keys and of values in the fused projection."""
        kv = self.n_kv_head * self.head_dim
        return self.n_head * self.head_dim, kv, kv

    @property
    def qkv_dim(self) -> int:
        """Rows of the fused query, key and value projection."""
        return sum(self.qkv_rows)

    @property
    def up_dim(self) -> int:
        """Rows of the MLP's first projection, both halves of a gated one."""
        return self.d_ff * (2 if self.gated else 1)

    def layer_scale(self, layer: int) -> float:
        """Factor on the query-key product of the layer with this zero-based index."""
        return self.attention_scale / (layer + 1 if self.inverse_layer_scale else 1)


class SpecialTokens(Closed):
    """Ids with a meaning: where text begins, every id that ends it, and what fills a batch."""

    bos: int | None = Field(default=None, ge=0)
    eos: tuple[int, ...] = ()
    pad: int | None = Field(default=None, ge=0)


class PromptTemplate(Closed):
    """How an instruction model wants to be asked.

    `plain` holds `{instruction}`; `with_input` also holds `{input}`. `answer_marker` is the last
    line of both: what follows it is the answer.
    """

    plain: str
    with_input: str
    answer_marker: str


class InfillTokens(Closed):
    """The tokens, as text, around what an infilling model is to fill in (Bavarian et al. 2022)."""

    prefix: str
    middle: str
    suffix: str

    def prompt(self, before: str, after: str) -> str:
        """Return the prompt that asks for what belongs between: prefix, suffix, middle."""
        return f"{self.prefix}{before}{self.suffix}{after}{self.middle}"


class PromptTableConfig(Closed):
    """A prompt table's shape: one run of virtual tokens for each task."""

    tasks: tuple[str, ...] = Field(min_length=1)
    lengths: tuple[PositiveInt, ...]
    d_model: PositiveInt
    dtype: Dtype

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.tasks) != len(self.lengths) or len(set(self.tasks)) != len(self.tasks):
            raise ValueError("every task needs one length and a name of its own")
        return self

    @property
    def n_rows(self) -> int:
        """Virtual tokens over all tasks."""
        return sum(self.lengths)


class Limits(Closed):
    """What an engine is built for; a request beyond any of these is refused before it runs."""

    max_batch_size: PositiveInt = Field(default=8, le=MAX_DIMENSION)
    max_input_len: PositiveInt = Field(le=MAX_DIMENSION)
    max_output_len: PositiveInt = Field(le=MAX_DIMENSION)
    max_beam_width: PositiveInt = Field(default=8, le=MAX_DIMENSION)
    max_prompt_rows: int = Field(default=0, ge=0, le=MAX_DIMENSION)

    @property
    def max_len(self) -> int:
        """Tokens that one row of the KV cache holds."""
        return self.max_input_len + self.max_output_len


class Sampling(Closed):
    """How the next token is chosen, and when to stop.

    With `temperature` 0 (the default) decoding is greedy. `num_beams` above 1 selects beam
    search, whose score is the sum of log-probabilities divided by length ** `length_penalty`.
    `stop` are strings, `bad_words` token sequences that must not appear. `seed` is a signed 64-bit
    number, of which greedy decoding and beams draw nothing; other numbers are finite.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    max_new_tokens: PositiveInt = 64
    min_new_tokens: int = Field(default=0, ge=0)
    ignore_eos: bool = False
    temperature: float = Field(default=0.0, ge=0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    repetition_penalty: float = Field(default=1.0, ge=1 / EXTREME, le=EXTREME)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop: tuple[str, ...] = ()
    num_beams: PositiveInt = 1
    num_return_sequences: PositiveInt = 1
    length_penalty: LengthPenalty = 1.0
    early_stopping: bool = False
    logprobs: bool = False
    keep_logits: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens {self.max_new_tokens}"
            )
        if 0 < self.temperature < 1 / EXTREME:
            raise ValueError(
                f"temperature {self.temperature:g} is below {1 / EXTREME:g}: set it to 0, which "
                "takes the likeliest token"
            )
        if self.num_beams == 1 and self.num_return_sequences > 1 and not self.temperature:
            raise ValueError("num_return_sequences needs a temperature: greedy results are equal")
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise ValueError("num_return_sequences exceeds num_beams")
        if self.num_beams > 1 and self.stop:
            raise ValueError("beam search does not end at stop strings: set num_beams to 1")
        if not all(self.bad_words) or not all(self.stop):
            raise ValueError("an empty bad word or stop string would match everywhere")
        of_sampling = ("top_k", "top_p", "min_p")
        if self.num_beams > 1:
            cure = "leave that out: beam search does not sample"
            refuse_idle(self, ("temperature", *of_sampling), cure)
        else:
            refuse_idle(self, BEAM_OPTIONS, "set num_beams above 1")
        if not self.temperature:
            cure = "set temperature above 0: without it the likeliest token is taken"
            refuse_idle(self, of_sampling, cure)
        return self

    @property
    def adjusts(self) -> bool:
        """True when logits are changed before a token is chosen from them."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.bad_words
            or self.min_new_tokens
        )
