"""Lays out FasterTransformer's folders by hand, of transformers' GPT-2 or GPTBigCode."""

from __future__ import annotations

import configparser

import numpy as np

GENERATION = {"top_k": 50, "bad_words_ids": None, "_name_or_path": "50%off/gpt2",
              "pruned_heads": {}, "tf_legacy_loss": False, "forced_eos_token_id": None,
              "processes": 4}  # fmt: skip


def arrays(model, tp):
    """Every file's array, as the conversion scripts of that time divide them."""
    width = model.config.n_embd
    multi_query = hasattr(model.config, "multi_query")
    state = {n: t.numpy() for n, t in model.transformer.state_dict().items()}
    files = {"wte": state["wte.weight"], "wpe": state["wpe.weight"],
             "final_layernorm.weight": state["ln_f.weight"],
             "final_layernorm.bias": state["ln_f.bias"]}  # fmt: skip
    for i in range(model.config.n_layer):

        def get(name, i=i):
            array = state[f"h.{i}.{name}"]
            linear = multi_query and array.ndim == 2
            return array.T if linear else array  # [in, out]

        out = f"layers.{i}."
        for ours, theirs in (("ln_1", "input_layernorm"), ("ln_2", "post_attention_layernorm")):
            files |= {f"{out}{theirs}.{p}": get(f"{ours}.{p}") for p in ("weight", "bias")}
        files[f"{out}attention.dense.bias"] = get("attn.c_proj.bias")
        files[f"{out}mlp.dense_4h_to_h.bias"] = get("mlp.c_proj.bias")
        for rank in range(tp):

            def part(array, axis, rank=rank):
                return np.split(array, tp, axis)[rank]

            for kind in ("weight", "bias"):
                fused = get(f"attn.c_attn.{kind}")
                if multi_query:
                    query, rest = np.split(fused, [width], -1)
                    local = np.concatenate([part(query, -1), rest], -1)
                else:
                    local = part(fused.reshape(*fused.shape[:-1], 3, width), -1)
                files[f"{out}attention.query_key_value.{kind}.{rank}"] = local
                files[f"{out}mlp.dense_h_to_4h.{kind}.{rank}"] = part(get(f"mlp.c_fc.{kind}"), -1)
            files[f"{out}attention.dense.weight.{rank}"] = part(get("attn.c_proj.weight"), 0)
            files[f"{out}mlp.dense_4h_to_h.weight.{rank}"] = part(get("mlp.c_proj.weight"), 0)
    return {f"model.{name}.bin": np.ascontiguousarray(a, np.float32) for name, a in files.items()}


def write_folder(folder, model, tp, **changes):
    folder.mkdir(parents=True)
    for name, array in arrays(model, tp).items():
        array.tofile(folder / name)
    c = model.config
    values = {"n_embd": c.n_embd, "n_head": c.n_head, "n_layer": c.n_layer,
              "n_positions": c.n_positions, "vocab_size": c.vocab_size, "n_inner": None,
              "activation_function": c.activation_function, "eos_token_id": c.eos_token_id,
              "layer_norm_epsilon": c.layer_norm_epsilon, "tie_word_embeddings": True,
              "multi_query_mode": hasattr(c, "multi_query"), "storage_dtype": "float32",
              "tensor_parallelism": tp, **GENERATION, **changes}  # fmt: skip
    write_ini(folder, {k: v for k, v in values.items() if v != "absent"})
    return folder


def write_ini(folder, values):
    parser = configparser.ConfigParser(interpolation=None)
    parser["gpt"] = {key: str(value) for key, value in values.items()}
    with (folder / "config.ini").open("w") as file:
        parser.write(file)
