"""Every container, by the commands alone: converted, built, run, and verified by transformers.

Beside each tiny source lies the folder of the same weights that transformers saved. `verify` has
to find the engine equal to it, and no longer when one weight of it is changed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import source_cases as foreign
from porttool import api
from porttool.cli import invoke as porttool
from porttool.errors import UsageError
from porttool.testing import REFERENCE
from porttool_camel5b.conformance import Camel5bConformance
from porttool_gpt2.conformance import GPT2Conformance
from porttool_gpt_next.conformance import NemoConformance
from porttool_santacoder.conformance import (
    BigCodeConformance,
    SantaCoderConformance,
    StarCoderConformance,
)

CASES = {
    "gpt2": GPT2Conformance,
    "gpt2/megatron, 345M": foreign.Megatron,
    "gpt2/megatron": foreign.MegatronRanks,
    "gpt2/tensorflow": foreign.OpenAI,
    "gpt2/fastertransformer": foreign.FasterTransformer,
    "camel5b": Camel5bConformance,
    "santacoder": SantaCoderConformance,
    "santacoder/bigcode": BigCodeConformance,
    "starcoder": StarCoderConformance,
    "gpt_next": NemoConformance,
    "gpt_next, two ranks": foreign.GPT2B,
    "gpt_next, gzipped": foreign.CompressedNemo,
}
PROMPTS = [[5, 9, 2], [7], [1, 50, 33, 4, 8, 19, 2]]
N_NEW = 6


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param()


def read_rows(file: Path) -> list[list[int]]:
    return [[int(i) for i in line.split(",")] for line in file.read_text().split()]


def greedy(case, source: Path, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(N_NEW):
        ids.append(int(case.reference_logits(source, ids)[-1].argmax()))
    return ids


def change_one_weight(folder: Path) -> None:
    """Add to one weight of one norm of a folder."""
    tensors = load_file(folder / "model.safetensors")
    name = sorted(name for name in tensors if "norm" in name or "ln_" in name)[1]
    tensors[name][3] += 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_from_the_file_to_the_verdict(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    case.write_source(source, 0)
    told = [f"--{k.replace('_', '-')}={v}" for k, v in case.options.items()]
    assert porttool(["convert", "source", "--output", "checkpoint", *told]) == 0
    build = ["build", "checkpoint", "--output", "engine", "--dtype", "float32"]
    assert porttool(build) == 0

    Path("ids.csv").write_text("".join(",".join(map(str, p)) + "\n" for p in PROMPTS))
    run = ["run", "engine", "--input-tokens", "ids.csv", "--output-csv", "out.csv", "--ignore-eos"]
    assert porttool([*run, "--max-output-len", str(N_NEW), "--set", "device", "cpu"]) == 0
    assert read_rows(Path("out.csv")) == [greedy(case, source, prompt) for prompt in PROMPTS]

    verify = ["verify", "engine", "--hf-model", REFERENCE, "--runner-set", "device", "cpu",
              "--set", "prompt_len", "12", "--set", "new_tokens", "6"]  # fmt: skip
    capsys.readouterr()
    assert porttool([*verify, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    verdicts = {v["name"]: v["passed"] for v in report["verdicts"]}
    assert verdicts.items() >= dict.fromkeys(
        ("config", "weights", "prefill", "decode", "greedy tokens"), True
    ).items()  # fmt: skip

    change_one_weight(tmp_path / REFERENCE)
    assert porttool(verify) == 1
    assert "parity: " in capsys.readouterr().err


def test_the_wrong_family_names_the_right_one(tmp_path, case, registry):
    """camel-5b is a GPT-2 that GPT-2's own converter reads as well, StarCoder a GPTBigCode."""
    case.write_source(tmp_path / "source", 0)
    families = {c.family for c in (*registry.converters, *registry.tables)}
    assert len(families) == 6
    wider = {"camel5b": "gpt2", "starcoder": "santacoder"}.get(case.family, "")
    for wrong in families - {case.family, wider}:
        with pytest.raises(UsageError, match=f"not a source of '{wrong}'.*like {case.family}( |$)"):
            api.convert_prompts(tmp_path / "source", tmp_path / "out", model=wrong)
            api.convert(tmp_path / "source", tmp_path / "out", model=wrong)
    assert not (tmp_path / "out").exists()
