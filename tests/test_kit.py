"""The conformance kit can fail: every kind of mistake in a family trips the check made for it."""

from __future__ import annotations

import json
import re
import socket
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points

import pytest
import torch

from porttool import cli, plugins
from porttool.catalog import Plugin
from porttool.errors import CheckFailed, PluginError, UsageError
from porttool.gpt2_layout import gpt2_config, read_gpt2_config
from porttool.plugins import GROUP, load_registry
from porttool.testing import cases, find_cases, isolation, run_checks
from porttool.weights import WeightMap, take
from porttool_camel5b.conformance import Camel5bConformance
from porttool_camel5b.converter import Camel5bConverter
from porttool_gpt2.conformance import GPT2Conformance
from porttool_gpt2.converter import GPT2Converter


def with_exact_gelu(self, config):
    return read_gpt2_config(config).model_copy(update={"activation": "gelu"})


class WrongActivation(GPT2Converter):
    read_config = with_exact_gelu


class WrongEpsilon(GPT2Converter):
    def read_config(self, config):
        return super().read_config(config).model_copy(update={"norm_eps": 1e-6})


class SwappedNorms(GPT2Converter):
    def weight_map(self, config):
        table = super().weight_map(config)
        norms = {
            f"layers.{{i}}.norm{a}.{part}": take(f"h.{{i}}.ln_{b}.{part}")
            for a, b in ((1, 2), (2, 1))
            for part in ("weight", "bias")
        }
        return replace(table, rules={**table.rules, **norms})


class OneNormTwice(GPT2Converter):
    """Reads ln_1 where ln_2 belongs, and calls ln_2 unused."""

    def weight_map(self, config):
        table = super().weight_map(config)
        wrong = {f"layers.{{i}}.norm2.{p}": take(f"h.{{i}}.ln_1.{p}") for p in ("weight", "bias")}
        return WeightMap({**table.rules, **wrong}, unused=("*.ln_2.*",))


class TakesAnything(GPT2Converter):
    def weight_map(self, config):
        return replace(super().weight_map(config), unused=("*",))

    def config(self, source):
        values = json.loads((source / "config.json").read_text())
        values.pop("porttool_unknown_key", None)
        return gpt2_config(values, source / "config.json")

    def matches(self, source):
        return True


class Downloads(GPT2Converter):
    def open(self, source):
        with socket.socket() as connection:
            connection.connect(("192.0.2.1", 80))
        return super().open(source)


def failure_of(case: type, check: str) -> str | None:
    """Why one check of a case fails, or None."""
    case.setup_class()
    try:
        return cases.failure(case, f"test_{check}")
    finally:
        case.teardown_class()


def with_converter(converter: type) -> type:
    class Case(GPT2Conformance):
        def specimen(self, seed=0):
            made = super().specimen(seed)
            made.converter = converter()
            return made

    return Case


@pytest.mark.parametrize(
    ("converter", "check", "why"),
    [
        (GPT2Converter, "logits", None),
        (WrongActivation, "logits", "seed 0, 7 tokens: .* apart at position"),
        (WrongEpsilon, "logits", "apart at position"),
        (SwappedNorms, "logits", "apart at position"),
        (OneNormTwice, "greedy_tokens", "where the reference chooses"),
        (TakesAnything, "detection", "'gpt2' also recognises what is not its own"),
        (TakesAnything, "unknown_config_key", "a key that nobody knows was read"),
        (TakesAnything, "extra_tensor", "a source with h.0.attn.c_attn.bias.extra passed"),
        (Downloads, "no_network", r"the network was asked for: .*192\.0\.2\.1"),
    ],
)
def test_a_wrong_converter_is_caught(converter, check, why):
    found = failure_of(with_converter(converter), check)
    assert (found is None) if why is None else re.search(why, str(found)), found


class DefaultWeights(GPT2Conformance):
    def write_source(self, path, seed):
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=67, n_positions=32, n_embd=32, n_layer=2, n_head=4,
                            bos_token_id=0, eos_token_id=0)  # fmt: skip
        GPT2LMHeadModel(config).save_pretrained(path)


class OneSeed(GPT2Conformance):
    def write_source(self, path, seed):
        super().write_source(path, 0)


class SingleHead(GPT2Conformance):
    def write_source(self, path, seed):
        super().write_source(path, seed)
        values = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**values, "n_head": 1}))


class RoundedReference(GPT2Conformance):
    def reference_logits(self, path, ids):
        return super().reference_logits(path, ids).float()


class NoSource(GPT2Conformance):
    def write_source(self, path, seed):
        raise OSError("nowhere to write")


@pytest.mark.parametrize(
    ("case", "check", "why"),
    [
        (DefaultWeights, "every_tensor_matters", "redraw every parameter"),
        (OneSeed, "logits", "seeds 0 and 1 wrote the same weights"),
        (SingleHead, "tensor_parallel", "give it 4 heads"),
        (RoundedReference, "logits", "compute both in float64"),
    ],
)
def test_a_case_that_could_prove_nothing_is_refused(case, check, why):
    assert why in str(failure_of(case, check))


def test_a_cause_of_many_failures_is_told_once(monkeypatch, capsys):
    monkeypatch.setattr(GPT2Converter, "weight_map", lambda self, config: WeightMap({}))
    assert cli.invoke(["plugins", "check", "gpt2"]) == 1
    shown = "".join(capsys.readouterr().out.split())
    assert shown.count("GPT2Conformance│logits│") == 1
    assert shown.count("noweight") == 1
    assert re.search(r"FAIL│GPT2Conformance│tensorparallel│[0-9.]+│thesameas", shown)


