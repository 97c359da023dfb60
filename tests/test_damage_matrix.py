"""Every family with every damage: `porttool verify` exits with 1 and names the place."""

from __future__ import annotations

import pytest

import damage_matrix as matrix
from damage_matrix import Outcome

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
