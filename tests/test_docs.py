"""The documents are true: snippets run, examples are the files, lists are complete."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import drawn
from porttool import hookspecs
from scripts import imported

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLE = ROOT / "examples" / "porttool_llama"
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def environment(folder: Path) -> dict[str, str]:
    """Variables under which pip installs into a folder that Python looks into."""
    site = folder / "site"
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(site),
        "PIP_TARGET": str(site),
        "PIP_UPGRADE": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this one the wrong way round
        "PIP_QUIET": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "300",
    }


def run(command: list[str], folder: Path) -> tuple[int, str]:
    """Run a command; return its exit status and everything that it printed."""
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def pattern(line: str) -> re.Pattern[str]:
    """What a line of a document stands for: `...` is anything, spaces are any spaces."""
    parts = [r"\s+".join(map(re.escape, part.split())) for part in line.split("...")]
    return re.compile(".*".join(parts))


def check_console(text: str, folder: Path) -> None:
    """Type every line that begins with $; find what follows it in what is printed, in order."""
    for session in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, *expected = session.splitlines()
        status, printed = run(["bash", "-c", command], folder)
        fails = any(line.startswith("error: ") for line in expected)
        assert bool(status) == fails, f"$ {command}\n{printed}"
        lines = iter(printed.splitlines())
        for line in filter(lambda text: text.strip(" ."), expected):
            wanted = pattern(line)
            assert any(wanted.search(found) for found in lines), f"{line!r} is not in\n{printed}"


def follow(document: Path, folder: Path) -> dict[str, str]:
    """Do what a document says; return the files that it wrote."""
    written: dict[str, str] = {}
    (folder / "examples").symlink_to(ROOT / "examples")
    for language, title, body in FENCE.findall(document.read_text()):
        if title:
            written[title] = "\n".join(filter(None, (written.get(title), body)))
            (folder / title).parent.mkdir(parents=True, exist_ok=True)
            (folder / title).write_text(written[title])
        elif language == "console":
            check_console(body, folder)
        elif language == "python":
            status, printed = run([sys.executable, "-c", body], folder)
            assert status == 0, printed
    return written


def without_blank_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def test_the_tutorial_runs_and_is_the_example(tmp_path):
    written = follow(DOCS / "tutorial.md", tmp_path)
    ours = {title: text for title, text in written.items() if title.startswith("porttool-llama/")}
    assert len(ours) == 3
    for title in ours:
        made, kept = tmp_path / title, EXAMPLE / title.removeprefix("porttool-llama/")
        assert without_blank_lines(made.read_text()) == without_blank_lines(kept.read_text()), title
    for name in ("pyproject.toml", "porttool_llama/__init__.py"):
        assert (tmp_path / "porttool-llama" / name).read_text() == (EXAMPLE / name).read_text()


def test_the_way_to_a_published_plugin_runs(tmp_path):
    follow(DOCS / "plugins.md", tmp_path)


def test_a_document_that_lies_is_caught(tmp_path):
    check_console("$ echo one two\none ...\n", tmp_path)
    with pytest.raises(AssertionError, match="'three' is not in"):
        check_console("$ echo one two\nthree\n", tmp_path)
    with pytest.raises(AssertionError):
        check_console("$ exit 3\n", tmp_path)
    check_console("$ echo error: no; exit 1\nerror: no\n", tmp_path)


def test_every_hook_is_documented():
    page = (DOCS / "hooks.md").read_text()
    hooks = [(n, f) for n, f in vars(hookspecs).items() if n.startswith("porttool_")]
    assert len(hooks) >= 5
    for name, function in hooks:
        assert f"`{name}({', '.join(inspect.signature(function).parameters)})`" in page


def test_what_every_class_of_a_plugin_has_to_say_is_documented():
    from porttool import Builder, Converter, Evaluator, HuggingFaceConverter, Refinement, Runner
    from porttool.prompt_table import TableConverter
    from porttool.vetting import undeclared

    page = (DOCS / "hooks.md").read_text()
    kinds = (Converter, HuggingFaceConverter, Refinement, TableConverter)
    for kind in (*kinds, Builder, Runner, Evaluator):
        row = next(line for line in page.splitlines() if line.startswith(f"| `{kind.__name__}`"))
        said = row.split(" | ")[1]
        for name in kind.__abstractmethods__:
            found = inspect.signature(getattr(kind, name)).parameters.values()
            bare = [p.replace(annotation=p.empty, default=p.empty) for p in found]
            written = str(inspect.Signature(bare)).replace("(self, ", f"{name}(")
            assert f"`{written}`" in said, (kind.__name__, written)
        for name in set(undeclared(kind)) - {"name"}:
            assert f"`{name}`" in said, (kind.__name__, name)


def test_every_check_of_the_kit_is_documented():
    from porttool.testing import FamilyConformance
    from porttool.testing.cases import check_names

    page = (DOCS / "plugins.md").read_text()
    for name in check_names(FamilyConformance):
        assert name.removeprefix("test_").replace("_", " ") in page


def test_the_command_line_page_is_what_help_says():
    found = (DOCS / "cli.md").read_text()
    assert found == imported("docs/make_cli.py").cli_page(), "run: python docs/make_cli.py"


@pytest.mark.parametrize("group", [(), ("plugins",)])
def test_the_list_of_commands_cuts_no_sentence_off(group):
    from click.testing import CliRunner

    from porttool.cli import cli

    shown = CliRunner().invoke(cli, [*group, "--help"], env={"COLUMNS": "80"}).output
    listed = shown.partition("Commands:")[2].splitlines()
    assert len(listed) > 2
    assert [line for line in listed if line.endswith("...")] == []


COMMAND = re.compile(
    r"`(?:mpirun -np \d+ )?(porttool [^`]+)`|^(?: {4}|\$ )(porttool .+)$", re.MULTILINE
)


def typed_commands() -> list[str]:
    """Every command line of porttool's in the documents, without what is said behind it."""
    pages = [*DOCS.rglob("*.md"), ROOT / "README.md"]
    found = [a or b for page in pages for a, b in COMMAND.findall(page.read_text())]
    return [re.split(r"(?<!\\n)(?<! ) {2,}|\\$| · ", line)[0].strip() for line in found]


