"""Writes GPT-2 as OpenAI published it, of transformers' weights."""

from __future__ import annotations

import json

from tf_bundle_writer import write_bundle

CONV = ("c_attn", "c_proj", "c_fc")


def variables(model):
    """A GPT2LMHeadModel's weights under OpenAI's names."""
    found = {}
    for name, tensor in model.transformer.state_dict().items():
        parts = name.split(".")
        if parts[0] == "h":
            kind = "g" if parts[-2].startswith("ln") else "w"
            parts = [f"h{parts[1]}", *parts[2:-1], kind if parts[-1] == "weight" else "b"]
        elif parts[0] == "ln_f":
            parts = ["ln_f", "g" if parts[1] == "weight" else "b"]
        else:
            parts = parts[:1]
        array = tensor.float().numpy()
        wide = parts[-1] == "w" and parts[-2] in CONV
        found["model/" + "/".join(parts)] = array[None] if wide else array
    return found


def write_source(folder, model, extra=None):
    folder.mkdir()
    c = model.config
    hparams = {"n_vocab": c.vocab_size, "n_ctx": c.n_positions, "n_embd": c.n_embd,
               "n_head": c.n_head, "n_layer": c.n_layer}  # fmt: skip
    (folder / "hparams.json").write_text(json.dumps(hparams))
    end = c.vocab_size - 1
    vocabulary = {f"t{i}": i for i in range(end)} | {"<|endoftext|>": end}
    (folder / "encoder.json").write_text(json.dumps(vocabulary))
    (folder / "vocab.bpe").write_text("#version: 0.2\n")
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    write_bundle(folder / "model.ckpt", {**variables(model), **(extra or {})})
    return folder
