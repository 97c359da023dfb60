"""Writes Megatron-LM's GPT-2 of every version and division, of transformers' weights."""

from __future__ import annotations

import argparse

import numpy as np
import torch

LINEAR = {"attn.c_attn": "attention.query_key_value", "attn.c_proj": "attention.dense",
          "mlp.c_fc": "mlp.dense_h_to_4h", "mlp.c_proj": "mlp.dense_4h_to_h"}  # fmt: skip
NORM = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}


def order_qkv(tensor, version, heads):
    """Rows q | k | v → the rows of a version, for the heads of one rank."""
    parts = tensor.unflatten(0, (3, heads, -1))  # [3, heads, head_dim, ...]
    if version == 1:
        parts = parts.permute(1, 2, 0, *range(3, parts.ndim))
    elif version >= 2:
        parts = parts.transpose(0, 1)
    return parts.flatten(0, 2)


def layer_of(model, index, tp, rank, version):
    """One rank's tensors of a layer."""
    source = model.transformer.h[index]
    found = {}
    for name, ours in LINEAR.items():
        linear = source.get_submodule(name)
        weight, bias = linear.weight.t(), linear.bias
        if name == "attn.c_attn":
            split = lambda t: torch.cat([b.chunk(tp)[rank] for b in t.chunk(3)])  # noqa: E731
            heads = model.config.n_head // tp
            weight, bias = (order_qkv(split(t), version, heads) for t in (weight, bias))
        elif name == "mlp.c_fc":
            weight, bias = weight.chunk(tp)[rank], bias.chunk(tp)[rank]
        else:
            weight = weight.chunk(tp, 1)[rank]
        found |= {f"{ours}.weight": weight, f"{ours}.bias": bias}
    for name, ours in NORM.items():
        norm = source.get_submodule(name)
        found |= {f"{ours}.weight": norm.weight, f"{ours}.bias": norm.bias}
    return found


def padded_size(model):
    """Ids rounded up to eight, as training pads them."""
    return -(-model.config.vocab_size // 8) * 8


def padded_rows(model, tp, rank):
    rows = model.transformer.wte.weight
    extra = torch.full((padded_size(model) - len(rows), rows.shape[1]), 9.0, dtype=rows.dtype)
    return torch.cat([rows, extra]).chunk(tp)[rank]


def as_saved(tree):
    if isinstance(tree, dict):
        return {key: as_saved(value) for key, value in tree.items()}
    return tree.float().contiguous().clone()


def model_tree(model, version, tp, rank, stages, stage):
    """What one rank saves under `model`."""
    per_stage = model.config.n_layer // stages
    layers = {
        f"layers.{i}.{name}": tensor
        for i in range(per_stage)
        for name, tensor in layer_of(model, stage * per_stage + i, tp, rank, version).items()
    }
    last = stage == stages - 1
    if last:
        final = model.transformer.ln_f
        layers |= {"final_layernorm.weight": final.weight, "final_layernorm.bias": final.bias}
    if version >= 3:
        layers = {n.replace("attention", "self_attention", 1) if "_attention" not in n else n: t
                  for n, t in layers.items()}  # fmt: skip
    language = {"transformer" if version < 2 else "encoder": layers}
    if stage == 0:
        language["embedding"] = {
            "word_embeddings": {"weight": padded_rows(model, tp, rank)},
            "position_embeddings": {"weight": model.transformer.wpe.weight},
        }
    tree = {"language_model": language}
    if stages > 1 and last:
        tree["word_embeddings_for_head"] = {"weight": padded_rows(model, tp, rank)}
    return as_saved(tree)


def arguments(model, tp, pp, **changes):
    c = model.config
    return argparse.Namespace(**{
        "num_layers": c.n_layer, "hidden_size": c.n_embd, "num_attention_heads": c.n_head,
        "layernorm_epsilon": 1e-5, "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp, "bias_gelu_fusion": True, "openai_gelu": False,
        "params_dtype": torch.float16, "num_query_groups": 1, "normalization": "LayerNorm",
        "padded_vocab_size": padded_size(model), **changes,
    })  # fmt: skip


def write_source(folder, model, *, version=0, tp=1, pp=1, zipped=True, name="mp_rank_{:02}",
                 iteration="release", args=None):  # fmt: skip
    """Write a checkpoint folder as Megatron-LM does; version 0 has no arguments."""
    folder.mkdir(parents=True)
    tracker = iteration.removeprefix("iter_").lstrip("0")
    (folder / "latest_checkpointed_iteration.txt").write_text(tracker)
    for rank in range(tp):
        for stage in range(pp):
            place = folder / iteration / name.format(rank, stage)
            place.mkdir(parents=True)
            tree = {"iteration": 7, "model": model_tree(model, version, tp, rank, pp, stage)}
            if version:
                tree |= {"checkpoint_version": float(version),
                         "args": args or arguments(model, tp, pp),
                         "rng_state": [{"np_rng_state": np.random.RandomState(3).get_state(),
                                        "torch_rng_state": torch.get_rng_state()}]}  # fmt: skip
            torch.save(tree, place / "model_optim_rng.pt", _use_new_zipfile_serialization=zipped)
    return folder


def reread(folder):
    """A folder of transformers' as the model that was saved there."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder).requires_grad_(False)
