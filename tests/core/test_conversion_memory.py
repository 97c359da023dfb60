"""Peak resident memory of a conversion, mapped pages included, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from porttool_gpt_next.conformance import NemoConformance
from porttool_santacoder.conformance import SantaCoderConformance

BOUND = 300_000_000
CHILD = """
import os, sys
from pathlib import Path
import tiny

os.fsync = lambda descriptor: None  # what is measured is memory, not the disk
tiny.converted(Path(sys.argv[1]), Path(sys.argv[2]), dtype=sys.argv[3])
status = Path("/proc/self/status").read_text()  # getrusage would count the parent, too
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


def write_large_source(folder, file, n_layer, dtype):
    """A GPT-2 whose shards are written one after the other: 50 MB a layer in float32."""
    width, vocab = 1024, 16384
    folder.mkdir()
    config = {
        "model_type": "gpt2", "vocab_size": vocab, "n_positions": 64, "n_embd": width,
        "n_layer": n_layer, "n_head": 8,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    big = torch.randn(4 * width, width, dtype=dtype)
    layer = {
        "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,),
        "ln_2.bias": (width,), "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,), "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,), "mlp.c_fc.weight": (width, 4 * width),
        "mlp.c_fc.bias": (4 * width,), "mlp.c_proj.weight": (4 * width, width),
        "mlp.c_proj.bias": (width,),
    }  # fmt: skip
    shards = [{"wte.weight": (vocab, width), "wpe.weight": (64, width), "ln_f.weight": (width,),
               "ln_f.bias": (width,)}]  # fmt: skip
    shards += [{f"h.{i}.{n}": s for n, s in layer.items()} for i in range(n_layer)]
    stem, suffix = file.rsplit(".", 1)
    where = {}
    for i, shapes in enumerate(shards, 1):
        name = f"{stem}-{i:05}-of-{len(shards):05}.{suffix}"
        where |= dict.fromkeys(shapes, name)
        tensors = {n: torch.zeros(s, dtype=dtype) for n, s in shapes.items()}
        for tensor in tensors.values():
            tensor.view(-1)[: big.numel()] = big.view(-1)[: tensor.numel()]
        tiny.write_file(folder / name, tensors)
    (folder / f"{file}.index.json").write_text(json.dumps({"weight_map": where}))
    return 4 * vocab * width


@pytest.mark.parametrize(
    ("file", "stored", "wanted"),
    [
        ("model.safetensors", "float32", "float32"),
        ("pytorch_model.bin", "float32", "float32"),
        pytest.param("model.safetensors", "float32", "float16", marks=pytest.mark.slow),
        pytest.param("pytorch_model.bin", "float32", "bfloat16", marks=pytest.mark.slow),
        pytest.param("pytorch_model.bin", "float16", "float32", marks=pytest.mark.slow),
    ],
)
def test_peak_memory(tmp_path, file, stored, wanted):
    """A source several times larger than the bound: twice the largest tensor and 300 MB."""
    n_layer = 30 if stored == "float32" else 60
    largest = write_large_source(tmp_path / "source", file, n_layer, getattr(torch, stored))
    size = sum(f.stat().st_size for f in (tmp_path / "source").iterdir())
    bound = 2 * largest + BOUND
    assert size > 3 * bound
    found = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "source"), str(tmp_path / "out"), wanted],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(tiny.__file__).parent)},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    peak = int(found.stdout)
    assert peak <= bound, f"{size / 1e6:.0f} MB: {peak / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB"


LIGHT = """
import sys
from pathlib import Path
import tiny

tiny.converted(Path(sys.argv[1]), Path(sys.argv[2]))
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""


@pytest.mark.parametrize("case", [NemoConformance, SantaCoderConformance])
def test_conversion_imports_no_compiler(tmp_path, case):
    """Rules that join tensors are tried out before a tensor is read; torch would fetch it for that.

    It is a second and 150 MB of resident memory, more than a small model has.
    """
    case().write_source(tmp_path / "source", 0)
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, tmp_path / "source", tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": str(Path(tiny.__file__).parent)},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
