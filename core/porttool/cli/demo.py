"""porttool demo: the whole road on real files, in a minute."""

from __future__ import annotations

from pathlib import Path

import click

from porttool.cli import console
from porttool.cli.options import FOLDER
from porttool.errors import UsageError


@click.command("demo")
@click.option("--data", type=FOLDER, default=Path("examples/demo"), show_default=True,
              help="Folder with gpt2-news/ and articles.jsonl.")  # fmt: skip
@click.option("--workdir", type=FOLDER, default=Path("porttool-out"), show_default=True,
              help="Where checkpoint, engine and report go.")  # fmt: skip
@click.option("--max-articles", type=click.IntRange(min=1), default=200, show_default=True,
              help="Articles to summarise.")  # fmt: skip
@console.without_notes()  # they tell how other commands go on
def command(data: Path, workdir: Path, max_articles: int) -> None:
    """Convert, build, prove and use a small trained GPT-2.

    Runs from a clone of the repository, which ships the model and the articles.
    """
    from porttool import api
    from porttool.workspace import Workspace

    source = data / "gpt2-news"
    if not source.is_dir():
        raise UsageError(f"{source}: no demo model here; run this in a clone, or name it by --data")
    space = Workspace(workdir / "demo")
    progress = console.ConsoleProgress()
    console.say("1. convert: the source's tensors under canonical names, every one accounted for")
    checkpoint = api.convert(source, model="gpt2", workspace=space, force=True, progress=progress)
    console.say("2. build: an engine for batches of 8")
    engine = api.build(
        model="gpt2", workspace=space, max_output_len=100, force=True, progress=progress
    )
    console.say("3. verify: is it still the same model?")
    verified = api.evaluate("parity", model="gpt2", hf_model=source, workspace=space,
                            progress=progress)  # fmt: skip
    console.show_report(verified)
    console.say("4. summarize: the same articles through the engine and through transformers")
    options = {
        "dataset": str(data / "articles.jsonl"),
        "max_articles": max_articles,
        "parity_report": str(space.report("gpt2", "parity") / "report.json"),
    }
    summarized = api.evaluate("summarize", model="gpt2", hf_model=source, workspace=space,
                              options=options, progress=progress)  # fmt: skip
    console.show_report(summarized)
    console.say(f"checkpoint {checkpoint.path}, engine {engine.path}")
    console.say(f"report {space.report('gpt2', 'summarize') / 'report.html'}")
    for report in (verified, summarized):
        report.require_pass()
