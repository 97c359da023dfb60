"""Every family, tiny, beside an independent implementation; engines of it damaged and verified.

The reference is always transformers' own model, read from a folder of the same weights. Where
transformers has no such family (SantaCoder's original layout, NeMo), that folder is another model
class of the same arithmetic: GPTBigCode, Nemotron, StableLM.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

import tiny
from porttool import api
from porttool.cli import invoke
from porttool.config import ModelConfig
from porttool.engine import Engine, choose_limits
from porttool.evaluators.damage import Damage
from porttool.folder import hash_file
from porttool.prompt_table import MANIFEST, TENSOR, PromptTable
from porttool.testing import REFERENCE, TransformersConformance, redraw
from porttool_camel5b.conformance import Camel5bConformance
from porttool_gpt2.conformance import GPT2Conformance
from porttool_gpt_next.conformance import NemoConformance, nemo_tensors
from porttool_santacoder.conformance import BigCodeConformance, SantaCoderConformance

PLACES = {
    "scrambled layer": "layers.1.attention.qkv.out",
    "swapped norms": "layers.0.norm1.out",
    "other gelu": "layers.0.mlp.down.in",
    "other activation": "layers.0.mlp.down.in",
    "shifted positions": "position.out",
    "wrong rotary fraction": "layers.0.attention.out.in",
    "transposed projection": "layers.0.attention.out.out",
    "another group's head": "layers.0.attention.qkv.out",
    "keys and values swapped": "layers.0.attention.qkv.out",
    "gate and linear swapped": "layers.0.mlp.up.out",
    "noise of 2 %": "embedding.out",
}
"""Damage → the first operation that it changes."""

SMALL = ("--set", "n_prompts", "3", "--set", "prompt_len", "12", "--set", "new_tokens", "4")
"""Options of `verify` for a quick run."""


@dataclass(frozen=True)
class Outcome:
    """What `porttool verify` made of an engine."""

    status: int
    failed: tuple[str, ...]
    place: str | None
    cause: str | None
    weights: str
    prefill: str


class MultiHeadBigCode(BigCodeConformance):
    """GPTBigCode with as many key heads as heads, its fused projection ordered by head."""

    sizes: ClassVar = {**BigCodeConformance.sizes, "multi_query": False}


class MultiHeadSantaCoder(MultiHeadBigCode):
    """SantaCoder's multi-head layout: [in, out] matrices whose columns are q | k | v."""

    def write_layout(self, path: Path, model: Any) -> None:
        """Write GPT-2's layout with the key that only SantaCoder has."""
        found = {}
        for name, tensor in model.state_dict().items():
            turned = tensor.t() if tensor.dim() == 2 and ".h." in name else tensor
            if ".c_attn." in name:
                by_head = turned.unflatten(-1, (model.config.n_head, 3, -1))
                turned = by_head.transpose(-3, -2).flatten(-3)
            if name != "lm_head.weight":
                found[name] = turned.contiguous()
        path.mkdir()
        values = {**BigCodeConformance.sizes, "model_type": "gpt2"}
        (path / "config.json").write_text(
            json.dumps({**values, "attention_head_type": "multihead"})
        )
        save_file(found, path / "model.safetensors")


class GPT2B(NemoConformance):
    """GPT-2B's architecture: swiglu, rotary halves. StableLM has the same arithmetic."""

    architecture = "StableLmForCausalLM"
    sizes: ClassVar = {
        "vocab_size": 56, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 32,
        "layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        },
    }  # fmt: skip

    def write_source(self, path: Path, seed: int) -> None:
        """Write the weights twice; the norms' are one more than a multiple of 2^-12."""
        import transformers

        kind = getattr(transformers, self.architecture)
        model = redraw(kind(kind.config_class(**self.sizes)), seed)
        for name, tensor in model.state_dict().items():
            if "norm.weight" in name:
                tensor.copy_(1 + (tensor * 4096).round() / 4096)
        model.save_pretrained(path.with_name(REFERENCE))
        self.write_layout(path, model)

    def write_layout(self, path: Path, model: Any) -> None:
        """Write what NeMo has in place of Nemotron's: norms minus one, and the gate's half."""
        super().write_layout(path, model)
        config = path / self.config_file
        changes = {
            "activation": "fast-swiglu", "num_query_groups": self.sizes["num_key_value_heads"]
        }  # fmt: skip
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
        found = nemo_tensors(model)
        for gate in [name for name in found if "gate_proj" in name]:
            up = gate.replace("gate_proj", "dense_h_to_4h")
            found[up] = torch.cat((found.pop(gate), found[up]))
        stored = {n: t - 1 if "norm.weight" in n else t for n, t in found.items()}
        torch.save(stored, path / "model_weights.ckpt")


