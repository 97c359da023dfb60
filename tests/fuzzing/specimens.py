"""Whole inputs of every container: tiny, and the same bytes wherever they are written."""

from __future__ import annotations

import gzip
import json
import pickle
import re
import shutil
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

import nemo_writer as nemo
import tiny
from porttool import api
from porttool.config import Dtype
from porttool.engines.native.library import NativeUnavailable, load_library
from porttool.fastertransformer import export
from porttool.plugins import Registry, load_registry
from porttool.sources.torch_legacy import MAGIC, PROTOCOL
from tf_bundle_writer import write_bundle

SHAPE = {
    "vocab_size": 11, "n_positions": 6, "n_embd": 8, "n_head": 2, "n_layer": 1,
    "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


@cache
def registry() -> Registry:
    return load_registry()


@cache
def model() -> torch.nn.Module:
    return tiny.gpt2(**SHAPE)


def write_safetensors(folder: Path) -> None:
    tiny.write_source(folder, model())


def write_sharded(folder: Path) -> None:
    tiny.write_source(folder, model(), tiny.Form(shards=2))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    vocabulary = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "c"}]}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))


def write_torch_zip(folder: Path) -> None:
    tiny.write_source(folder, model(), tiny.Form(file="pytorch_model.bin", masks=True))


def write_legacy(folder: Path) -> None:
    write_torch_zip(folder)
    file = folder / "pytorch_model.bin"
    save_legacy(torch.load(file, weights_only=True), file)


class LegacyPickler(pickle.Pickler):
    """Numbers the storages as they come; torch itself names them by their addresses."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, protocol=2)
        self.storages: dict[int, Any] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, torch.storage.TypedStorage):
            return None
        self.storages.setdefault(obj.untyped().data_ptr(), obj)
        key = list(self.storages).index(obj.untyped().data_ptr())
        kind = getattr(torch, obj._pickle_storage_type())
        return ("storage", kind, str(key), "cpu", obj._size(), None)


def save_legacy(tree: Any, path: Path) -> None:
    """Write torch's format of before 1.6: five pickles, then each storage's length and bytes."""
    with path.open("wb") as file, warnings.catch_warnings(action="ignore"):
        for value in (MAGIC, PROTOCOL, {"little_endian": True}):
            pickle.dump(value, file, protocol=2)
        pickler = LegacyPickler(file)
        pickler.dump(tree)
        pickle.dump([str(i) for i in range(len(pickler.storages))], file, protocol=2)
        for storage in pickler.storages.values():
            file.write(storage._size().to_bytes(8, "little") + bytes(storage.untyped()))


def write_megatron(folder: Path) -> None:
    """One rank of 2019's layout, without arguments."""
    state = {n.removeprefix("transformer."): t.float() for n, t in model().state_dict().items()}
    names = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
             "attn.c_attn": "attention.query_key_value", "attn.c_proj": "attention.dense",
             "mlp.c_fc": "mlp.dense_h_to_4h", "mlp.c_proj": "mlp.dense_4h_to_h"}  # fmt: skip
    layers = {f"final_layernorm.{p}": state[f"ln_f.{p}"] for p in ("weight", "bias")}
    for old, new in names.items():
        for part in ("weight", "bias"):
            tensor = state[f"h.0.{old}.{part}"]
            matrix = tensor.ndim > 1
            layers[f"layers.0.{new}.{part}"] = tensor.t().contiguous() if matrix else tensor
    embedding = {"word_embeddings": {"weight": state["wte.weight"]},
                 "position_embeddings": {"weight": state["wpe.weight"]}}  # fmt: skip
    tree = {"iteration": 7, "model": {"language_model": {"embedding": embedding,
                                                         "transformer": layers}}}  # fmt: skip
    (folder / "mp_rank_00").mkdir()
    torch.save(tree, folder / "mp_rank_00" / "model_optim_rng.pt")


def write_nemo(folder: Path) -> None:
    values = {**nemo.GPT_2B, "encoder_seq_length": 6, "num_layers": 1, "hidden_size": 8,
              "ffn_hidden_size": 6, "num_attention_heads": 2}  # fmt: skip
    values["tokenizer"] = {"vocab_file": "nemo:aa_vocab.json", "merge_file": "nemo:bb_merges.txt"}
    files = nemo.bpe_files(9)
    nemo.write(folder / "model.nemo", values, nemo.draw(values, vocab=11), files=files)


