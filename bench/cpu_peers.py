"""The engines that porttool is measured against on a CPU, all from the same weights."""

from __future__ import annotations

import ctypes
import json
import time
from pathlib import Path
from typing import Any

Timed = tuple[float, float, list[int]]
QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
ACTIVATION_EPSILON = 1e-5


def write_sources(folder: Path, batch: int, prompt: int, n_new: int) -> None:
    """Write random weights once: as a Hugging Face folder, and as porttool engines of it."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from porttool import api

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # biases and norms too, which are zeros and ones by default
            centre = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder / "source")
    api.convert(folder / "source", folder / "checkpoint", model="gpt2")
    for dtype in ("float32", "bfloat16"):
        api.build(
            folder / "checkpoint", folder / f"engine-{dtype}", dtype=dtype,
            max_batch_size=batch, max_input_len=prompt, max_output_len=n_new,
        )  # fmt: skip


class Clock:
    """Notes when tokens come: a streamer for transformers, a callback for CTranslate2."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        """Take a token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def make_transformers(folder: Path, dtype: str, threads: int) -> Any:
    """`generate` with its defaults: sdpa attention, dynamic cache."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=getattr(torch, dtype))

    def run(prompts: list[list[int]], n_new: int) -> Timed:
        ids, clock = torch.tensor(prompts), Clock()
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=0, do_sample=False,
            max_new_tokens=n_new, min_new_tokens=n_new,
            stopping_criteria=[lambda *_: (clock.put(None), torch.zeros(len(ids)).bool())[1]],
        )  # fmt: skip
        return clock.times[0], clock.times[-1], found[0, ids.shape[1] :].tolist()

    return run


def make_ctranslate2(folder: Path, dtype: str, threads: int) -> Any:
    """A generator whose specification is filled by CTranslate2's own GPT-2 loader."""
    import ctranslate2
    from ctranslate2.converters import transformers as loaders
    from transformers import GPT2LMHeadModel

    source = GPT2LMHeadModel.from_pretrained(folder / "source")
    spec = loaders._MODEL_LOADERS["GPT2Config"].get_model_spec(source)
    words = [f"t{i}" for i in range(source.config.vocab_size)]
    spec.register_vocabulary(words)
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = words[-1]
    spec.config.layer_norm_epsilon = ACTIVATION_EPSILON
    spec.validate()
    spec.optimize(quantization=dtype)
    target = folder / f"ctranslate2-{dtype}"
    target.mkdir()
    spec.save(str(target))
    generator = ctranslate2.Generator(
        str(target), device="cpu", compute_type=dtype, intra_threads=threads, inter_threads=1
    )

    def run(prompts: list[list[int]], n_new: int) -> Timed:
        clock = Clock()
        found = generator.generate_batch(
            [[words[i] for i in p] for p in prompts],
            min_length=n_new, max_length=n_new, sampling_topk=1, beam_size=1,
            include_prompt_in_result=False, callback=lambda r: clock.put(r) or False,
        )  # fmt: skip
        return clock.times[0], time.perf_counter(), list(found[0].sequences_ids[0])

    return run


def write_gguf(folder: Path, dtype: str) -> Path:
    """Write the source as llama.cpp's file; norms and biases stay float32, as its own tool does."""
    import gguf
    import numpy
    from safetensors.numpy import load_file

    config = json.loads((folder / "source" / "config.json").read_text())
    weights = load_file(folder / "source" / "model.safetensors")
    kind = {
        "float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
    }[dtype]  # fmt: skip
    names = {
        "transformer.wte": "token_embd", "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm", "transformer.h.": "blk.", ".attn.c_attn": ".attn_qkv",
        ".attn.c_proj": ".attn_output", ".mlp.c_fc": ".ffn_up", ".mlp.c_proj": ".ffn_down",
        ".ln_1": ".attn_norm", ".ln_2": ".ffn_norm",
    }  # fmt: skip
    path = folder / f"{dtype}.gguf"
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    writer.add_token_merges(["t 0"])
    for name, weight in weights.items():
        flip = weight.ndim == 2 and ".h." in name  # Conv1D keeps [in, out]
        data = numpy.ascontiguousarray(weight.T if flip else weight)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        small = data.ndim == 1 or name.startswith("position")
        stored = data if small else gguf.quants.quantize(data, kind)
        writer.add_tensor(name, stored, raw_dtype=None if small else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_llama(folder: Path, dtype: str, threads: int) -> Any:
    """llama.cpp through its C interface: decode, highest logit, decode."""
    import llama_cpp
    import numpy

    llama_cpp.llama_log_set(QUIET, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    path = str(write_gguf(folder, dtype)).encode()
    model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        raise RuntimeError("llama.cpp gave no context")

    def feed(tokens: list[int]) -> int:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama.cpp could not decode")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return int(numpy.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())

    def run(prompts: list[list[int]], n_new: int) -> Timed:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        tokens = [feed(prompts[0])]
        first = time.perf_counter()
        while len(tokens) < n_new:
            tokens.append(feed(tokens[-1:]))
        return first, time.perf_counter(), tokens

    return run
