"""Every family of this repository through the ONNX engine: the torch engine's tokens."""

from __future__ import annotations

import pytest
import torch

import tiny
from porttool.config import Sampling
from porttool.generate import generate
from porttool.plugins import load_registry
from porttool.runner import load_runner
from porttool.testing import cases

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

CASES = [
    case
    for module in cases.case_modules().values()
    if module.startswith("porttool_") and cases.is_there(module)
    for case in cases.cases_in(module)
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_same_tokens_as_torch_and_same_logits_as_the_reference(tmp_path, case):
    family = case()
    family.write_source(tmp_path / "source", 0)
    checkpoint = tiny.converted(tmp_path / "source", tmp_path / "checkpoint")
    registry = load_registry()
    vocabulary = checkpoint.config.vocab_size
    prompts = [[(7 * i + 3 * j + 1) % vocabulary for j in range(2 + 3 * i)] for i in range(4)]
    tokens = []
    for kind in ("torch", "onnx"):
        engine = tiny.built(checkpoint, tmp_path / kind, kind=kind, dtype="float32")
        runner = load_runner(engine, registry, {"device": "cpu"})
        found = generate(runner, prompts, Sampling(max_new_tokens=8), eos=())
        tokens.append([row[0].tokens for row in found])
    assert tokens[0] == tokens[1]
    wanted = family.reference_logits(tmp_path / "source", prompts[3])
    logits = tiny.full_logits(runner, prompts[3])
    atol = 1e-4 * max(1.0, float(wanted.std()))
    torch.testing.assert_close(logits.double(), wanted.double(), rtol=0, atol=atol)


def test_no_family_is_left_out():
    assert {case.family for case in CASES} >= {"gpt2", "camel5b", "santacoder", "gpt_next"}
