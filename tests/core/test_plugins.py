"""Plugins that are broken, blocked, doubled or misspelt. A healthy stranger is in test_echo.py."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from porttool import cli, errors, plugins
from porttool.checkpoint import PluginRecord
from porttool.cli.console import ConsoleProgress
from porttool.errors import MissingExtra, PluginError, SourceError, UsageError
from porttool.evaluator import Evaluator, Port, Report, Verdict, evaluate
from porttool.evaluators.rouge import score_summaries
from porttool.evaluators.transformers_folder import load_config
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
CLASS = "api_version = 1\nclass C(Converter):\n    name = family = 'c'\n"
READS = """
    def matches(self, source): return False
    def open(self, source): pass
    def read_config(self, config): pass
    def weight_map(self, config): pass
@hookimpl
def porttool_converters(): return [C]
"""
BROKEN = {
    "import": ("import there_is_no_such_module", "ModuleNotFoundError: No module named"),
    "syntax": ("def", "SyntaxError"),
    "exit": ("raise ValueError('at import')", "ValueError: at import"),
    "sys.exit": ("import sys; sys.exit('it needs another Python')",
                 "SystemExit: it needs another Python"),
    "sys.exit in a hook": (HEAD + "api_version = 1\n@hookimpl\ndef porttool_converters(): exit(3)",
                           "SystemExit: 3"),
    "no version": (HEAD, "its module does not say api_version = 1"),
    "other version": (HEAD + "api_version = 99", "it says api_version = 99, this porttool needs"),
    "hook": (HEAD + "api_version = 1\n@hookimpl\ndef porttool_convertors(): return []",
             "there is no hook named 'porttool_convertors'; did you mean porttool_converters"),
    "signature": (HEAD + "api_version = 1\n@hookimpl\ndef porttool_converters(everything): pass",
                  "everything"),
    "raises": (HEAD + "api_version = 1\n@hookimpl\ndef porttool_converters(): 1 / 0",
               "ZeroDivisionError"),
    "none": (HEAD + "api_version = 1\n@hookimpl\ndef porttool_converters(): return None",
             "porttool_converters returned None, not a list of Converter classes"),
    "no list": (HEAD + "api_version = 1\n@hookimpl\ndef porttool_converters(): return Converter",
                "not a list of Converter classes"),
    "no hook": (HEAD + "api_version = 1\ndef porttool_converters(): return []",
                "it implements no hook; porttool_converters lacks @hookimpl"),
    "no family": (HEAD + "api_version = 1\nclass C(Converter):\n    name = 'c'\n" + READS,
                  "C has no family"),
    "no model types": (HEAD + "api_version = 1\nfrom porttool import HuggingFaceConverter\n"
                       "class C(HuggingFaceConverter):\n    name = family = 'c'\n" + READS,
                       "C has no model_types"),
    "model types a text": (HEAD + "api_version = 1\nfrom porttool import HuggingFaceConverter\n"
                           "class C(HuggingFaceConverter):\n    name = family = 'c'\n"
                           "    model_types = 'opt'\n" + READS,
                           "C.model_types is a text, not a set of texts"),
    "other arguments": (HEAD + CLASS + READS.replace("map(self, config)", "map(self)"),
                        "C.weight_map has to take (self, config): too many positional"),
    "required option": (HEAD + CLASS + "    class Options(Converter.Options):\n        n: int\n"
                        + READS, "bad option for 'c': n: Field required"),
    "bad default": (HEAD + CLASS + "    class Options(Converter.Options):\n"
                    "        n: int = 'many'\n" + READS, "n: Input should be a valid integer"),
    "options no model": (HEAD + CLASS + "    class Options:\n        n = 1\n" + READS,
                         "C.Options is no pydantic model"),
    "open options": (HEAD + "from pydantic import BaseModel\n" + CLASS
                     + "    class Options(BaseModel):\n        n: int = 1\n" + READS,
                     "C.Options takes unknown names silently"),
    "not a class": (HEAD + "api_version = 1\n@hookimpl\ndef porttool_converters(): return [3]",
                    "porttool_converters returned 3, not a Converter class"),
    "wrong kind": (HEAD + "api_version = 1\n@hookimpl\ndef porttool_runners(): return [Converter]",
                   "not a Runner class"),
    "abstract": (HEAD + "api_version = 1\nclass C(Converter):\n    name = 'c'\n    family = 'c'\n"
                 "@hookimpl\ndef porttool_converters(): return [C]",
                 "C lacks matches, open"),
    "refines nothing": (HEAD + "api_version = 1\nfrom porttool import Refinement\n"
                        "class C(Refinement):\n    name = family = 'c'\n"
                        "    def recognises(self, config): return True\n"
                        "@hookimpl\ndef porttool_converters(): return [C]", "C has no refines"),
    "no name": (HEAD + "api_version = 1\nclass C(Converter):\n    pass\n"
                "@hookimpl\ndef porttool_converters(): return [C]", "C has no family, name"),
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


def test_an_engine_without_a_docstring_is_listed(install, capsys):
    text = HEAD + "from porttool import Builder\napi_version = 1\n"
    text += "class B(Builder):\n    name = 'plain'\n"
    text += "    def build_rank(self, checkpoint, request, rank, *, out, progress): pass\n"
    install(stranger=text + "@hookimpl\ndef porttool_builders(): return [B]\n")
    assert cli.invoke(["plugins", "list", "--json"]) == 0
    components = json.loads(capsys.readouterr().out)["components"]
    assert [c["what"] for c in components if c["name"] == "plain"] == [""]


def test_everything_that_comes_with_porttool_is_healthy(registry):
    _ = registry.catalogs
    assert [f"{p.name}: {p.error}" for p in registry.plugins if p.error] == []
    assert {"gpt2", "camel5b"} <= registry.converters.classes.keys()
    assert "torch" in registry.builders.classes.keys() & registry.runners.classes.keys()
    assert {p.distribution for p in registry.plugins} == {"porttool"}


def test_two_plugins_with_a_component_of_one_name_are_both_set_aside(install, capsys):
    text = HEAD + "api_version = 1\n" + ONE.format(name="gpt2", body="pass")
    registry = install(stranger=text)
    assert status(registry, "stranger") == status(registry, "gpt2")
    said = str(status(registry, "gpt2"))
    assert "the converter 'gpt2' comes from two plugins: gpt2 of porttool " in said
    assert "stranger of unknown" in said
    assert "PORTTOOL_DISABLE_PLUGINS" in said
    assert "gpt2" not in registry.converters.classes
    assert "santacoder" in registry.converters.classes  # nothing else breaks
    with pytest.raises(UsageError, match=r"'gpt2'.*comes from two plugins"):
        registry.converters.get("gpt2")
    assert cli.invoke(["plugins", "list"]) == 0
    assert "two plugins" in " ".join(capsys.readouterr().out.split())


def test_two_entry_points_of_one_name_are_both_set_aside(install, tmp_path, monkeypatch):
    install(one=HEAD + CLASS + READS, two=HEAD + CLASS + READS)
    found = [EntryPoint("gpt2", module, plugins.GROUP) for module in ("one", "two")]
    santacoder = EntryPoint("santacoder", "porttool_santacoder", plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [*found, santacoder])
    registry = load_registry()
    assert [p.name for p in registry.plugins if not p.error] == ["santacoder"]
    said = "unknown unknown and unknown unknown bring a plugin of this name; uninstall one"
    assert [p.error for p in registry.plugins if p.error] == [f"PluginError: {said}"] * 2
    assert "c" not in registry.converters.classes


def test_what_is_missing_may_be_left_out_or_set_aside(install, monkeypatch):
    monkeypatch.setenv("PORTTOOL_DISABLE_PLUGINS", "gpt2")
    registry = install(stranger="import nothing_here")
    made = PluginRecord(component="gpt2", distribution="porttool", version="0.1.0", api_version=1)
    with pytest.raises(PluginError) as caught:
        registry.require(registry.converters, made, "it was converted by")
    assert "; plugins set aside: stranger of unknown unknown (ModuleNotFound" in str(caught.value)
    assert str(caught.value).endswith("; PORTTOOL_DISABLE_PLUGINS leaves out: gpt2")


COMMANDS = """
@hookimpl
def porttool_commands(cli):
    cli.command("fine-{name}")(lambda: None)
    {more}
