"""Pickles that run code when a reader lets them, in every file that holds pickles."""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import nemo_writer as nemo
import tiny
from porttool.sources.torch_legacy import MAGIC, PROTOCOL


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def named(module: str, name: str, arguments: bytes, opcode: bytes = b"R") -> bytes:
    """A call of any name, by opcodes: `arguments` leave a tuple on the stack."""
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n" + arguments + opcode


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def gadgets(marker: Path) -> dict[str, bytes]:
    """Name → the opcodes of one value whose making touches `marker`."""
    shell, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    one, program = text(shell) + b"\x85", text(code) + b"\x85"
    inner = b"\x80\x02" + named("posix", "system", one) + b"."
    stored = b"B" + len(inner).to_bytes(4, "little") + inner + b"\x85"
    return {
        "os.system": named("os", "system", one),
        "posix.system": named("posix", "system", one),
        "eval": named("builtins", "eval", text(f"__import__('os').system({shell!r})") + b"\x85"),
        "exec": named("builtins", "exec", program),
        "old exec": named("__builtin__", "exec", program),
        "subprocess": named("subprocess", "check_call", b"]" + text("touch") + b"a"
                            + text(str(marker)) + b"a\x85"),
        "runpy": named("runpy", "_run_code", program[:-1] + b"}\x86"),
        "timeit": named("timeit", "timeit", b"X\x04\0\0\0pass" + text(code) + b"\x86"),
        "a nested pickle": named("_pickle", "loads", stored),
        "torch's nested pickle": named("torch.storage", "_load_from_bytes", stored),
        "object's own class": b"(" + b"c__builtin__\nexec\n" + text(code) + b"o",
        "instance": b"(" + text(shell) + b"ios\nsystem\n",
        "stack global": text("os") + text("system") + b"\x93" + one + b"R",
        "by attribute": named("builtins", "getattr", b"cos\n__dict__\n" + text("x") + b"\x86"),
        "new object": b"csubprocess\nPopen\n]" + text("true") + b"a\x85\x81",
        "built state": b"cargparse\nNamespace\n)\x81}" + text("x") + named("os", "system", one)
                       + b"sb",
        "in a dictionary": b"ccollections\nOrderedDict\n)R" + text("k")
                           + named("os", "system", one) + b"s",
    }  # fmt: skip


def tree(value: bytes) -> bytes:
    """A pickle of {"a": value}."""
    data = b"\x80\x02}" + text("a") + value + b"s."
    pickletools.dis(data, out=io.StringIO())  # else it would be refused for being no pickle
    return data


def torch_zip(data: bytes) -> bytes:
    """What torch.save writes, with another pickle in it."""
    saved, out = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.ones(2)}, saved)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("data.pkl") else old.read(name))
    return out.getvalue()


def legacy(data: bytes) -> bytes:
    head = [pickle.dumps(v, protocol=2) for v in (MAGIC, PROTOCOL, {"little_endian": True})]
    return b"".join([*head, data, pickle.dumps([], protocol=2)])


def write_hugging_face(folder: Path, data: bytes) -> Path:
    tiny.gpt2(n_layer=1).config.save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(data)
    return folder


def write_megatron(folder: Path, data: bytes) -> Path:
    (folder / "mp_rank_00").mkdir(parents=True)
    (folder / "mp_rank_00" / "model_optim_rng.pt").write_bytes(data)
    return folder


def write_archive(folder: Path, data: bytes, form: str = "tar", **config: Any) -> Path:
    import yaml

    folder.mkdir()
    members = {"model_config.yaml": yaml.safe_dump({**nemo.GPT_2B, **config}).encode(),
               "model_weights.ckpt": data}  # fmt: skip
    return nemo.pack(folder / "model.nemo", members, form)


def write_adapter(folder: Path, data: bytes) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "token_dim": 2}'
    )
    (folder / "adapter_model.bin").write_bytes(data)
    return folder


CARRIERS: dict[str, Callable[[Path, bytes], Path]] = {
    "torch zip": lambda f, p: write_hugging_face(f, torch_zip(p)),
    "torch legacy": lambda f, p: write_hugging_face(f, legacy(p)),
    "bare pickle": write_hugging_face,
    "megatron zip": lambda f, p: write_megatron(f, torch_zip(p)),
    "megatron legacy": lambda f, p: write_megatron(f, legacy(p)),
    "nemo": lambda f, p: write_archive(f, torch_zip(p)),
    "nemo, packed": lambda f, p: write_archive(f, torch_zip(p), "gz"),
    "nemo prompts": lambda f, p: write_archive(
        f, torch_zip(p), virtual_prompt_style="p-tuning", task_templates=[]
    ),
    "nemo prompts, legacy": lambda f, p: write_archive(
        f, legacy(p), virtual_prompt_style="p-tuning", task_templates=[]
    ),
    "adapter": lambda f, p: write_adapter(f, torch_zip(p)),
}
"""Where a pickle can be in what porttool reads."""
