"""What every test may use. Nothing here or below reaches the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from pathlib import Path

import pytest
import torch

import tiny
from porttool.checkpoint import Checkpoint
from porttool.plugins import Registry, load_registry
from porttool.runner import Runner

torch.set_num_threads(1)  # the models are tiny, and threads that wait slow each other down


@pytest.fixture(scope="session")
def registry() -> Registry:
    return load_registry()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 320 ids, `<|endoftext|>` is 0."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.train_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def reference() -> torch.nn.Module:
    """The tiny GPT-2 in float64, as transformers runs it."""
    return tiny.gpt2()


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, reference: torch.nn.Module) -> Path:
    """The tiny GPT-2 as a folder. Read only: copy it before damaging it."""
    return tiny.write_source(tmp_path_factory.mktemp("source") / "gpt2", reference)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Checkpoint:
    """The tiny GPT-2 converted. Read only: copy its folder before damaging it."""
    return tiny.converted(source, tmp_path_factory.mktemp("checkpoint") / "gpt2")


@pytest.fixture(scope="session")
def talker() -> torch.nn.Module:
    """A tiny GPT-2 that says many different things: its input weighs more than its biases."""
    model = tiny.gpt2(seed=1, tie_word_embeddings=False)
    model.transformer.wte.weight.mul_(4)
    model.transformer.ln_f.weight.mul_(4)
    return model


@pytest.fixture(scope="session")
def engine_folder(tmp_path_factory: pytest.TempPathFactory, talker: torch.nn.Module) -> Path:
    """The talker as a float64 engine. Read only: copy it before damaging it."""
    folder = tmp_path_factory.mktemp("talker")
    source = tiny.write_source(folder / "source", talker)
    checkpoint = tiny.converted(source, folder / "checkpoint")
    return tiny.built(checkpoint, folder / "engine", dtype="float64").path


@pytest.fixture
def runner(engine_folder: Path, registry: Registry) -> Runner:
    """The talker's engine in the canonical decoder, loaded afresh."""
    return tiny.loaded(engine_folder, registry)
