"""A tiny GPTBigCode, and a folder of one whose tokenizer knows the infilling tokens."""

from __future__ import annotations

from pathlib import Path

import torch

import tiny

SIZES = {"vocab_size": 67, "n_positions": 48, "n_embd": 24, "n_layer": 3, "n_head": 3}
UNDERSCORES = {"<|endoftext|>": 0, "<fim_prefix>": 1, "<fim_middle>": 2, "<fim_suffix>": 3}


def bigcode(*, seed: int = 0, **changes) -> torch.nn.Module:
    """A GPTBigCode in float64 with weights that float32 holds exactly."""
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = GPTBigCodeConfig(**{**SIZES, **special, **changes})
    config._attn_implementation = "sdpa"  # the eager softmax rounds to float32
    model = GPTBigCodeForCausalLM(config).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
        parameter.copy_(drawn.float())
    return model


def write_coder(folder: Path, *, seed: int = 0) -> Path:
    """Write a model with a byte-level tokenizer of 260 ids, the last four of them special.

    It says many different things, all of printable characters, the first 94 of its ids.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in UNDERSCORES])
    end = tokenizer.token_to_id("<|endoftext|>")
    model = bigcode(
        seed=seed, vocab_size=264, n_positions=400, bos_token_id=end, eos_token_id=end,
        tie_word_embeddings=False,
    )  # fmt: skip
    model.transformer.wte.weight[:256].mul_(4)
    model.transformer.ln_f.weight.mul_(4)
    model.lm_head.weight[94:] = 0
    source = tiny.write_source(folder, model)
    tokenizer.save(str(source / "tokenizer.json"))
    return source
