"""A tiny GPT-2 that has a tokenizer, its engine, and a pack of articles."""

from __future__ import annotations

import json
import shutil

import pytest

import tiny
from porttool.engine import choose_limits

WORDS = [
    "harbour", "storm", "council", "bridge", "mayor", "bread", "coffee", "price", "town", "vote",
    "Tuesday", "river",
]  # fmt: skip


@pytest.fixture(scope="session")
def writer(tmp_path_factory, tokenizer_folder):
    """The source of a model that continues text with many different tokens."""
    changes = {"vocab_size": 320, "n_positions": 96, "bos_token_id": 0, "eos_token_id": 0}
    model = tiny.gpt2(seed=3, tie_word_embeddings=False, **changes, pad_token_id=None)
    model.transformer.wte.weight.mul_(4)
    model.transformer.ln_f.weight.mul_(4)
    folder = tiny.write_source(tmp_path_factory.mktemp("writer") / "source", model)
    shutil.copy(tokenizer_folder / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="session")
def writer_checkpoint(writer):
    return tiny.converted(writer, writer.parent / "checkpoint")


@pytest.fixture(scope="session")
def writer_engine(writer_checkpoint):
    limits = choose_limits(
        writer_checkpoint.config, max_batch_size=5, max_input_len=60, max_output_len=24
    )
    return tiny.built(writer_checkpoint, writer_checkpoint.path.parent / "engine", limits=limits)


@pytest.fixture(scope="session")
def rows():
    """Articles in the cnn_dailymail schema, of very different lengths."""
    return [
        {
            "id": f"article-{i:02}",
            "article": " ".join(WORDS[(i * k + k) % 12] for k in range(1, 4 + 3 * i)) + " .",
            "highlights": f"The {WORDS[i % 12]} and the {WORDS[(i + 5) % 12]} .\nA {WORDS[0]} .",
        }
        for i in range(14)
    ]


@pytest.fixture(scope="session")
def articles(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("articles") / "articles.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
