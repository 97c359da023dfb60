"""Programs with a part left out: problems in HumanEval's schema, and how near an answer comes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from porttool.config import InfillTokens
from porttool.errors import UsageError
from porttool.text import Tokenizer, infill_prompt

if TYPE_CHECKING:
    from porttool.evaluators.dataset import Article

Kind = Literal["completion", "infill"]

_NEXT_BLOCK = re.compile(r"\n(?=def |class |if |print\(|#|@)")
"""Where a completed function is over: the next line at the left edge (Chen et al. 2021, 3.1)."""


@dataclass(frozen=True)
class Problem:
    """A program whose part `wanted` stands between `before` and `after`."""

    id: str
    before: str
    wanted: str
    after: str

    @property
    def article(self) -> Article:
        """The same for what compares texts."""
        from porttool.evaluators.dataset import Article

        return Article(self.id, f"{self.before}\N{SYMBOL FOR NULL}{self.after}", self.wanted)


def load_problems(path: Path, kind: Kind, most: int) -> list[Problem]:
    """Read a JSON-lines file with task_id, prompt, canonical_solution and perhaps suffix.

    A completion wants the whole solution. An infilling wants what a row with a `suffix` wants;
    of a row without one, the middle line of the solution.
    """
    from porttool.evaluators.dataset import distinct, read_json_lines

    if not path.is_file():
        raise UsageError(f"{path}: there is no such file of problems")
    rows = read_json_lines(path)
    if not len(rows):
        raise UsageError(f"{path}: there are no problems in it")
    problems = [
        make_problem(rows[i], kind, f"{path}, problem {i + 1}") for i in range(min(most, len(rows)))
    ]
    distinct(str(path), [problem.article for problem in problems])
    return problems


def make_problem(row: dict[str, Any], kind: Kind, where: str) -> Problem:
    """Make a problem of a row."""
    keys = ("task_id", "prompt", "canonical_solution")
    name, before, solution = (row.get(key) for key in keys)
    if not (isinstance(name, str) and isinstance(before, str) and isinstance(solution, str)):
        raise UsageError(f"{where}: {', '.join(keys)} should be texts")
    after = row.get("suffix")
    if kind == "completion":
        return Problem(name, before, solution, "")
    if isinstance(after, str):
        return Problem(name, before, solution, after)
    return leave_out_line(name, before, solution, where)


def leave_out_line(name: str, before: str, solution: str, where: str) -> Problem:
    """Leave out the middle one of the solution's lines that are not blank."""
    lines = solution.splitlines(keepends=True)
    solid = [i for i, line in enumerate(lines) if line.strip()]
    if not solid:
        raise UsageError(f"{where}: the canonical_solution is blank")
    gap = solid[len(solid) // 2]
    return Problem(
        name, before + "".join(lines[:gap]), lines[gap], "".join(lines[gap + 1 :])
    )  # fmt: skip


def encode_problems(
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    kind: Kind,
    tokens: InfillTokens | None,
    max_input_len: int,
) -> list[list[int]]:
    """Return the token ids of every prompt; one that is empty or too long is a UsageError."""
    texts = [
        p.before if kind == "completion" else infill_prompt(tokens, p.before, p.after)
        for p in problems
    ]
    prompts = [tokenizer.encode(text) for text in texts]
    for problem, ids in zip(problems, prompts, strict=True):
        if not ids:
            raise UsageError(f"{problem.id}: the prompt has no token; leave the problem out")
        if len(ids) > max_input_len:
            raise UsageError(
                f"{problem.id}: {len(ids)} tokens, but the engine takes {max_input_len}; build "
                "it with a larger --max-input-len, or leave the problem out"
            )
    return prompts


def answer_of(text: str, kind: Kind) -> str:
    """Return the answer in a continuation: a function ends where the next block begins."""
    return _NEXT_BLOCK.split(text, maxsplit=1)[0] if kind == "completion" else text


def exact_match(answer: str, wanted: str) -> float:
    """100 if the texts are the same but for white space at both ends, else 0."""
    return 100.0 * (answer.strip() == wanted.strip())


def edit_similarity(answer: str, wanted: str) -> float:
    """100 minus the edit distance in percent of the longer text (Levenshtein 1966)."""
    a, b = answer.strip(), wanted.strip()
    longest = max(len(a), len(b))
    return 100.0 * (1 - edit_distance(a, b) / longest) if longest else 100.0


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and substitutions of characters that turn one text into the other."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


MEASURES: dict[str, Callable[[str, str], float]] = {
    "exact match": exact_match,
    "edit similarity": edit_similarity,
}
"""Measures of an answer, 0 to 100."""
