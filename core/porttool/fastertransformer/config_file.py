"""config.ini: FasterTransformer's keys, early TensorRT-LLM's, and a section that is ours.

Interpolation is off: a `%` in a path is a `%`. Values are what `str` made of Python's, so that
`None` and `True` are to be read back as such.
"""

from __future__ import annotations

import ast
import configparser
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from porttool.component import explain
from porttool.config import Activation, Closed, Dtype, ModelConfig, SpecialTokens
from porttool.converter import validated
from porttool.errors import SourceError
from porttool.gpt2_layout import ACTIVATIONS, GATED, read_gpt2_config
from porttool.huggingface import SourceConfig, check_special_ids
from porttool.sources.json_file import MAX_DIGITS, parse_json

CONFIG = "config.ini"
MAX_CONFIG = 1 << 20
MAX_VALUE = 1000
"""Characters of a value that is more than text."""

DTYPES: dict[str, Dtype] = {
    "float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "float64": "float64",
    "fp32": "float32", "fp16": "float16", "bf16": "bfloat16",
}  # fmt: skip

NAMES: dict[tuple[Activation, bool], str] = {
    ("gelu", False): "gelu", ("gelu_tanh", False): "gelu_new", ("quick_gelu", False): "quick_gelu",
    ("relu", False): "relu", ("relu2", False): "squared-relu", ("silu", False): "silu",
    ("silu", True): "swiglu", ("gelu", True): "geglu", ("gelu_tanh", True): "geglu",
    ("relu", True): "reglu",
}  # fmt: skip

RENAMES = {
    "head_num": "n_head", "num_layer": "n_layer", "max_pos_seq_len": "n_positions",
    "inter_size": "n_inner", "layernorm_eps": "layer_norm_epsilon", "start_id": "bos_token_id",
    "end_id": "eos_token_id", "weight_data_type": "storage_dtype",
}  # fmt: skip
"""FasterTransformer's keys → the ones that TensorRT-LLM took over from Hugging Face."""

INERT = (
    "model_name", "out_dir", "in_file", "processes", "calibrate_kv_cache", "smoothquant", "model",
    "storage_type", "dataset_cache_dir", "load_model_on_cpu", "convert_model_on_cpu", "verbose",
    "load_checkpoints_on_gpu", "prompt_num_tasks", "prompt_max_vocab_size", "name_or_path",
    "multi_query", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32",
    "max_batch_size", "max_sequence_length", "inference_runner", "pre_allocate_kv_cache",
    "pad_key_length", "validate_runner_input", "auto_map", "attention_head_type", "size_per_head",
    "adapter_inter_size", "saved_dir", "trained_gpu_num", "infer_gpu_num",
    "trained_tensor_parallel_size", "infer_tensor_parallel_size",
)  # fmt: skip
"""Arguments of the conversion, and attributes of Hugging Face's configs about how it was run."""


class FolderConfig(Closed):
    """What config.ini says; `tensor_parallel` is None where it does not say that.

    Our section [porttool] is all of this, so that nothing is lost that the other keys cannot say.
    """

    config: ModelConfig
    tokens: SpecialTokens
    dtype: Dtype
    tensor_parallel: int | None


def read_folder_config(file: Path, *, has_head: bool) -> FolderConfig:
    """Read config.ini; a head file makes the head its own, whatever the keys say of tying."""
    parser = read_ini(file)
    values = {key: literal(value) for key, value in parser["gpt"].items()}
    if parser.has_section("porttool"):
        return read_own(file, parser["porttool"], values)
    if "head_num" in values and "n_embd" not in values:
        values["n_embd"] = product(file, values, "head_num", "size_per_head")
    values = renamed(file, values)
    ranks = values.pop("tensor_para_size", None) or values.pop("tensor_parallelism", None)
    if ranks is not None and (type(ranks) is not int or ranks < 1):
        raise SourceError(f"{file}: {ranks!r:.80} tensor-parallel ranks cannot be")
    source = SourceConfig(values, file)
    source.ignore(*INERT, "tensor_parallelism", *(k for k in values if k.startswith("_")))
    if not has_head and not source.flag("tie_word_embeddings", True):
        raise SourceError(
            f"{file.parent / 'model.lm_head.weight.bin'}: the file is missing, and {file.name} "
            "says that the head is not the embedding"
        )
    model = validated(file, lambda: read_model(source, tied=not has_head))
    dtype = source.one_of("storage_dtype", DTYPES, "float32")
    source.finish()
    ids = {key: values.get(f"{key}_token_id") for key in ("bos", "eos", "pad")}
    tokens = check_special_ids(ids, model.vocab_size, file)
    return FolderConfig(config=model, tokens=tokens, dtype=dtype, tensor_parallel=ranks)


