"""What is disturbed: a conversion and builds, what reads their output, and when that is whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from faults.stage import Outcome, Stage

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "gpt2-news"


@dataclass(frozen=True)
class Work:
    """A command without its output, and the commands that read that output.

    `{source}`, `{checkpoint}` and `{output}` in them stand for paths.
    """

    name: str
    command: str
    readers: tuple[str, ...]
    reads: str = "checkpoint"


CHECKPOINT_READERS = ("inspect {output}", "build {output} --output {output}-engine")
ENGINE_READERS = (
    "inspect {output}",
    "run {output} --input-text x --max-output-len 2",
    "verify {output} --hf-model {source}",
)
WORKS = {
    work.name: work
    for work in (
        Work("convert", "convert {source} --model gpt2", CHECKPOINT_READERS, "source"),
        Work("build torch", "build {checkpoint} --dtype bfloat16", ENGINE_READERS),
        Work("build torch, shared files", "build {checkpoint}", ENGINE_READERS),
        Work("build onnx", "build {checkpoint} --engine onnx", ENGINE_READERS),
    )
}


class Place:
    """A folder with a source, its checkpoint, and what undisturbed works made of them."""

    def __init__(
        self, folder: Path, stage: Stage, source: Path = DEMO, *, prove_readers: bool = True
    ) -> None:
        self.folder = folder
        self.stage = stage
        self.prove_readers = prove_readers
        self.source = folder / "source"
        self.checkpoint = folder / "checkpoint"
        shutil.copytree(source, self.source)
        self.whole: dict[str, dict[str, str]] = {}
        self.events: dict[str, int] = {}
        outcome = stage.run(self.arguments(WORKS["convert"], self.checkpoint))
        assert outcome.status == 0, outcome.said

    def fill(self, command: str, output: Path | None = None) -> list[str]:
        """Put the paths into a command."""
        paths = {"source": self.source, "checkpoint": self.checkpoint, "output": output}
        return [word.format(**paths) for word in command.split(" ")]

    def arguments(self, work: Work, output: Path) -> list[str]:
        """Return the command of a work with its output."""
        return [*self.fill(work.command), "--output", str(output)]

    def undisturbed(self, work: Work) -> dict[str, str]:
        """Return the hashes of what a work makes when it is left alone; note its events."""
        if work.name not in self.whole:
            output = self.folder / "undisturbed" / work.name.replace(" ", "-")
            output.parent.mkdir(parents=True, exist_ok=True)
            outcome = self.stage.run(self.arguments(work, output), watch=output.parent)
            assert outcome.status == 0, outcome.said
            self.whole[work.name] = digests(output)
            self.events[work.name] = outcome.events
            for reader in work.readers if self.prove_readers else ():
                outcome = self.stage.run(self.fill(reader, output))
                assert outcome.status == 0, f"{reader} does not read whole output: {outcome.said}"
            shutil.rmtree(output.parent)
        return self.whole[work.name]


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder."""
    return {
        f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def partial_of(output: Path) -> Path:
    """Return where an output is while it is written."""
    return output.with_name(f".{output.name}.partial")


def taken_for_whole(place: Place, work: Work, output: Path) -> list[str]:
    """Return the commands that did not refuse what is at the output, or crashed on it."""
    wrong = []
    for reader in work.readers:
        outcome = place.stage.run(place.fill(reader, output))
        if not outcome.refused:
            wrong.append(f"{reader}: status {outcome.status}, {last_line(outcome.said)}")
    return wrong


def is_whole(folder: Path, whole: dict[str, str]) -> bool:
    """Tell whether a folder's files are those of an undisturbed run, but for a journal."""
    found = digests(folder)
    found.pop("journal.jsonl", None)
    return found == whole


def last_line(text: str) -> str:
    """Return the end of an output, for a table."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def judge_left(place: Place, work: Work, output: Path) -> list[str]:
    """Say what is wrong with what a fault left: at the output, and in the folder beside it."""
    whole = place.undisturbed(work)
    wrong = []
    for path in (output, partial_of(output)):
        if path == output and path.exists() and not is_whole(path, whole):
            wrong.append(f"{path.name} is there and is not what an undisturbed run makes")
        if not (path.exists() and is_whole(path, whole)):
            wrong += taken_for_whole(place, work, path)
    return wrong


def judge_again(place: Place, work: Work, output: Path, outcome: Outcome) -> list[str]:
    """Say what is wrong with what the same command, run again, has left."""
    wrong = []
    if outcome.status == 0 and not is_whole(output, place.undisturbed(work)):
        wrong.append("the second run's result is not what an undisturbed run makes")
    if outcome.status != 0 and not outcome.refused:
        wrong.append(f"the second run ended with {outcome.status}: {last_line(outcome.said)}")
    rest = [p.name for p in output.parent.iterdir() if p.name.startswith(f".{output.name}.")]
    if outcome.status == 0 and rest:
        wrong.append(f"left behind: {', '.join(rest)}")
    return wrong


def describe(digest: dict[str, str]) -> str:
    """Return one hash over all files, for the record."""
    return hashlib.sha256(json.dumps(digest, sort_keys=True).encode()).hexdigest()[:16]
