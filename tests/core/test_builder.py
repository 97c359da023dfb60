from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import tiny
from porttool.builder import Rank
from porttool.engine import Engine
from porttool.errors import EngineError, SourceError, UsageError
from porttool.sharding import shard
from tiny import full_logits, reference_logits


def test_every_rank_gets_its_slices(tmp_path, checkpoint):
    engine = tiny.built(checkpoint, tmp_path / "engine", world_size=3, dtype="float16")
    assert [b["rank"] for b in engine.manifest.built] == [0, 1, 2]
    for index in range(3):
        found = load_file(next(engine.rank_path(index).glob("*.safetensors")))
        assert found.keys() == set(checkpoint.names())
        for name, tensor in found.items():
            whole = checkpoint.file_of(name).load(name)
            rank = Rank(index, 3)
            part = shard(name, checkpoint.config, rank, lambda a, b, w=whole: w[a:b], len(whole))
            assert tensor.equal(part.half())


def test_ranks_that_do_not_divide_leave_nothing(tmp_path, checkpoint):
    with pytest.raises(UsageError, match="--tp 2 does not divide n_head 3"):
        tiny.built(checkpoint, tmp_path / "engine", world_size=2)
    assert not (tmp_path / "engine").exists()


def test_one_process_does_not_run_several_ranks(tmp_path, checkpoint, registry):
    engine = tiny.built(checkpoint, tmp_path / "engine", world_size=3)
    with pytest.raises(EngineError, match="is built for 3 ranks; build it with --tp 1"):
        tiny.loaded(engine.path, registry)


def test_a_wider_engine_is_the_same_model(tmp_path, checkpoint, reference, registry):
    engine = tiny.built(checkpoint, tmp_path / "engine", dtype="float64")
    assert "the checkpoint's own" not in str(engine.manifest.built)
    found = full_logits(tiny.loaded(engine.path, registry), [1, 2, 3])
    torch.testing.assert_close(found, reference_logits(reference, [1, 2, 3]), atol=1e-9, rtol=0)


def test_a_weight_that_overflows_in_the_engines_type(tmp_path):
    model = tiny.gpt2()
    model.transformer.ln_f.weight[2] = 1e5
    source = tiny.write_source(tmp_path / "source", model)
    checkpoint = tiny.converted(source, tmp_path / "checkpoint")
    with pytest.raises(SourceError, match=r"norm\.weight: values up to 1e\+05 do not fit float16"):
        tiny.built(checkpoint, tmp_path / "engine", dtype="float16")
    with pytest.raises(UsageError, match="engine does not exist"):
        Engine.open(tmp_path / "engine")


def test_an_unknown_engine_has_a_suggestion(tmp_path, checkpoint):
    with pytest.raises(UsageError, match=r"no builder named 'torhc'; did you mean 'torch'\?"):
        tiny.built(checkpoint, tmp_path / "engine", kind="torhc")