class GroupedGPT2B(GPT2B):
    """The same with two groups of queries."""

    sizes: ClassVar = {**GPT2B.sizes, "num_key_value_heads": 2}


FAMILIES: dict[str, type[TransformersConformance]] = {
    "gpt2": GPT2Conformance,
    "camel5b": Camel5bConformance,
    "santacoder, multi-query": SantaCoderConformance,
    "santacoder, multi-head": MultiHeadSantaCoder,
    "starcoder, multi-query": BigCodeConformance,
    "starcoder, multi-head": MultiHeadBigCode,
    "gpt_next, relu2, 2 groups": NemoConformance,
    "gpt_next, swiglu, 2 groups": GroupedGPT2B,
    "gpt_next, swiglu, 4 heads": GPT2B,
}
"""Name → its case, whose source lies beside a folder that transformers reads."""


def place_of(damage: str, config: ModelConfig) -> str:
    """Return the first operation that a damage changes in a model."""
    if damage == "shifted positions" and config.position == "rotary":
        return "layers.0.attention.qkv.out"
    return PLACES[damage]


PROMPT_TUNING = "prompt_tuning, on gpt2"
TASKS = {"email": 5, "boolq": 3}


def rolled(rows: torch.Tensor) -> torch.Tensor:
    """Give every virtual token the row before its own."""
    return rows.roll(1, 0)


def borrowed(rows: torch.Tensor) -> torch.Tensor:
    """Give the second task the first one's rows."""
    first, second = TASKS.values()
    return torch.cat((rows[:first], rows[:second]))


def shuffled(rows: torch.Tensor) -> torch.Tensor:
    """Shuffle every entry."""
    return rows.flatten()[torch.randperm(rows.numel())].view_as(rows)


def noisy(rows: torch.Tensor) -> torch.Tensor:
    """Add noise of 2 % of the standard deviation."""
    return rows + 0.02 * rows.std() * torch.randn(rows.shape)


TABLE_DAMAGES = {
    "scrambled table": shuffled,
    "shifted virtual tokens": rolled,
    "another task's rows": borrowed,
    "noise of 2 % on the table": noisy,
}


def write_prompts(path: Path) -> Path:
    """Write NeMo's unpacked prompt-learning archive for the tiny GPT-2."""
    generator = torch.Generator().manual_seed(0)
    tree = {}
    for task, n in TASKS.items():
        rows = torch.randn(n, GPT2Conformance.sizes["n_embd"], generator=generator) * 0.2
        tree[f"prompt_table.{task}.prompt_embeddings.weight"] = rows
        tree[f"prompt_table.{task}.indices"] = torch.arange(n)
    templates = [{"taskname": t, "total_virtual_tokens": n} for t, n in TASKS.items()]
    path.mkdir()
    yaml = {"virtual_prompt_style": "p-tuning", "task_templates": templates}
    (path / "model_config.yaml").write_text(json.dumps(yaml))
    torch.save({"prompt_table": tree}, path / "model_weights.ckpt")
    return path


