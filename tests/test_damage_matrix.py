"""Every family with every damage: `porttool verify` exits with 1 and names the place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import damage_matrix as matrix
import tiny
from damage_matrix import Outcome
from porttool.checkpoint import Checkpoint
from porttool.cli import invoke
from scripts import imported

ASKED = {
    "scrambled layer", "swapped norms", "other gelu", "shifted positions", "wrong rotary fraction",
    "transposed projection", "another group's head", "noise of 2 %",
}  # fmt: skip
APPLIES_NOT = {
    "multi-query": {"another group's head"},
    "gpt_next": {"other gelu"},
    "learned": {"wrong rotary fraction"},
}
"""Kind of family → what cannot be done to it of what is asked for."""


@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_a_family(tmp_path, capsys, family):
    [engine] = matrix.engines(family, tmp_path, ("float32",))
    config = engine.manifest.config
    found = dict(matrix.damaged(engine, tmp_path / matrix.REFERENCE, tmp_path, *matrix.SMALL))
    capsys.readouterr()
    sound = found.pop("nothing")
    assert (sound.status, sound.failed) == (0, ())
    assert config.n_head * config.head_dim == config.d_model  # what is transposed keeps its shape
    kinds = [k for k in APPLIES_NOT if k in family or k == config.position]
    inapplicable = set().union(*(APPLIES_NOT[k] for k in kinds))
    assert {n for n, o in found.items() if isinstance(o, str)} & ASKED == inapplicable
    for name, outcome in found.items():
        if isinstance(outcome, Outcome):
            assert outcome.status == 1, name
            assert {"prefill", "decode"} <= set(outcome.failed), f"{name}: {outcome.failed}"
            assert outcome.place == matrix.place_of(name, config), name


def test_prompt_tuning(tmp_path, capsys):
    """With a prompt table before every prompt; the table itself is damaged too."""
    [engine] = matrix.tuned(tmp_path, ("float32",))
    config = engine.manifest.config
    (tmp_path / "tables").mkdir()
    table, reference = tmp_path / "table", tmp_path / matrix.REFERENCE
    with_table = ("--prompt-table", str(table), *matrix.SMALL)
    found = dict(matrix.damaged(engine, reference, tmp_path, *with_table))
    tables = dict(
        matrix.damaged_tables(engine, reference, table, tmp_path / "tables", *matrix.SMALL)
    )
    capsys.readouterr()
    assert found.pop("nothing").status == 0
    for name, outcome in found.items():
        if isinstance(outcome, Outcome):
            assert (outcome.status, outcome.place) == (1, matrix.place_of(name, config))
    for name, outcome in tables.items():
        assert outcome.status == 1, name
        assert {"prompt table", "prefill"} <= set(outcome.failed), name
        assert outcome.place == "embedding.out"


def test_a_table_needs_its_source_and_room(tmp_path, capsys):
    [engine] = matrix.tuned(tmp_path, ("float32",))
    small = tiny.built(Checkpoint.open(tmp_path / "checkpoint"), tmp_path / "small")
    asked = ["--hf-model", str(tmp_path / matrix.REFERENCE), "--output", str(tmp_path / "out"),
             "--prompt-table", str(tmp_path / "table")]  # fmt: skip
    assert invoke(["verify", str(small.path), *asked]) == 2
    assert "the engine has room for 0" in capsys.readouterr().err
    (tmp_path / "prompts").rename(tmp_path / "moved")
    assert invoke(["verify", str(engine.path), *asked]) == 2
    assert "is not there to compare it with" in capsys.readouterr().err


def test_the_page_shows_what_was_recorded():
    root = Path(__file__).parents[1]
    bench = imported("bench/damage.py")
    recorded = json.loads((root / "bench" / "results" / "damage.json").read_bytes())
    page = (root / "docs" / "reliability.md").read_text()
    assert all(table in page for table in bench.tables(recorded).strip().split("\n\n"))
    entries = [e for by_type in recorded["families"].values() for e in by_type.values()]
    assert set(recorded["families"]) == set(matrix.FAMILIES)
    for found in (*entries, *recorded["demo"].values(), *recorded["prompt_tuning"].values()):
        for name, outcome in found.items():
            statuses = [outcome.get("status"), outcome.get("summarize", {}).get("status")]
            assert set(statuses) <= {None, int(name != "nothing")}, name