"""
ADDS = "cli.command({!r})(lambda: None)"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        (ADDS.format("convert"), "PluginError: there is a command named convert already"),
        (ADDS.format("fine-first"), "PluginError: there is a command named fine-first already"),
    ],
)
def test_commands_that_fail_or_take_a_name_are_set_aside(install, capsys, more, said):
    head = HEAD + "api_version = 1\n"
    install(
        first=head + COMMANDS.format(name="first", more="pass"),
        second=head + COMMANDS.format(name="second", more=more),
    )
    group = cli.LazyGroup()
    assert group.list_commands(None) == [*cli.COMMANDS, "fine-first"]
    assert cli.invoke(["plugins", "list", "--json"]) == 0
    broken = json.loads(capsys.readouterr().out)["broken"]
    assert broken == [{"name": "second", "distribution": "unknown", "error": said}]


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


def matching(raised, head=CLASS):
    """A plugin whose converter raises this when it is shown a source."""
    return HEAD + head + READS.replace("return False", f"raise {raised}")


@pytest.mark.parametrize("raised", ["KeyError('model_type')", "IsADirectoryError('x')"])
def test_a_converter_that_fails_on_a_source_leaves_it_to_the_others(install, source, raised):
    registry = install(stranger=matching(raised))
    assert plugins.choose_converter(registry, source).name == "gpt2"
    assert raised.partition("(")[0] in status(registry, "stranger")


def test_where_nobody_else_knows_a_source_what_failed_is_named(install, tmp_path):
    registry = install(stranger=matching("KeyError('model_type')"), other="import nothing_here")
    with pytest.raises(UsageError) as caught:
        plugins.choose_converter(registry, tmp_path)
    said = str(caught.value)
    assert "plugins set aside: " in said
    assert "stranger of unknown unknown (KeyError: 'model_type')" in said
    assert "other of unknown unknown (ModuleNotFoundError: No module named" in said
    with pytest.raises(UsageError, match=r"no converter named 'other' .*; plugins set aside: "):
        registry.converters.get("other")


def test_another_name_is_not_proposed_for_what_was_set_aside(install):
    registry = install(gpt9="import nothing_here")
    with pytest.raises(UsageError, match=r"named 'gpt9' \(installed: .*set aside: gpt9 of unknown"):
        registry.converters.get("gpt9")


def test_a_refinement_that_fails_is_not_passed_over(install, source):
    refining = CLASS + "    refines = 'gpt2'\n"
    registry = install(stranger=matching("KeyError('model_type')", refining))
    with pytest.raises(PluginError, match=r"'c' of stranger of .* KeyError: 'model_type'; mend it"):
        plugins.choose_converter(registry, source)


def test_a_refinement_of_what_is_not_installed_stops_nobody(monkeypatch, source):
    monkeypatch.setenv("PORTTOOL_DISABLE_PLUGINS", "gpt2")
    with pytest.raises(UsageError, match=r"camel5b .*there is no converter named 'gpt2'"):
        plugins.choose_converter(load_registry(), source)


def test_an_error_from_within_a_plugin_names_it(install, tmp_path, source, capsys):
    body = "def read_config(self, config): return {}['n_layer']"
    text = HEAD + "api_version = 1\n" + ONE.format(name="other", body=body)
    install(stranger=text)
    assert cli.invoke(["convert", str(source), "--model", "other", "-o", str(tmp_path / "o")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "Traceback" in said
    assert "error: the plugin 'stranger' of unknown unknown failed in read_config, " in said
    assert "stranger.py:10: KeyError: 'n_layer'" in said


def test_a_config_of_another_kind_names_the_method(install, source):
    body = "def read_config(self, config): return {}"
    registry = install(stranger=HEAD + "api_version = 1\n" + ONE.format(name="other", body=body))
    with pytest.raises(PluginError, match=r"Other\.read_config returned a dict, not a ModelConfig"):
        registry.converter("other").config(source)


def test_an_error_of_porttools_own_is_not_blamed_on_a_plugin(install, monkeypatch):
    install(stranger=HEAD + CLASS + READS)

    def broken(*arguments, **options):
        raise KeyError("ours")

    monkeypatch.setattr(cli.cli, "main", broken)
    with pytest.raises(KeyError, match="ours"):
        cli.invoke(["plugins"])


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


def test_weights_without_their_config_are_called_that(registry, tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UsageError, match=r"this \(there are weights in it, and no config.json\);"):
        plugins.choose_converter(registry, tmp_path)


def test_a_missing_extra_names_the_command():
    assert str(MissingExtra("eval", "rouge_score")) == (
        "the package 'rouge_score' is not installed; install it with pip install 'porttool[eval]'"
    )


@pytest.mark.parametrize("found", ["4.46.3", "5.3.9+local", "5.4.0rc1", "6.0.dev0"])
def test_an_extra_that_is_too_old_says_what_is_needed(monkeypatch, found, source):
    """Nothing holds an environment to the versions of an extra that was not asked for."""
    monkeypatch.setattr(errors, "version", {"transformers": found}.__getitem__)
    if found >= "5.4":
        load_config(source)
        return
    with pytest.raises(MissingExtra) as caught:
        load_config(source)
    assert str(caught.value) == (
        f"the package 'transformers' is there in version {found}, and porttool needs 5.4: "
        "pip install --upgrade 'porttool[reference]'"
    )


def test_an_extra_of_another_distribution_has_no_version(monkeypatch):
    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", raise_absent)
    errors.require_extra("onnx", "onnxruntime")


def raise_absent(name):
    raise importlib.metadata.PackageNotFoundError(name)


class Stray(Evaluator):
    """An evaluator that returns whatever its options say."""

    name = "stray"
    found = None

    def run(self, port, output, *, progress):
        """Return it."""
        return self.found


def test_an_evaluator_that_returns_no_report_is_named(tmp_path):
    with pytest.raises(PluginError, match=r"Stray\.run returned a NoneType, not a Report"):
        evaluate(Stray(), Port(), tmp_path / "report")


def test_measurements_that_are_no_json_do_not_lose_the_verdicts(tmp_path, capsys):
    verdict = Verdict(name="count", passed=True, found="3", bound="3")
    stray = Stray()
    stray.found = Report(evaluator="stray", engine="e", reference="r", verdicts=(verdict,),
                         measurements={"count": object()})  # fmt: skip
    with pytest.raises(PluginError, match=r"'stray' measured what JSON cannot hold: .*object"):
        evaluate(stray, Port(), tmp_path / "report", progress=ConsoleProgress())
    assert "pass: count: 3, bound 3" in capsys.readouterr().err


def test_modules_that_nobody_installed(monkeypatch, source):
    """On PYTHONPATH, or in an executable that was packed without its metadata."""
    monkeypatch.setattr(plugins, "entry_points", lambda group: [])
    with pytest.raises(UsageError, match=r"named 'torch' \(installed: none\); no plugin is insta"):
        load_registry().builders.get("torch")
    with pytest.raises(UsageError, match=r"even those that come with porttool: .* install it"):
        plugins.choose_converter(load_registry(), source)


def test_an_extra_that_is_there_and_does_not_load_says_why(tmp_path, monkeypatch):
    (tmp_path / "rouge_score.py").write_text("raise ImportError('it needs another numpy')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rouge_score", raising=False)
    monkeypatch.delitem(sys.modules, "rouge_score.rouge_scorer", raising=False)
    with pytest.raises(MissingExtra, match="is installed and does not load: it needs another num"):
        score_summaries(["a"], ["b"])


def test_help_imports_nothing_large():
    """It answers in a tenth of a second; each of these takes half of that, or much more."""
    code = (
        "import sys; from porttool.cli import invoke; invoke(['--help']); "
        "print([m for m in ('pydantic', 'numpy', 'rich', 'torch', 'transformers') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
