"""A small part of bench/soak.py: memory stays flat over generations of every kind."""

from __future__ import annotations

import json
from mmap import mmap
from pathlib import Path
from random import Random

import pytest

import soaking
from scripts import imported


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_memory_stays_flat(tmp_path, kind):
    loaded = soaking.build_engine(tmp_path, kind)
    samples = list(soaking.soak(loaded, 120, seed=1, every=10))
    warm = samples[3:]
    assert warm[-1].rss - warm[0].rss < 3_000_000  # a leaked key-value cache each time: 58 MB
    assert (warm[-1].files, warm[-1].threads) == (warm[0].files, warm[0].threads)


def test_a_leak_is_seen(monkeypatch):
    kept = []

    def leak(loaded, rng):
        kept.append(mmap(-1, 1_000_000))  # never memory that the process has had before
        kept[-1].write(b"1" * 1_000_000)

    monkeypatch.setattr(soaking, "probe", lambda loaded: (1,))
    monkeypatch.setattr(soaking, "generate_one", leak)
    samples = list(soaking.soak(None, 60, seed=1, every=5))
    assert 900_000 < soaking.growth(samples) < 1_100_000


def test_another_answer_is_seen(monkeypatch):
    answers = iter([(1, 2), (1, 2), (1, 3)])
    monkeypatch.setattr(soaking, "probe", lambda loaded: next(answers))
    monkeypatch.setattr(soaking, "generate_one", lambda loaded, rng: 0)
    with pytest.raises(AssertionError, match="another answer after 2 generations"):
        list(soaking.soak(None, 4, seed=1, every=1))


def test_every_kind_of_sampling_is_drawn():
    drawn = [soaking.draw_sampling(Random(seed)) for seed in range(60)]
    assert {s.num_beams > 1 for s in drawn} == {True, False}
    assert any(s.temperature for s in drawn)
    assert any(s.stop for s in drawn)
    assert any(s.keep_logits for s in drawn)


def test_the_page_shows_what_was_recorded():
    root = Path(__file__).parents[1]
    bench = imported("bench/soak.py")
    engines = json.loads((root / "bench" / "results" / "soak.json").read_bytes())["engines"]
    assert bench.table(engines) in (root / "docs" / "reliability.md").read_text()
    assert list(engines) == ["torch", "onnx"]
    for found in engines.values():
        assert bench.is_flat(found)
        assert found["samples"][-1][0] == 10_000
    assert not bench.is_flat({**found, "bytes_per_generation": 300})
    assert not bench.is_flat({**found, "files_added": 1})