def options_are_known(line: str) -> None:
    """Parse a command line without running it; click.UsageError for an option there is not."""
    from porttool.cli import cli

    words = shlex.split(line.replace("$'", "'"))[1:]
    command, context = cli, click.Context(cli)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        command = command.get_command(context, words.pop(0))
        assert command, line
        context = click.Context(command, parent=context)
    command.make_parser(context).parse_args(words)


def test_every_command_in_a_document_has_its_options():
    lines = typed_commands()
    assert len(lines) > 70
    for line in lines:
        options_are_known(line)
    with pytest.raises(click.NoSuchOption):
        options_are_known("porttool convert gpt2 --never-there 1")


def test_what_the_decoder_can_say_is_whole():
    from porttool.config import ModelConfig
    from porttool.nn import meta_decoder

    page = (DOCS / "plugins.md").read_text()
    assert [f for f in ModelConfig.model_fields if f"`{f}`" not in page] == []
    config = drawn.shape("gpt2").model_copy(update={"tied_head": False})
    names = {re.sub(r"layers\.\d+", "layers.{i}", n) for n in meta_decoder(config).state_dict()}
    assert [n for n in names if n.endswith(".weight") and f"`{n}`" not in page] == []


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_between_documents_lead_somewhere():
    pages = [*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "examples").rglob("*.md")]
    found = [(p, t) for p in pages for t in re.findall(r"\]\(([^):]+)\)", p.read_text())]
    assert len(found) > 60
    for page, target in found:
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"