def renamed(file: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values under Hugging Face's keys; two keys of one meaning may not disagree."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = RENAMES.get(key, key)
        said = DTYPES.get(str(value), value) if name == "storage_dtype" else value
        if None not in (said, found.get(name)) and said != found[name]:
            both = " and ".join(k for k in values if RENAMES.get(k, k) == name)
            raise SourceError(f"{file}: {both} disagree, though they mean the same; correct one")
        found[name] = found.get(name) if said is None else said
    return found


def read_model(source: SourceConfig, *, tied: bool) -> ModelConfig:
    """Read GPT-2's keys and what TensorRT-LLM added to them."""
    if not source.flag("do_layer_norm_before", True):
        raise SourceError(f"{source.file}: norms after the layers are another model's")
    if source.flag("has_adapters", False):
        raise SourceError(f"{source.file}: 'has_adapters' is true, and porttool has no adapters")
    model = read_gpt2_config(
        source,
        n_kv_head=1 if source.flag("multi_query_mode", False) else None,
        activations={**ACTIVATIONS, **GATED, "squared-relu": "relu2"},
    )
    rotary = source.number("rotary_pct", 0.0)
    bias = source.flag("bias", True)
    return ModelConfig.model_validate({
        **model.model_dump(),
        "gated": source.take("activation_function", "gelu_new") in GATED,
        "d_ff": source.integer("intermediate_size", model.d_ff),
        "position": "rotary" if rotary else "learned",
        "rotary_fraction": rotary or 1.0,
        "rotary_base": source.number("rotary_base", 10000.0),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bias,
        "tied_head": tied,
    })  # fmt: skip


def read_own(file: Path, section: Mapping[str, str], gpt: Mapping[str, Any]) -> FolderConfig:
    """Read our section, and hold the other to it: someone may have edited that one."""
    try:
        own = FolderConfig.model_validate({key: parse_json(text) for key, text in section.items()})
    except ValidationError as error:
        raise SourceError(f"{file}: [porttool] is damaged: {explain(error)}") from error
    except ValueError as error:
        raise SourceError(f"{file}: [porttool] is damaged: {error}") from error
    ours = {k: literal(v) for k, v in gpt_section(own).items()}
    if wrong := sorted(k for k in ours if gpt.get(k) != ours[k]):
        raise SourceError(
            f"{file}: [gpt] and [porttool] disagree about {', '.join(wrong)}; take the section "
            "[porttool] away if the other was changed on purpose"
        )
    return own


def format_config(own: FolderConfig) -> str:
    """Return the text of config.ini."""
    parser = configparser.ConfigParser(interpolation=None)
    parser["gpt"] = gpt_section(own)
    parser["porttool"] = {k: json.dumps(v) for k, v in own.model_dump(mode="json").items()}
    text = io.StringIO()
    parser.write(text)
    return text.getvalue()


def gpt_section(own: FolderConfig) -> dict[str, str]:
    """Return the keys that FasterTransformer and TensorRT-LLM read."""
    c = own.config
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    eos = own.tokens.eos[0] if own.tokens.eos else None
    values: dict[str, object] = {
        "n_embd": c.d_model,
        "n_head": c.n_head,
        "n_layer": c.n_layer,
        "n_positions": c.n_positions,
        "n_inner": c.d_ff,
        "vocab_size": c.vocab_size,
        "activation_function": NAMES[c.activation, c.gated],
        "layer_norm_epsilon": c.norm_eps,
        "do_layer_norm_before": True,
        "rotary_pct": c.rotary_fraction if c.position == "rotary" else 0.0,
        "rotary_base": c.rotary_base,
        "bias": c.qkv_bias,
        "intermediate_size": c.d_ff,
        "multi_query_mode": c.n_kv_head < c.n_head,
        "tie_word_embeddings": c.tied_head,
        "scale_attn_by_inverse_layer_idx": c.inverse_layer_scale,
        "bos_token_id": own.tokens.bos,
        "eos_token_id": eos,
        "storage_dtype": own.dtype,
        "tensor_parallelism": own.tensor_parallel,
        "head_num": c.n_head,
        "size_per_head": c.head_dim,
        "inter_size": c.d_ff,
        "max_pos_seq_len": c.n_positions,
        "num_layer": c.n_layer,
        "layernorm_eps": c.norm_eps,
        "start_id": own.tokens.bos,
        "end_id": eos,
        "weight_data_type": short.get(own.dtype, own.dtype),
        "tensor_para_size": own.tensor_parallel,
    }
    return {key: str(value) for key, value in values.items()}


def read_ini(file: Path) -> configparser.ConfigParser:
    """Parse config.ini; without a section [gpt] it is a SourceError."""
    if file.stat().st_size > MAX_CONFIG:
        raise SourceError(f"{file}: {file.stat().st_size} bytes is no config")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(file.read_bytes().decode())
    except (configparser.Error, UnicodeDecodeError) as error:
        raise SourceError(f"{file}: damaged: {error}") from error
    if not parser.has_section("gpt"):
        raise SourceError(f"{file}: there is no section [gpt] in it")
    return parser


def literal(text: str) -> Any:
    """Return what a value was before `str` made text of it; text stays text."""
    if len(text) > MAX_VALUE:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return text if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS else value


def product(file: Path, values: Mapping[str, Any], *keys: str) -> int:
    """Return the product of integer keys."""
    source = SourceConfig(values, file)
    result = 1
    for key in keys:
        result *= source.integer(key)
    return result
