"""Synthetic NeMo models of exactly the real structure, and their forward pass from the formulas."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn import functional as F

Tensors = dict[str, torch.Tensor]

GPT_2B = {
    "encoder_seq_length": 40, "max_position_embeddings": "${.encoder_seq_length}",
    "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 40, "num_attention_heads": 4,
    "init_method_std": 0.014, "use_scaled_init_method": True, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "ffn_dropout": 0.0, "kv_channels": None,
    "apply_query_key_layer_scaling": True, "normalization": "layernorm1p",
    "layernorm_epsilon": 1e-5, "do_layer_norm_weight_decay": False,
    "make_vocab_size_divisible_by": 8, "pre_process": True, "post_process": True,
    "persist_layer_norm": True, "bias": False, "activation": "fast-swiglu", "headscale": False,
    "transformer_block_type": "pre_ln", "openai_gelu": False, "normalize_attention_scores": True,
    "position_embedding_type": "rope", "rotary_percentage": 0.5, "attention_type": "multihead",
    "share_embeddings_and_output_weights": False, "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": None,
    "num_query_groups": None, "bias_activation_fusion": False, "bias_dropout_add_fusion": False,
    "masked_softmax_fusion": True, "megatron_amp_O2": False, "transformer_engine": False,
    "fp8": False, "fp8_margin": 0, "gradient_as_bucket_view": True, "native_amp_init_scale": 4,
    "hysteresis": 2, "seed": 1234, "micro_batch_size": 1, "data": {"data_prefix": "???"},
    "optim": {"name": "fused_adam"}, "precision": "bf16", "target": "nemo.MegatronGPTModel",
    "nemo_version": "1.17.0",
    "tokenizer": {"library": "megatron", "type": "GPT2BPETokenizer", "model": None,
                  "vocab_file": None, "merge_file": None, "delimiter": None},
}  # fmt: skip
"""GPT-2B-001's YAML with small sizes."""

VOCAB = 56
PLAIN = {
    "activation": "gelu", "normalization": "layernorm", "bias": True,
    "position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True,
}  # fmt: skip
"""What the first NeMo GPTs have in place of GPT-2B's."""


def sizes(values: dict[str, Any]) -> tuple[int, int, int, int, int]:
    """Return d_model, heads, groups, head_dim and d_ff."""
    d, h = values["hidden_size"], values["num_attention_heads"]
    return (d, h, values.get("num_query_groups") or h, values.get("kv_channels") or d // h,
            values.get("ffn_hidden_size") or 4 * d)  # fmt: skip


def draw(values: dict[str, Any], vocab: int = VOCAB, seed: int = 0) -> Tensors:
    """Draw every tensor of a model from N(0, 0.2), in float32, under short legacy names."""
    generator = torch.Generator().manual_seed(seed)
    d, h, g, k, f = sizes(values)
    act = values["activation"]
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (vocab, d)}
    if values["position_embedding_type"] == "learned_absolute":
        shapes["embedding.position_embeddings.weight"] = (values["encoder_seq_length"], d)
    norms = ["weight"] if values["normalization"] == "rmsnorm" else ["weight", "bias"]
    for i in range(values["num_layers"]):
        linear = {
            "self_attention.query_key_value": ((h + 2 * g) * k, d),
            "self_attention.dense": (d, h * k),
            "mlp.dense_h_to_4h": (2 * f if act.startswith("fast-") else f, d),
            "mlp.dense_4h_to_h": (d, f),
        }
        if act in ("swiglu", "geglu", "reglu"):
            linear["mlp.dense_h_to_4h_2"] = (f, d)
        for name, shape in linear.items():
            shapes[f"layers.{i}.{name}.weight"] = shape
            if values["bias"]:
                shapes[f"layers.{i}.{name}.bias"] = shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes.update({f"layers.{i}.{norm}.{part}": (d,) for part in norms})
    shapes.update({f"final_layernorm.{part}": (d,) for part in norms})
    if not values["share_embeddings_and_output_weights"]:
        shapes["output_layer.weight"] = (vocab, d)
    return {n: torch.randn(s, generator=generator) * 0.2 for n, s in shapes.items()}


