"""Damage every family in every way and in every type; record what `porttool verify` makes of it.

The trained demo model is damaged too, and `porttool summarize --check-accuracy` run on it. The
families are those of tests/damage_matrix.py; the result lies in results/damage.json.

    python bench/damage.py                run everything, and write the result
    python bench/damage.py --table        print the recorded result as docs/reliability.md has it
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULT = HERE / "results" / "damage.json"
DEMO = HERE.parent / "examples" / "demo"
DTYPES = ("float32", "float16", "bfloat16")
RECIPE = (
    "--dataset", str(DEMO / "articles.jsonl"), "--max-articles", "40", "--max-new-tokens", "60",
    "--max-input-len", "412",
)  # fmt: skip
RUNGS = {
    "config": "config", "weights": "weights", "prefill": "logits", "decode": "logits",
    "decode, several tokens a step": "logits", "greedy tokens": "tokens",
    "arithmetic in float32": "arithmetic", "prompt table": "prompt table",
}  # fmt: skip
"""Name of a verdict → what the table calls it."""

Results = Mapping[str, Any]


def measure_families(work: Path) -> dict[str, Any]:
    """Verify every family in every type, sound and damaged."""
    import damage_matrix as matrix

    found: dict[str, Any] = {}
    for i, family in enumerate(matrix.FAMILIES):
        place = work / str(i)
        place.mkdir()
        found[family] = {}
        engines = matrix.engines(family, place, DTYPES)
        for engine, dtype in zip(engines, DTYPES, strict=True):
            here = place / f"{dtype} damaged"
            here.mkdir()
            with silence():
                outcomes = dict(matrix.damaged(engine, place / matrix.REFERENCE, here))
            found[family][dtype] = {n: matrix.as_json(o) for n, o in outcomes.items()}
            caught = sum(o.get("status") == 1 for o in found[family][dtype].values())
            print(f"{family}, {dtype}: {caught} of {len(outcomes) - 1} caught", flush=True)
    return found


def measure_demo(work: Path) -> dict[str, Any]:
    """Verify the trained demo model and compare its summaries, in every type."""
    import damage_matrix as matrix
    import tiny
    from porttool.cli import invoke
    from porttool.evaluators.damage import Damage

    source, found = DEMO / "gpt2-news", {}
    checkpoint = tiny.converted(source, work / "checkpoint")
    built = {dtype: tiny.built(checkpoint, work / dtype, dtype=dtype) for dtype in DTYPES}
    reference = work / "reference"
    asked = ["summarize", str(built["float32"].path), "--test-hf", "--hf-model", str(source),
             "--output", str(reference), *RECIPE]  # fmt: skip
    with silence():
        if invoke(asked):
            raise SystemExit("the reference did not run")
    for dtype, engine in built.items():
        here = work / f"{dtype} damaged"
        here.mkdir()
        with silence():
            outcomes = dict(matrix.damaged(engine, source, here))
        found[dtype] = {name: matrix.as_json(o) for name, o in outcomes.items()}
        for name, entry in found[dtype].items():
            if "status" not in entry:
                continue
            damaged = Damage(name).apply(engine, here / f"{name} again")
            with silence():
                entry["summarize"] = matrix.summarized(
                    damaged, here / f"{name} summaries", reference / "reference.json", *RECIPE
                )
            print(f"demo, {dtype}, {name}: {entry['status']} {entry['summarize']}", flush=True)
    return found


def measure_tables(work: Path) -> dict[str, Any]:
    """Verify GPT-2 with a prompt table in every type: sound, damaged, and the table damaged."""
    import damage_matrix as matrix

    found: dict[str, Any] = {}
    for engine, dtype in zip(matrix.tuned(work, DTYPES), DTYPES, strict=True):
        here = work / f"{dtype} damaged"
        (here / "tables").mkdir(parents=True)
        table, reference = work / "table", work / matrix.REFERENCE
        with silence():
            outcomes = dict(matrix.damaged(engine, reference, here, "--prompt-table", str(table)))
            tables = dict(matrix.damaged_tables(engine, reference, table, here / "tables"))
        found[dtype] = {n: matrix.as_json(o) for n, o in (outcomes | tables).items()}
        print(f"prompt_tuning, {dtype}: {[o.get('status') for o in found[dtype].values()]}")
    return found


PARTS = {"families": measure_families, "demo": measure_demo, "prompt_tuning": measure_tables}


def measure(parts: list[str], output: Path) -> dict[str, Any]:
    """Run some parts, and keep what was recorded of the others."""
    import torch
    import transformers

    torch.set_num_threads(1)
    results = json.loads(output.read_bytes()) if output.is_file() else {}
    results.update(torch=torch.__version__, transformers=transformers.__version__)
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            (Path(folder) / part).mkdir()
            results[part] = PARTS[part](Path(folder) / part)
    return results


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep the commands' own output away."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def tables(results: Results) -> str:
    """Return the recorded result as tables in Markdown."""
    shown = [status_table(results), rung_table(results), prompt_table(results), demo_table(results)]
    return "\n\n".join(shown) + "\n"


def status_table(results: Results) -> str:
    """Exit statuses by damage and family in each type, the places named, and why there are none."""
    families = {**results["families"], "prompt_tuning, on gpt2": results["prompt_tuning"]}
    heads = ["damage", *families, "place named", "does not apply (-) where"]
    lines = [row(heads), row(["---"] * len(heads))]
    for damage in damages(results):
        cells, places, reasons = [], set(), set()
        for by_type in families.values():
            found = [by_type[dtype][damage] for dtype in DTYPES]
            if "does_not_apply" in found[0]:
                cells.append("-")
                reasons.add(found[0]["does_not_apply"])
                continue
            cells.append(" ".join(str(o["status"]) for o in found))
            places |= {f"`{o['place']}`" for o in found if o["place"]}
        lines.append(row([damage, *cells, ", ".join(sorted(places)), ", ".join(sorted(reasons))]))
    return "\n".join(lines)


def rung_table(results: Results) -> str:
    """Which rungs say no, in how many of the families that a damage applies to."""
    lines = [row(["damage", *DTYPES]), row(["---"] * (len(DTYPES) + 1))]
    for damage in damages(results)[1:]:
        cells = []
        for dtype in DTYPES:
            found = [by_type[dtype][damage] for by_type in results["families"].values()]
            failed = [{RUNGS[f] for f in o["failed"]} for o in found if "failed" in o]
            counts = {r: sum(r in f for f in failed) for r in dict.fromkeys(RUNGS.values())}
            cells.append(", ".join(
                rung if n == len(failed) else f"{rung} ({n} of {len(failed)})"
                for rung, n in counts.items() if n
            ))  # fmt: skip
        lines.append(row([damage, *cells]))
    return "\n".join(lines)


def prompt_table(results: Results) -> str:
    """What is done to the table of virtual tokens itself, and which rungs say no to it."""
    names = [n for n in results["prompt_tuning"][DTYPES[0]] if n not in damages(results)]
    lines = [row(["damage", *DTYPES, "place named", "rungs"]), row(["---"] * 6)]
    for name in names:
        found = [results["prompt_tuning"][dtype][name] for dtype in DTYPES]
        places = {f"`{o['place']}`" for o in found if o["place"]}
        rungs = [{RUNGS[f] for f in o["failed"]} for o in found]
        common = [r for r in dict.fromkeys(RUNGS.values()) if all(r in f for f in rungs)]
        statuses = [str(o["status"]) for o in found]
        lines.append(row([name, *statuses, ", ".join(sorted(places)) or "-", ", ".join(common)]))
    return "\n".join(lines)


def demo_table(results: Results) -> str:
    """The trained demo: both commands' exit status in each type, and what summarize says no to."""
    heads = [f"{command}, {dtype}" for dtype in DTYPES for command in ("verify", "summarize")]
    lines = [row(["damage", *heads]), row(["---"] * (len(heads) + 1))]
    for damage, sample in results["demo"][DTYPES[0]].items():
        if "does_not_apply" in sample:
            lines.append(row([damage, f"does not apply: {sample['does_not_apply']}", *["-"] * 5]))
            continue
        cells = []
        for dtype in DTYPES:
            entry = results["demo"][dtype][damage]
            failed = list(entry["summarize"]["failed"])
            said = failed[-1:] if len(failed) == 1 else [f"{len(failed)} verdicts"] * bool(failed)
            cells += [str(entry["status"]), " ".join([str(entry["summarize"]["status"]), *said])]
        lines.append(row([damage, *cells]))
    return "\n".join(lines)


def damages(results: Results) -> list[str]:
    """Return the damages in the order in which they were done."""
    return list(next(iter(results["families"].values()))[DTYPES[0]])


def row(cells: list[str]) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run everything, or print what was recorded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    if not args.table:
        sys.path.insert(0, str(HERE.parent / "tests"))
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
        args.output.write_text(json.dumps(measure(args.parts, args.output), indent=1) + "\n")
    print(tables(json.loads(args.output.read_bytes())))


if __name__ == "__main__":
    main()
