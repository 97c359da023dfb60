"""Which tiles an engine gets at build and at load: measured by a double, on GPUs that are names."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import PTXASError

import tiny
from porttool import api
from porttool.builder import BuildRequest
from porttool.cli import invoke as porttool
from porttool.config import Limits, Sampling
from porttool.engine import Engine
from porttool.engines.torch import cuda_limits, tiles
from porttool.engines.torch.builder import TorchBuilder
from porttool.engines.torch.cuda_limits import require_memory
from porttool.engines.torch.cuda_rule import default_tuning
from porttool.engines.torch.cuda_tuning import AttentionTile
from porttool.engines.torch.tile_cache import TileKey
from porttool.engines.torch.tiles import tiles_at_build, tiles_at_load
from porttool.errors import EngineError, UsageError
from porttool.generate import generate
from porttool.nn import Step, meta_decoder
from porttool.progress import Progress

HERE, ELSEWHERE = "GPU of this machine", "GPU of another"
MEASURED = AttentionTile(5, 16)
"""No rule chooses that."""


class Machine:
    """A GPU by name, the tuner's double that counts its calls, and what was said."""

    def __init__(self) -> None:
        self.gpu = HERE
        self.multiprocessors = 132
        self.calls: list[dict] = []
        self.said: list[str] = []
        self.failure: BaseException | None = None

    def tune(self, config, **settings):
        self.calls.append({"config": config, **settings})
        if self.failure:
            raise self.failure
        settings["report"]("1 rows: measured by the double")
        tuning = default_tuning(config, "cpu")
        return replace(tuning, gpu=self.gpu, multiprocessors=self.multiprocessors,
                       attention=MEASURED).as_dict()  # fmt: skip

    @property
    def told(self) -> str:
        return "\n".join(self.said)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a GPU, whose user has an empty cache; no model is too small."""
    made = Machine()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tiles, "gpu_name", lambda device: made.gpu)
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: made.multiprocessors)
    monkeypatch.setattr(tiles, "release", lambda device: None)
    monkeypatch.setattr(tiles, "WORTH_BYTES", 0)
    monkeypatch.setattr("porttool.engines.torch.cuda_tune.tune", made.tune)
    return made


@pytest.fixture
def request_(checkpoint):
    limits = Limits(max_batch_size=20, max_input_len=30, max_output_len=10)
    return BuildRequest("float32", limits, checkpoint.config)


@pytest.fixture
def engine(checkpoint, tmp_path):
    """An engine that says that it was tuned on another machine."""
    return tuned_engine(checkpoint, tmp_path / "engine", ELSEWHERE)


def tuned_engine(checkpoint, output, gpu, **changes):
    made = tiny.built(checkpoint, output, dtype="float32", builder_options={"tune": False})
    tuning = replace(default_tuning(checkpoint.config, "cpu"), gpu=gpu, **changes).as_dict()
    return with_record(made, {"tuning": tuning})


def with_record(engine, record):
    tiny.edit_manifest(engine.path / "engine.json", built=[{"rank": 0, **record}])
    return Engine.open(engine.path)


def cached_file(tmp_path):
    (file,) = (tmp_path / "cache" / "porttool").glob("tiles-*.json")
    return file


class Notes(Progress):
    def __init__(self, said):
        self.said = said

    def note(self, text):
        self.said.append(text)


# ---- at build -------------------------------------------------------------------------------


def test_build_measures_where_there_is_a_gpu(machine, checkpoint, tmp_path):
    """Ranks of one shape share it, and so does the next build; `tune` true measures again."""
    for n_calls, tune, n_ranks in ((0, "auto", 3), (1, "auto", 1), (1, "auto", 1), (2, True, 3)):
        name = f"{len(machine.calls)} {n_calls} {len(machine.said)}"
        limits = Limits(max_batch_size=20, max_input_len=30, max_output_len=10)
        built = tiny.built(checkpoint, tmp_path / name, world_size=n_ranks, dtype="float32",
                           limits=limits, builder_options={"tune": tune},
                           progress=Notes(machine.said))  # fmt: skip
        assert len(machine.calls) == n_calls
        told = [text for text in machine.said if "an engine of --tp 1 can" in text]
        assert len(told) == (1 if n_calls < 2 else 2)  # once a build of several ranks
        for record in built.manifest.built:
            if n_calls == 0:
                assert record["not_tuned"] == "no runner takes several ranks yet"
                continue
            assert record["tuning"]["gpu"] == HERE
            assert record["tuning"]["attention"] == {**vars(MEASURED)}
    assert machine.calls[1]["config"].n_head == 1
    assert machine.calls[0]["batch_sizes"] == (1, 16, 20)
    assert machine.calls[0]["context"] == 30
    assert machine.calls[0]["dtype"] == torch.float32
    assert "for batches of 1, 16, 20" in machine.told
    assert "measured by the double" in machine.told
    assert f"tiles as measured on {HERE} before" in machine.told
    assert "1 rows: attention 5 x 16" in machine.told


def test_measured_steps_stay_within_the_positions(machine, request_):
    """Measured steps start at the longest prompt: learned positions have to reach beyond it."""
    tiles_at_build(request_, "auto", machine.said.append)
    assert request_.config.n_positions == 48
    assert machine.calls[0]["config"].n_positions >= 30 + 128


def test_build_without_a_gpu(machine, request_, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = tiles_at_build(request_, "auto", machine.said.append)
    assert found.record() == {"not_tuned": "torch sees no GPU"}
    assert "torch sees no GPU" in machine.told
    assert "`--set retune true`" in machine.told
    with pytest.raises(UsageError, match="tune was asked for, but torch sees no GPU"):
        tiles_at_build(request_, True, machine.said.append)
    assert not machine.calls


def test_build_that_is_told_not_to(machine, request_):
    found = tiles_at_build(request_, False, machine.said.append)
    assert found.record() == {"not_tuned": "tune was false"}
    assert not machine.calls
    assert not machine.said


def test_a_tiny_model_is_measured_only_if_asked(machine, request_, monkeypatch):
    monkeypatch.setattr(tiles, "WORTH_BYTES", 64 << 20)
    assert tiles_at_build(request_, "auto", machine.said.append).tuning is None
    assert not machine.calls
    assert not machine.said
    assert tiles_at_build(request_, True, machine.said.append).tuning


def test_build_for_what_the_kernels_cannot(machine, request_):
    double = replace(request_, dtype="float64")
    assert "not in float64" in tiles_at_build(double, "auto", machine.said.append).reason
    assert "not in float64" in machine.told
    with pytest.raises(UsageError, match="not in float64"):
        tiles_at_build(double, True, machine.said.append)


def test_build_with_too_little_memory(machine, request_):
    machine.failure = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
    found = tiles_at_build(request_, "auto", machine.said.append)
    assert "Tried to allocate 9 GiB" in found.record()["not_tuned"]
    assert "until it is loaded there with `--set retune true`" in machine.told
    with pytest.raises(EngineError, match="Tried to allocate 9 GiB"):
        tiles_at_build(request_, True, machine.said.append)


def test_build_interrupted_while_measuring(machine, checkpoint, tmp_path, capsys):
    machine.failure = KeyboardInterrupt()
    output = tmp_path / "engine"
    assert porttool(["build", str(checkpoint.path), "--output", str(output)]) == 130
    assert "measuring the kernels' tiles" in capsys.readouterr().err
    assert not output.exists()
    machine.failure = None
    assert porttool(["build", str(checkpoint.path), "--output", str(output)]) == 0
    assert "measured by the double" in capsys.readouterr().err
    assert Engine.open(output).manifest.built[0]["tuning"]["gpu"] == HERE
    assert len(machine.calls) == 2


@pytest.mark.parametrize("value", ["auto", True, False])
def test_the_option(value):
    assert TorchBuilder({"tune": value}).options.tune == value
    with pytest.raises(UsageError, match="perhaps"):
        TorchBuilder({"tune": "perhaps"})


# ---- at load --------------------------------------------------------------------------------


def test_the_same_gpu_takes_the_engines_own(machine, checkpoint, tmp_path):
    engine = tuned_engine(checkpoint, tmp_path / "own", HERE, attention=MEASURED)
    for retune in ("auto", True, False):
        found = tiles_at_load(engine, "cuda", retune, machine.said.append)
        assert found.tuning.attention == MEASURED
    assert not machine.calls
    assert not machine.said


def test_the_tiles_of_an_engine_that_knew_no_staged_ones(machine, checkpoint, tmp_path):
    engine = tuned_engine(checkpoint, tmp_path / "old", HERE, attention=MEASURED)
    tuning = engine.manifest.built[0]["tuning"]
    products = [tile for group in tuning["wide"].values() for tile in group.values()]
    for tile in (tuning["attention"], *tuning["wide_attention"].values(), *products):
        del tile["staged"]
    found = tiles_at_load(with_record(engine, {"tuning": tuning}), "cuda", "auto", print)
    assert found.tuning.attention == MEASURED
    assert not any(tile.staged for tile in found.tuning.wide["32"].values())
    assert not machine.calls


def test_another_gpu_measures_once(machine, engine, tmp_path):
    for n in range(2):
        machine.said.clear()
        found = tiles_at_load(engine, "cuda", "auto", machine.said.append)
        assert (found.tuning.gpu, found.tuning.attention) == (HERE, MEASURED)
        assert f"it was tuned on {ELSEWHERE}, and this is {HERE}" in machine.told
        assert ("measuring the kernels' tiles" in machine.told) == (n == 0)
        assert (str(cached_file(tmp_path)) in machine.told) == (n == 0)
    assert "taking the tiles measured on" in machine.told
    assert [c["batch_sizes"] for c in machine.calls] == [(1, 4)]
    machine.gpu = "GPU of a third"
    tiles_at_load(engine, "cuda", "auto", machine.said.append)
    assert len(machine.calls) == 2


def test_a_gpu_of_one_name_with_fewer_multiprocessors(machine, checkpoint, tmp_path):
    """A slice of a card, say. Engines from before the count was recorded go by the name."""
    whole = tuned_engine(checkpoint, tmp_path / "whole", HERE, multiprocessors=132)
    for n_calls, count in ((0, 132), (1, 66), (1, 66), (1, 132), (2, 33)):
        machine.said.clear()
        machine.multiprocessors = count
        found = tiles_at_load(whole, "cuda", "auto", machine.said.append)
        assert found.tuning.multiprocessors == count
        assert len(machine.calls) == n_calls
        reason = f"it was tuned on {HERE} with 132 multiprocessors, and this one has {count}"
        assert (reason in machine.told) == (count != 132)
    old = with_record(whole, {"tuning": tuning_without_count(whole)})
    assert tiles_at_load(old, "cuda", "auto", print).tuning
    assert len(machine.calls) == 2


def tuning_without_count(engine):
    tuning = engine.manifest.built[0]["tuning"]
    return {name: tuning[name] for name in tuning if name != "multiprocessors"}


def cut(file):
    file.write_bytes(file.read_bytes()[:200])


def changed(file):
    file.write_text(file.read_text().replace('"block_k":', '"block_k": 1', 1))


def unknown(file):
    file.write_text(json.dumps({**json.loads(file.read_text()), "also": 1}))


def foreign(file):
    tiny.edit_manifest(file, key={**json.loads(file.read_text())["key"], "gpu": ELSEWHERE})


def of_other_kernels(file):
    tiny.edit_manifest(file, tuning={**json.loads(file.read_text())["tuning"], "stream": {}})


def binary(file):
    file.write_bytes(bytes(range(256)))


def folder(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [cut, changed, unknown, foreign, of_other_kernels, binary])
def test_a_damaged_cache_is_said_and_measured_again(machine, engine, tmp_path, damage):
    tiles_at_load(engine, "cuda", "auto", machine.said.append)
    file = cached_file(tmp_path)
    whole = file.read_text()
    damage(file)
    machine.said.clear()
    found = tiles_at_load(engine, "cuda", "auto", machine.said.append)
    assert found.tuning.attention == MEASURED
    assert str(file) in machine.said[0]
    assert "cannot be read" in machine.said[0] or "measured again" in machine.said[0]
    assert len(machine.calls) == 2
    assert file.read_text() == whole


def test_a_cache_that_cannot_be_written(machine, engine, tmp_path, monkeypatch):
    place = tmp_path / "file"
    place.write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    for _ in range(2):
        found = tiles_at_load(engine, "cuda", "auto", machine.said.append)
        assert found.tuning.attention == MEASURED
    assert len(machine.calls) == 2
    assert "could not be kept for the next time" in machine.told


def test_a_folder_in_the_files_place(machine, engine, tmp_path):
    tiles_at_load(engine, "cuda", "auto", machine.said.append)
    folder(cached_file(tmp_path))
    assert tiles_at_load(engine, "cuda", "auto", machine.said.append).tuning
    assert "cannot be read" in machine.told
    assert "could not be kept" in machine.told


def test_retune_false_takes_the_rules(machine, engine):
    """Even where tiles were measured: the same engine runs in the same tiles everywhere."""
    tiles_at_load(engine, "cuda", "auto", machine.said.append)
    machine.said.clear()
    found = tiles_at_load(engine, "cuda", False, machine.said.append)
    assert found.tuning is None
    assert f"it was tuned on {ELSEWHERE}, and this is {HERE}; retune is false" in machine.told
    assert "it runs in the rule's tiles" in machine.told
    assert len(machine.calls) == 1


def test_an_engine_that_was_never_tuned(machine, engine):
    engine = with_record(engine, {"not_tuned": "torch sees no GPU"})
    found = tiles_at_load(engine, "cuda", "auto", machine.said.append)
    assert found.tuning is None
    assert "not measured at build (torch sees no GPU); `--set retune true`" in machine.told
    assert not machine.calls
    assert tiles_at_load(engine, "cuda", True, machine.said.append).tuning
    assert len(machine.calls) == 1
    machine.said.clear()
    assert tiles_at_load(engine, "cuda", "auto", machine.said.append).tuning
    assert "taking the tiles measured on" in machine.told
    assert len(machine.calls) == 1


def test_of_a_tiny_model_nothing_is_said(machine, engine, monkeypatch):
    monkeypatch.setattr(tiles, "WORTH_BYTES", 64 << 20)
    engine = with_record(engine, {"not_tuned": "so small a model gains nothing"})
    assert tiles_at_load(engine, "cuda", "auto", machine.said.append).tuning is None
    assert not machine.said


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        EngineError("the GPU has 1 GB free"),
        PTXASError("a tile does not compile"),
    ],
)
def test_what_cannot_be_measured_at_load(machine, engine, failure):
    machine.failure = failure
    assert tiles_at_load(engine, "cuda", "auto", machine.said.append).tuning is None
    assert f"it runs in the rule's tiles: they could not be measured: {failure}" in machine.told


def test_tiles_of_other_kernels_are_measured_again(machine, checkpoint, tmp_path):
    engine = tuned_engine(checkpoint, tmp_path / "old", HERE, stream={})
    found = tiles_at_load(engine, "cuda", "auto", machine.said.append)
    assert found.tuning.attention == MEASURED
    assert "its tiles are of another version of the kernels" in machine.told


def test_the_smallest_model_is_measured_in_bounded_work(request_):
    """Cold weights would be tens of thousands of layers of this one."""
    from porttool.engines.torch.cuda_measure import tuning_config

    assert tuning_config(request_.config).n_layer == 256


def test_weights_that_are_on_the_gpu_do_not_need_room_again(request_, monkeypatch):
    """Both the runner and the tuner put them there before the cache is allocated."""
    limits = Limits(max_batch_size=2, max_input_len=1000, max_output_len=1)
    weights = sum(t.numel() for t in meta_decoder(request_.config).state_dict().values()) * 4
    cache = 2 * 2 * 3 * 24 * 1001 * 4
    passing = 5000 + cuda_limits.LIBRARY_BYTES + 2 * 4 * 2 * request_.config.vocab_size
    free = {"cuda": (cache + passing, 0)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", free.get)
    asked = []
    monkeypatch.setattr(cuda_limits, "prefill_bytes", lambda *a: asked.append(a) or 5000)
    there = SimpleNamespace(nbytes=weights, device=torch.device("cuda"))
    half = SimpleNamespace(nbytes=weights // 2, device=torch.device("cuda"))
    here = SimpleNamespace(nbytes=weights, device=torch.device("cpu"))
    need = partial(require_memory, request_.config, torch.float32, limits, "cuda")
    need(given={"a": there})
    need(given={"a": half, "b": half})
    assert asked[-1][1:] == (weights + cache, 4, 2, 2002)  # all that the cache holds
    free["cuda"] = (cache + passing - 1, 0)
    with pytest.raises(EngineError, match="for a while: build with --max-batch-size 1"):
        need(given={"a": there})
    with pytest.raises(EngineError, match="build with --max-batch-size 1"):
        need(given={"a": half, "b": here})
    with pytest.raises(EngineError, match="the GPU has"):
        need(given={"a": here})


def test_what_a_key_tells_apart(request_):
    def key(gpu=HERE, count=132, sizes=(1, 16), triton="3", **changes):
        config = request_.config.model_copy(update=changes)
        return TileKey.of(replace(request_, config=config), gpu=gpu, multiprocessors=count,
                          batch_sizes=sizes, triton=triton).file_name  # fmt: skip

    assert key() == key(n_positions=99, norm_eps=1e-6, attention_scale=0.3)
    others = {key(), key(gpu=ELSEWHERE), key(sizes=(1,)), key(triton="4"), key(d_ff=7),
              key(activation="relu"), key(n_layer=9), key(count=66)}  # fmt: skip
    assert len(others) == 8


# ---- through the runner ---------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run the kernels")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on masked lanes
def test_the_runner_asks_for_them(machine, engine, monkeypatch, caplog):
    """Under the interpreter: an engine tuned elsewhere loads, says so, and runs."""
    from porttool.engines.torch.runner import TorchRunner

    step = Step.prefill([[5]])
    wanted = api.load(engine.path, options={"device": "cpu"}).runner.step(step)
    monkeypatch.setattr(TorchRunner, "_make_decoder", TorchRunner._cuda)
    for options, measured in (({}, True), ({"retune": False}, False)):
        caplog.clear()
        runner = api.load(engine.path, options={"device": "cpu", **options}).runner
        assert (runner._decoder.tuning.attention == MEASURED) == measured
        assert ("not tuned" in runner.description) == (not measured)
        assert f"it was tuned on {ELSEWHERE}" in caplog.text
        assert all(record.levelno == logging.WARNING for record in caplog.records)
        if measured:
            torch.testing.assert_close(runner.step(step), wanted, rtol=0, atol=1e-4)
    assert len(machine.calls) == 1


def greedy(runner):
    found = generate(runner, tiny.PROMPTS, Sampling(max_new_tokens=6), eos=())
    return [completion.tokens for (completion,) in found]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_retuning_on_a_gpu(engine, monkeypatch, tmp_path, caplog):
    """Measured for real, once; tokens as on the CPU, whatever the tiles."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wanted = greedy(api.load(engine.path, options={"device": "cpu"}).runner)
    for first in (True, False):
        caplog.clear()
        runner = api.load(engine.path, options={"device": "cuda"}).runner
        assert f"it was tuned on {ELSEWHERE}, and this is" in caplog.text
        assert ("tuned for 4 rows" in caplog.text) == first
        assert str(cached_file(tmp_path)) in caplog.text or not first
        assert "not tuned" not in runner.description
        assert greedy(runner) == wanted
    runner = api.load(engine.path, options={"device": "cuda", "retune": False}).runner
    assert "not tuned" in runner.description
    assert greedy(runner) == wanted