def write_nemo_gz(folder: Path) -> None:
    write_nemo(folder)
    file = folder / "model.nemo"
    file.write_bytes(gzip.compress(file.read_bytes(), mtime=0))


def write_bundle_folder(folder: Path) -> None:
    """What OpenAI published."""
    tensors = {}
    for name, tensor in model().transformer.state_dict().items():
        kind = name.rsplit(".", 1)[-1]
        path = re.sub(r"^h\.(\d+)\.", r"h\1/", name).rsplit(".", 1)[0].replace(".", "/")
        short = "" if name in ("wte.weight", "wpe.weight") else "/g" if "ln_" in name else "/w"
        array = tensor.float().numpy()
        array = array[None] if array.ndim == 2 and short else array
        tensors[f"model/{path}{'/b' if kind == 'bias' else short}"] = array
    write_bundle(folder / "model.ckpt", tensors)
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    hparams = {"n_vocab": 11, "n_ctx": 6, "n_embd": 8, "n_head": 2, "n_layer": 1}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    (folder / "encoder.json").write_text(json.dumps({"a": 0, "<|endoftext|>": 1}))
    (folder / "vocab.bpe").write_text("#version: 0.2\n")


def write_fastertransformer(folder: Path) -> None:
    """Our own export, of two ranks."""
    write_safetensors(folder / "source")
    checkpoint = api.convert(folder / "source", folder / "checkpoint", registry=registry())
    made = export(checkpoint, folder / "exported", tp=2)
    for file in [*made.iterdir()]:
        file.rename(folder / file.name)
    for scratch in ("source", "checkpoint", "exported"):
        shutil.rmtree(folder / scratch)


def write_old_fastertransformer(folder: Path) -> None:
    """As early TensorRT-LLM wrote it: without our section."""
    write_fastertransformer(folder)
    text = (folder / "config.ini").read_text()
    (folder / "config.ini").write_text(text.partition("[porttool]")[0])


def write_checkpoint(folder: Path) -> None:
    """The manifest says nothing of where it was made, so that it is the same everywhere."""
    write_safetensors(folder / "source")
    (folder / "source" / "vocab.json").write_text('{"a": 0}')
    made = api.convert(folder / "source", folder / "made", registry=registry())
    settle(folder, made.path, "checkpoint.json", made.manifest)


def write_engine(folder: Path, kind: str = "torch", dtype: Dtype = "float64") -> None:
    write_safetensors(folder / "source")
    api.convert(folder / "source", folder / "checkpoint", registry=registry())
    made = api.build(
        folder / "checkpoint", folder / "made", engine=kind, dtype=dtype, max_batch_size=2,
        registry=registry(),
    )  # fmt: skip
    shutil.rmtree(folder / "checkpoint")
    settle(folder, made.path, "engine.json", made.manifest)


def write_onnx_engine(folder: Path) -> None:
    """In the type whose greedy tokens compiled code chooses, compiled before anybody watches."""
    with suppress(NativeUnavailable):
        load_library()
    write_engine(folder, "onnx", "float32")


def write_table(folder: Path) -> None:
    write_npy(folder)
    file = folder / "table.npy"
    made = api.convert_prompts(file, folder / "made", model="prompt_tuning", registry=registry())
    assert made is not None
    file.unlink()
    settle(folder, made.path, "prompt_table.json", made.manifest)


def settle(folder: Path, made: Path, name: str, manifest: Any) -> None:
    """Move a made folder's files up, and take the place and the time out of its manifest."""
    for file in [*made.iterdir()]:
        file.rename(folder / file.name)
    for scratch in ("source", "made"):
        shutil.rmtree(folder / scratch, ignore_errors=True)
    source = manifest.source.model_copy(update={"path": "/source", "fingerprint": "0" * 64})
    changed = {"source": source, "porttool_version": "0"}
    if "checkpoint_digest" in type(manifest).model_fields:
        changed["checkpoint_digest"] = "0" * 64
    (folder / name).write_text(manifest.model_copy(update=changed).sealed())


def write_npy(folder: Path) -> None:
    drawn = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    np.save(folder / "table.npy", drawn)


def write_token_npy(folder: Path) -> None:
    np.save(folder / "tokens.npy", np.arange(12, dtype=np.int32).reshape(3, 4))


def write_token_csv(folder: Path) -> None:
    (folder / "tokens.csv").write_text("5, 9, 2\n\n7\n1, 60, 33\n")
