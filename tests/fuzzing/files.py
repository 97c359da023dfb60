"""Damage to whole files, whatever they hold."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

from fuzzing.mutate import mutate_bytes, mutate_tree


def mutated_file(
    rng: Random, file: Path, change: Callable[[Random, bytes], tuple[bytes, str]]
) -> str:
    """Change a file's content; return what was done."""
    data, said = change(rng, file.read_bytes())
    file.write_bytes(data)
    return f"{file.name}: {said}"


def damage_json(rng: Random, folder: Path, *names: str) -> str:
    """Change one JSON file as a tree."""
    file = folder / rng.choice(names)
    tree, said = mutate_tree(rng, json.loads(file.read_text()))
    file.write_text(json.dumps(tree))
    return f"{file.name}: {said}"


def damage_file(rng: Random, folder: Path, *names: str) -> str:
    """Change one file's bytes; now and then put something else in its place."""
    name = rng.choice(names)
    if rng.random() < 0.95:
        return mutated_file(rng, folder / name, mutate_bytes)
    return replace_file(rng, folder / name)


def replace_file(rng: Random, file: Path) -> str:
    """Put what is no plain file in a file's place, or nothing."""
    file.unlink()
    match kind := rng.choice(("nothing", "folder", "pipe", "dangling link", "looping link",
                              "device", "empty file")):  # fmt: skip
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "dangling link":
            file.symlink_to("nowhere")
        case "looping link":
            file.symlink_to(file.name)
        case "device":
            file.symlink_to("/dev/zero")
        case "empty file":
            file.touch()
    return f"{file.name}: {kind} in its place"