def damage_table(name: str, table: Path, output: Path) -> Path:
    """Write a copy of a prompt table with damaged rows, whose hashes are right."""
    shutil.copytree(table, output)
    opened = PromptTable.open(output)
    file = f"{TENSOR}.safetensors"
    torch.manual_seed(0)
    save_file({TENSOR: TABLE_DAMAGES[name](opened.tensor()).contiguous()}, output / file)
    files = {**opened.manifest.files, file: hash_file(output / file)}
    manifest = opened.manifest.model_copy(update={"files": files})
    (output / MANIFEST).write_text(manifest.sealed())
    return output


def tuned(work: Path, dtypes: tuple[str, ...]) -> Iterator[Engine]:
    """Build the tiny GPT-2 with room for a prompt table, which is written to `work`/table."""
    api.convert_prompts(write_prompts(work / "prompts"), work / "table")
    GPT2Conformance().write_source(work / "source", 0)
    checkpoint = tiny.converted(work / "source", work / "checkpoint")
    limits = choose_limits(checkpoint.config, max_batch_size=4, max_prompt_rows=sum(TASKS.values()))
    for dtype in dtypes:
        yield tiny.built(checkpoint, work / dtype, dtype=dtype, limits=limits)


def damaged_tables(
    engine: Engine, reference: Path, table: Path, work: Path, *options: str
) -> Iterator[tuple[str, Outcome]]:
    """Verify a sound engine with each damage to its prompt table."""
    for name in TABLE_DAMAGES:
        hurt = damage_table(name, table, work / name.replace(" ", "_"))
        with_it = ("--prompt-table", str(hurt))
        yield name, outcome(engine, reference, work / f"{name} report", *with_it, *options)


def engines(family: str, work: Path, dtypes: tuple[str, ...]) -> Iterator[Engine]:
    """Write a family's source, convert it once and build it in each type."""
    FAMILIES[family]().write_source(work / "source", 0)
    checkpoint = tiny.converted(work / "source", work / "checkpoint")
    for dtype in dtypes:
        yield tiny.built(checkpoint, work / dtype, dtype=dtype)


def outcome(engine: Engine, reference: Path, output: Path, *options: str) -> Outcome:
    """Run `porttool verify` on an engine, beside the reference, and read its report."""
    status = invoke(
        ["verify", str(engine.path), "--hf-model", str(reference), "--output", str(output),
         "--runner-set", "device", "cpu", "--json", *options]
    )  # fmt: skip
    report = json.loads((output / "report.json").read_bytes())
    verdicts = {v["name"]: v for v in report["verdicts"]}
    measured = report["measurements"]
    return Outcome(
        status,
        tuple(name for name, v in verdicts.items() if v["passed"] is not True),
        measured.get("first_difference"),
        measured.get("cause"),
        verdicts["weights"]["detail"],
        verdicts["prefill"]["found"],
    )


def damaged(
    engine: Engine, reference: Path, work: Path, *options: str
) -> Iterator[tuple[str, Outcome | str]]:
    """Verify an engine as it is, and with each damage; of one that cannot be, say why."""
    yield "nothing", outcome(engine, reference, work / "sound", *options)
    for name in PLACES:
        damage = Damage(name)
        if reason := damage.obstacle(engine.manifest.config):
            yield name, reason
            continue
        hurt = damage.apply(engine, work / name.replace(" ", "_"))
        yield name, outcome(hurt, reference, work / f"{name} report", *options)


def summarized(engine: Engine, output: Path, reference: Path, *options: str) -> dict[str, Any]:
    """Run `porttool summarize --check-accuracy` on an engine beside the reference's results."""
    output.mkdir()
    shutil.copy(reference, output)
    status = invoke(
        ["summarize", str(engine.path), "--test-engine", "--check-accuracy", "--json",
         "--output", str(output), "--runner-set", "device", "cpu", *options]
    )  # fmt: skip
    report = json.loads((output / "report.json").read_bytes())
    verdicts = [v for v in report["verdicts"] if v["passed"] is not True]
    return {"status": status, "failed": {v["name"]: [v["found"], v["bound"]] for v in verdicts}}


def as_json(found: Outcome | str) -> dict[str, Any]:
    """Return an outcome, or why there is none, as JSON."""
    return {"does_not_apply": found} if isinstance(found, str) else asdict(found)
