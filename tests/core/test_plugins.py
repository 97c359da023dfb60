"""Plugins that are broken, blocked, doubled or misspelt. A healthy stranger is in test_echo.py."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import EntryPoint

import pytest

from porttool import plugins
from porttool.errors import MissingExtra, PluginError, SourceError, UsageError
from porttool.plugins import load_registry

HEAD = "from porttool import Converter, hookimpl\n"
ONE = """
@hookimpl
def porttool_converters():
    from porttool_gpt2.converter import GPT2Converter
    class Other(GPT2Converter):
        name = {name!r}
        family = "other"
        {body}
    return [Other]
"""
BROKEN = {
    "import": ("import there_is_no_such_module", "ModuleNotFoundError: No module named"),
    "syntax": ("def", "SyntaxError"),
    "exit": ("raise ValueError('at import')", "ValueError: at import"),
    "no version": (HEAD, "it says api_version = None, this porttool needs 1"),
    "other version": (HEAD + "api_version = 99", "it says api_version = 99, this porttool needs"),
    "hook": (HEAD + "api_version = 1\n@hookimpl\ndef porttool_convertors(): return []",
             "there is no hook named 'porttool_convertors'"),
    "signature": (HEAD + "api_version = 1\n@hookimpl\ndef porttool_converters(everything): pass",
                  "everything"),
    "raises": (HEAD + "api_version = 1\n@hookimpl\ndef porttool_converters(): 1 / 0",
               "ZeroDivisionError"),
    "none": (HEAD + "api_version = 1\n@hookimpl\ndef porttool_converters(): return None",
             "TypeError"),
    "not a class": (HEAD + "api_version = 1\n@hookimpl\ndef porttool_converters(): return [3]",
                    "porttool_converters returned 3, not a Converter"),
    "wrong kind": (HEAD + "api_version = 1\n@hookimpl\ndef porttool_runners(): return [Converter]",
                   "not a Runner"),
    "abstract": (HEAD + "api_version = 1\nclass C(Converter):\n    name = 'c'\n    family = 'c'\n"
                 "@hookimpl\ndef porttool_converters(): return [C]",
                 "C lacks matches, open"),
    "no name": (HEAD + "api_version = 1\nclass C(Converter):\n    pass\n"
                "@hookimpl\ndef porttool_converters(): return [C]", "C has no name"),
}  # fmt: skip


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put modules beside the installed plugins, each under an entry point of its own name."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(**modules):
        found = list(importlib.metadata.entry_points(group=plugins.GROUP))
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)
            sys.modules.pop(name, None)
            found.append(EntryPoint(name, name, plugins.GROUP))
        monkeypatch.setattr(plugins, "entry_points", lambda group: found)
        importlib.invalidate_caches()
        return load_registry()

    return add


def status(registry, name):
    _ = registry.catalogs
    return next(p.error for p in registry.plugins if p.name == name)


@pytest.mark.parametrize(("text", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_set_aside_and_explained(install, text, said):
    registry = install(stranger=text)
    assert said in status(registry, "stranger")
    assert status(registry, "gpt2") is None
    assert "gpt2" in registry.converters.classes


def test_everything_that_comes_with_porttool_is_healthy(registry):
    _ = registry.catalogs
    assert [f"{p.name}: {p.error}" for p in registry.plugins if p.error] == []
    assert {"gpt2", "camel5b"} <= registry.converters.classes.keys()
    assert "torch" in registry.builders.classes.keys() & registry.runners.classes.keys()
    assert {p.distribution for p in registry.plugins} == {"porttool"}


def test_a_name_that_is_taken_names_both(install):
    text = HEAD + "api_version = 1\n" + ONE.format(name="gpt2", body="pass")
    registry = install(stranger=text)
    with pytest.raises(PluginError) as caught:
        _ = registry.converters
    said = str(caught.value)
    assert "the converter 'gpt2' comes from two plugins: gpt2 of porttool " in said
    assert "stranger of unknown" in said
    assert "PORTTOOL_DISABLE_PLUGINS" in said


def test_a_clash_goes_away_when_one_is_denied(install, monkeypatch):
    monkeypatch.setenv("PORTTOOL_DISABLE_PLUGINS", " stranger , other")
    text = HEAD + "api_version = 1\n" + ONE.format(name="gpt2", body="pass")
    assert "gpt2" in install(stranger=text).converters.classes


def test_only_what_is_allowed(install, monkeypatch):
    monkeypatch.setenv("PORTTOOL_PLUGINS", "gpt2,torch")
    registry = install(stranger="raise SystemError")
    assert [p.name for p in registry.plugins] == ["gpt2", "torch"]
    assert list(registry.converters.classes) == [
        c for c in registry.converters.classes if c.startswith("gpt2")
    ]


def test_an_unknown_model_has_a_suggestion(registry, source):
    with pytest.raises(UsageError) as caught:
        registry.converters.get("camel-5b")
    said = str(caught.value)
    assert "there is no converter named 'camel-5b'; did you mean 'camel5b'?" in said
    assert "installed: camel5b, gpt2" in said
    with pytest.raises(UsageError, match=r"no evaluator named 'x' \("):
        registry.evaluators.get("x")
    with pytest.raises(UsageError, match="no converter named 'gtp2'; did you mean 'gpt2'"):
        plugins.choose_converter(registry, source, "gtp2")


def test_two_that_match_without_a_tie_break(install, source):
    text = HEAD + "api_version = 1\n" + ONE.format(name="other", body="pass")
    with pytest.raises(UsageError, match=r"several converters match: gpt2, other; choose one with"):
        plugins.choose_converter(install(stranger=text), source)


def test_the_one_that_refines_goes_first(install, source):
    text = HEAD + "api_version = 1\n" + ONE.format(name="other", body="refines = 'gpt2'")
    assert plugins.choose_converter(install(stranger=text), source).name == "other"


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("", UsageError, "no installed family recognises this; `porttool plugins"),
        ('{"model_type": "mamba"}', UsageError, "recognises this .its config.json says model_type"),
        ('{"model_type": ', SourceError, "config.json: damaged JSON"),
    ],
)
def test_nobody_recognises_it(registry, tmp_path, text, error, said):
    if text:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=said):
        plugins.choose_converter(registry, tmp_path)


def test_a_missing_extra_names_the_command():
    assert str(MissingExtra("eval", "rouge_score")) == (
        "the package 'rouge_score' is not installed; install it with pip install 'porttool[eval]'"
    )
