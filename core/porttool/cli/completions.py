"""What `run` has made, shown while it is made and written where it was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from porttool.cli import console
from porttool.errors import UsageError

if TYPE_CHECKING:
    from porttool.api import LoadedEngine
    from porttool.config import Sampling
    from porttool.generate import Completion


class Stream:
    """Shows one prompt's text while it is made, `beside` the results if those are printed."""

    def __init__(
        self, loaded: LoadedEngine, n_prompts: int, sampling: Sampling, *, beside: bool
    ) -> None:
        from porttool.text import TextStream

        if n_prompts != 1 or loaded.tokenizer is None:
            raise UsageError("--stream shows the text of one prompt; give one, and a tokenizer")
        if sampling.num_beams > 1 or sampling.num_return_sequences > 1:
            raise UsageError("--stream shows one completion as it is made: take it away, or "
                             "--num-beams and --num-return-sequences")  # fmt: skip
        self._text = TextStream(loaded.tokenizer, sampling.stop)
        self._beside = beside

    def push(self, index: int, token: int) -> None:
        """Show what a token adds."""
        console.write(self._text.push(token), beside=self._beside)

    def finish(self) -> None:
        """Show what was held back, and end the line."""
        console.write(self._text.finish() + "\n", beside=self._beside)


def write_results(
    asked: dict[str, Any],
    loaded: LoadedEngine,
    prompts: list[list[int]],
    results: list[list[Completion]],
    *,
    shown: bool,
) -> None:
    """Write every file that was asked for, and the text if none was."""
    from porttool import token_files

    note_foreign(loaded, results)
    records = [token_files.as_record(p, c) for p, c in zip(prompts, results, strict=True)]
    rows = [[*p, *c.tokens] for p, beams in zip(prompts, results, strict=True) for c in beams]
    tokens = loaded.engine.manifest.tokens
    if asked["output_json"] and str(asked["output_json"]) != "-":
        token_files.write_json_lines(asked["output_json"], records)
    elif asked["output_json"]:
        for record in records:
            console.say_json(record, indent=None)
    if asked["output_csv"]:
        token_files.write_csv(asked["output_csv"], rows)
    if asked["output_npy"]:
        pad = tokens.pad if tokens.pad is not None else (*tokens.eos, 0)[0]
        token_files.write_npy(asked["output_npy"], rows, pad)
    if asked["output_logits_npy"]:
        token_files.write_logits(asked["output_logits_npy"], [c for r in results for c in r])
    if not shown and not any(asked[k] for k in ("output_json", "output_csv", "output_npy")):
        for completion in (c for beams in results for c in beams):
            text = completion.text
            console.say(text if text is not None else " ".join(map(str, completion.tokens)))


def note_foreign(loaded: LoadedEngine, results: list[list[Completion]]) -> None:
    """Say that there is no text because every new id lies beyond the tokenizer's own."""
    if loaded.tokenizer is None:
        return
    n_tokens = loaded.tokenizer.n_tokens
    beyond = [all(i >= n_tokens for i in c.tokens) for r in results for c in r if c.tokens]
    if any(beyond):
        console.note(
            f"{sum(beyond)} of {len(beyond)} completions hold no id of the tokenizer, which has "
            f"{n_tokens}, the model {loaded.engine.manifest.config.vocab_size}: name the model's "
            "own with --tokenizer"
        )