def test_a_failure_of_a_familys_own_code_names_the_place():
    class Case(GPT2Conformance):
        def write_source(self, path, seed):
            super().write_source(path / "nowhere", {}["seed"])

    said = failure_of(Case, "logits")
    assert re.fullmatch(r"KeyError: 'seed' \(write_source, test_kit\.py:\d+\)", said)


def test_a_case_that_cannot_be_written_fails_every_check():
    results = list(run_checks(NoSource))
    assert len(results) == 14
    assert not any(r.passed for r in results)
    assert all(r.detail.startswith("OSError: nowhere to write (write_source, ") for r in results)


def test_pickles_and_archives_are_seen(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "merges.txt").write_text("a b\n")
    isolation.require_plain(tmp_path)
    torch.save({"a": 1}, tmp_path / "state")
    with pytest.raises(CheckFailed, match="state: is a pickle or an archive"):
        isolation.require_plain(tmp_path)
    torch.save({"a": 1}, tmp_path / "state", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckFailed, match="state: is a pickle or an archive"):
        isolation.require_plain(tmp_path)
    (tmp_path / "state").unlink()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckFailed, match="holds no safetensors"):
        isolation.require_plain(tmp_path)


def test_cases_are_found_by_plugin_and_by_family(registry):
    assert find_cases(registry, "gpt2") == [GPT2Conformance]
    assert {c.__name__ for c in find_cases(registry, "santacoder")} == {
        "BigCodeConformance",
        "SantaCoderConformance",
        "StarCoderConformance",
    }
    assert [c.__name__ for c in find_cases(registry, "starcoder")] == ["StarCoderConformance"]
    with pytest.raises(UsageError, match=r"no plugin or family named 'gpt3' .did you mean 'gpt2'"):
        find_cases(registry, "gpt3")
    with pytest.raises(UsageError, match=r"the plugin 'torch' brings no family of models"):
        find_cases(registry, "torch")


def test_a_reader_that_no_case_uses_is_not_said_to_conform(capsys):
    """GPT-2's cases hold no Megatron file: they say nothing of that reader."""
    assert cli.invoke(["plugins", "check", "gpt2/megatron"]) == 2
    assert "'gpt2/megatron' is one reader of a family, which is" in capsys.readouterr().err


def test_a_family_that_takes_anothers_source_is_caught(monkeypatch):
    monkeypatch.setattr(Camel5bConverter, "recognises", lambda self, config: False)
    why = "a source of the installed family 'camel5b' is taken for it"
    assert failure_of(GPT2Conformance, "detection") == why


def test_a_plugin_of_one_module_has_no_case_and_a_damaged_case_is_named(monkeypatch, tmp_path):
    assert not cases.is_there("pluggy._manager.conformance")
    (tmp_path / "porttool_damaged.py").write_text("raise RuntimeError('not today')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match="porttool_damaged: RuntimeError: not today"):
        cases.cases_in("porttool_damaged")


def test_a_broken_plugin_is_not_checked():
    registry = load_registry()
    registry.plugins.append(Plugin("sick", "porttool-sick", "0", "ImportError: no"))
    with pytest.raises(PluginError, match="'sick' is broken: ImportError: no"):
        cases.find_plugin(registry, "sick")


HALF_A_CLASS = """
from porttool import HuggingFaceConverter, hookimpl
api_version = 1
class Half(HuggingFaceConverter):
    name = family = "half"
@hookimpl
def porttool_converters(): return [Half]
"""


def test_a_plugin_whose_hook_fails_is_named_as_broken(monkeypatch, tmp_path):
    (tmp_path / "porttool_half.py").write_text(HALF_A_CLASS)
    monkeypatch.syspath_prepend(tmp_path)
    found = [*entry_points(group=GROUP), EntryPoint("half", "porttool_half", GROUP)]
    for module in (plugins, cases):
        monkeypatch.setattr(module, "entry_points", lambda group: found)
    why = "PluginError: Half has no model_types"
    with pytest.raises(PluginError, match=f"'half' is broken: {why}"):
        find_cases(load_registry(), "half")
    with pytest.raises(UsageError, match=f"set aside: half of unknown unknown .{why}"):
        find_cases(load_registry(), "halves")


def test_anothers_case_that_fails_is_named(monkeypatch):
    monkeypatch.setattr(GPT2Conformance, "sizes", {"n_embd": 5, "n_head": 2})
    said = failure_of(Camel5bConformance, "detection")
    assert "GPT2Conformance of the installed family 'gpt2' writes no source" in said
    assert "ValueError" in said
    assert "PORTTOOL_DISABLE_PLUGINS" in said


def test_the_command_shows_a_table_and_exits_with_1_on_failure(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.invoke(["plugins", "check", "gpt2"]) == 0
    assert "14 checks, 0 failed" in capsys.readouterr().out
    monkeypatch.setattr(GPT2Converter, "read_config", with_exact_gelu)
    assert cli.invoke(["plugins", "check", "gpt2"]) == 1
    shown = capsys.readouterr()
    assert re.search(r"FAIL +│ GPT2Conformance │ logits +│.*apart at position", shown.out)
    assert "14 checks, 1 failed" in shown.out
    assert "gpt2 does not conform: 1 of 14 checks failed" in shown.err
    assert cli.invoke(["plugins", "check", "gpt2", "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [c["check"] for c in checks if not c["passed"]] == ["logits"]