def llama_names(values: dict[str, Any], tensors: Tensors, *, plus: float) -> Tensors:
    """Return NeMo's tensors under the names that StableLM and Nemotron share."""
    d, h, g, k, f = sizes(values)
    found = {
        "model.embed_tokens.weight": tensors["embedding.word_embeddings.weight"],
        "lm_head.weight": tensors["output_layer.weight"],
        "model.norm.weight": tensors["final_layernorm.weight"].double() + plus,
        "model.norm.bias": tensors["final_layernorm.bias"],
    }
    for i in range(values["num_layers"]):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{theirs}{norm}.weight"] = tensors[f"{ours}{norm}.weight"].double() + plus
            found[f"{theirs}{norm}.bias"] = tensors[f"{ours}{norm}.bias"]
        grouped = tensors[f"{ours}self_attention.query_key_value.weight"].view(g, h // g + 2, k, d)
        for name, block in {"q": grouped[:, :-2], "k": grouped[:, -2], "v": grouped[:, -1]}.items():
            found[f"{theirs}self_attn.{name}_proj.weight"] = block.reshape(-1, d)
        found[f"{theirs}self_attn.o_proj.weight"] = tensors[f"{ours}self_attention.dense.weight"]
        up = tensors[f"{ours}mlp.dense_h_to_4h.weight"]
        if values["activation"] == "fast-swiglu":
            found[f"{theirs}mlp.gate_proj.weight"] = up[:f]
            up = up[f:]
        found[f"{theirs}mlp.up_proj.weight"] = up
        found[f"{theirs}mlp.down_proj.weight"] = tensors[f"{ours}mlp.dense_4h_to_h.weight"]
    return found


def forward(values: dict[str, Any], tensors: Tensors, ids: list[int]) -> torch.Tensor:
    """Logits [len(ids), vocab] in float64, written from NeMo's formulas."""
    t = {n: x.double() for n, x in tensors.items()}
    _, h, g, k, _ = sizes(values)
    n = len(ids)
    x = t["embedding.word_embeddings.weight"][ids]
    if "embedding.position_embeddings.weight" in t:
        x = x + t["embedding.position_embeddings.weight"][:n]
    for i in range(values["num_layers"]):
        p = f"layers.{i}."
        y = norm(values, t, p + "input_layernorm", x)
        mixed = apply(t, p + "self_attention.query_key_value", y)
        if values.get("megatron_legacy"):
            q, key, value = mixed.view(n, 3, h, k).unbind(1)
        else:
            mixed = mixed.view(n, g, h // g + 2, k)
            q = mixed[:, :, :-2].reshape(n, h, k)
            key, value = (mixed[:, :, j].repeat_interleave(h // g, 1) for j in (-2, -1))
        if values["position_embedding_type"] == "rope":
            dim = int(k * values["rotary_percentage"])
            q, key = rotate(q, dim), rotate(key, dim)
        scores = torch.einsum("qhd,khd->hqk", q, key) / k**0.5
        mask = torch.ones(n, n).triu(1).bool()
        weights = scores.masked_fill(mask, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, value).reshape(n, h * k)
        x = x + apply(t, p + "self_attention.dense", mixed)
        y = norm(values, t, p + "post_attention_layernorm", x)
        x = x + apply(t, p + "mlp.dense_4h_to_h", activate(values, t, p + "mlp.dense_h_to_4h", y))
    x = norm(values, t, "final_layernorm", x)
    return x @ t.get("output_layer.weight", t["embedding.word_embeddings.weight"]).T


def apply(t: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    """A linear layer with or without bias."""
    return F.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))


def norm(values: dict[str, Any], t: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    """The three kinds of norm."""
    weight, eps = t[f"{name}.weight"], values["layernorm_epsilon"]
    if values["normalization"] == "rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    gain = weight + 1 if values["normalization"] == "layernorm1p" else weight
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / deviation * gain + t[f"{name}.bias"]


def rotate(x: torch.Tensor, dim: int) -> torch.Tensor:
    """GPT-NeoX rotation of the first `dim` elements of x [n, heads, head_dim]."""
    frequency = 1 / 10000 ** (torch.arange(0, dim, 2).double() / dim)
    angle = torch.outer(torch.arange(x.shape[0]).double(), frequency)
    angle = torch.cat((angle, angle), -1)[:, None]
    turned, rest = x[..., :dim], x[..., dim:]
    first, second = turned.chunk(2, -1)
    half = torch.cat((-second, first), -1)
    return torch.cat((turned * angle.cos() + half * angle.sin(), rest), -1)


def activate(values: dict[str, Any], t: Tensors, name: str, y: torch.Tensor) -> torch.Tensor:
    """The MLP's first half."""
    act, hidden = values["activation"], apply(t, name, y)
    fused = values.get("bias_activation_fusion", values.get("bias_gelu_fusion", True))
    tanh = fused or values.get("openai_gelu", False)

    def gelu(x: torch.Tensor) -> torch.Tensor:
        if tanh:
            return x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    functions = {
        "gelu": gelu, "geglu": gelu, "reglu": torch.relu, "swiglu": lambda x: x * x.sigmoid(),
        "squared-relu": lambda x: torch.relu(x) ** 2,
    }  # fmt: skip
    function = functions[act.removeprefix("fast-")]
    if act.startswith("fast-"):
        first, second = hidden.chunk(2, -1)
        return function(first) * second
    if act in ("swiglu", "geglu", "reglu"):
        return function(hidden) * apply(t, name + "_2", y)
    return function(hidden)


CORE = {
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "post_attention_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def rank_state(
    values: dict[str, Any], tensors: Tensors, style: str, tp: int, pp: int
) -> dict[str, Any]:
    """Return what one rank's file holds, as `style` names it."""
    n_tp = values["tensor_model_parallel_size"]
    n_pp = values["pipeline_model_parallel_size"]
    depth = values["num_layers"] // n_pp
    state: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name.startswith("layers."):
            stage, local = divmod(int(name.split(".")[1]), depth)
            name = f"layers.{local}.{name.split('.', 2)[2]}"
        else:
            stage = 0 if name.startswith("embedding.") else n_pp - 1
        if stage == pp:
            state[styled(name, style)] = part(values, name, tensor, n_tp, tp).contiguous()
    if pp == n_pp - 1 > 0 and values["share_embeddings_and_output_weights"]:
        copy = part(values, "embedding", tensors["embedding.word_embeddings.weight"], n_tp, tp)
        name = "model.output_layer.weight" if "core" in style else "model.word_embeddings.weight"
        state[name] = copy.clone()
    if style == "core":
        state["model.decoder.layers.0.self_attention.linear_qkv._extra_state"] = io.BytesIO(b"fp8")
        state["model.rotary_pos_emb.inv_freq"] = torch.ones(3)
    if style == "legacy":
        state["model.language_model.rotary_pos_emb.inv_freq"] = torch.ones(3)
    return state


def styled(name: str, style: str) -> str:
    """Return a tensor's name as one generation of NeMo writes it."""
    if "core" in style:
        inner = name if name.startswith(("embedding.", "output_layer.")) else f"decoder.{name}"
        for old, new in CORE.items():
            if style == "core" or "layernorm" not in old:
                inner = inner.replace(old, new)
        return "model." + inner.replace("post_attention_layernorm", "pre_mlp_layernorm")
    prefix = "model.module." if style == "legacy_o2" else "model."
    outer = name.startswith(("embedding.", "output_layer."))
    return f"{prefix}language_model.{'' if outer else 'encoder.'}{name}"


def part(values: dict[str, Any], name: str, tensor: torch.Tensor, n: int, rank: int):
    """Return one tensor-parallel rank's part."""
    if "layernorm" in name or "position_embeddings" in name:
        return tensor
    if "dense_4h_to_h" in name or "self_attention.dense" in name:
        return tensor.chunk(n, 1)[rank] if name.endswith("weight") else tensor
    fused = "dense_h_to_4h." in name and values["activation"].startswith("fast-")
    if "query_key_value" in name and values.get("megatron_legacy"):
        return torch.cat([block.chunk(n)[rank] for block in tensor.chunk(3)])
    blocks = tensor.chunk(2) if fused else [tensor]
    return torch.cat([block.chunk(n)[rank] for block in blocks])


def write(
    path: Path,
    values: dict[str, Any],
    tensors: Tensors,
    *,
    style: str = "legacy",
    form: str = "tar",
    files: dict[str, bytes] | None = None,
) -> Path:
    """Write a model as an archive (tar, gz) or a folder."""
    n_tp = values["tensor_model_parallel_size"]
    n_pp = values["pipeline_model_parallel_size"]
    members = {"model_config.yaml": yaml.safe_dump(values, sort_keys=False).encode()}
    members.update(files or {})
    for tp in range(n_tp):
        for pp in range(n_pp):
            folder = f"tp_rank_{tp:02}_pp_rank_{pp:03}/" if n_pp > 1 else f"mp_rank_{tp:02}/"
            where = folder if n_tp * n_pp > 1 else ""
            state = rank_state(values, tensors, style, tp, pp)
            members[f"{where}model_weights.ckpt"] = saved(state)
    return pack(path, members, form)


def saved(state: dict[str, Any]) -> bytes:
    """Return what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def pack(path: Path, members: dict[str, bytes], form: str) -> Path:
    """Write files as a folder, a tar or a gzipped tar."""
    if form == "folder":
        for name, data in members.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        return path
    with tarfile.open(path, "w:gz" if form == "gz" else "w:") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sentencepiece_model(vocab_size: int) -> bytes:
    """Train a tiny sentencepiece model; bos is 1 and eos 2."""
    import sentencepiece

    out = io.BytesIO()
    lines = ["the cat sat on the mat", "a dog ran to the house", "it rained all day long"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=vocab_size, model_type="bpe",
        minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


def bpe_files(n: int) -> dict[str, bytes]:
    """A vocabulary of n ids and no merges, as GPT2BPETokenizer has them."""
    words = {chr(0x21 + i): i for i in range(n - 1)}
    return {
        "aa_vocab.json": json.dumps({**words, "<|endoftext|>": n - 1}).encode(),
        "bb_merges.txt": b"#version: 0.2\n",
    }
