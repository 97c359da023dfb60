"""A prompt table in the proof: its rows as its source has them, and transformers fed with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from porttool.evaluator import Verdict

if TYPE_CHECKING:
    from torch import Tensor, nn

    from porttool.prompt_table import PromptTable


@dataclass(frozen=True)
class VirtualTokens:
    """A prompt table beside its source: `taught` has each task's rows, [length, d_model].

    The first row's id is the model's `vocab_size`.
    """

    table: PromptTable
    taught: Mapping[str, Tensor]
    vocab_size: int

    @property
    def rows(self) -> Tensor:
        """All rows of the source, task after task: [n_rows, d_model]."""
        import torch

        return torch.cat([rows.float() for rows in self.taught.values()])

    @property
    def longest(self) -> int:
        """Rows of the longest task."""
        return max(map(len, self.taught.values()))

    def before(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Return prompts with the virtual ids of one task after the other before them."""
        starts, first = [], self.vocab_size
        for rows in self.taught.values():
            starts.append(range(first, first + len(rows)))
            first += len(rows)
        return [[*starts[i % len(starts)], *prompt] for i, prompt in enumerate(prompts)]

    def fill(self, embedded: Tensor, tokens: Sequence[int], *, taught: bool) -> Tensor:
        """Put rows where a decoder's token embeddings [1, n, d_model] stand for virtual ids.

        They are those `taught`, else the table's.
        """
        import torch

        rows = self.rows if taught else self.table.tensor()
        row = torch.tensor([list(tokens)]) - self.vocab_size  # [1, n]
        virtual = rows.to(embedded)[row.clamp(min=0)]
        return torch.where((row >= 0)[..., None], virtual, embedded)

    def judge(self) -> Verdict:
        """The table has the source's tasks, and each task its rows."""
        import torch

        whole, tasks = self.table.tensor(), self.table.config.tasks
        lengths = tuple(map(len, self.taught.values()))
        wrong = []
        if tuple(self.taught) != tasks:
            wrong.append(f"tasks {', '.join(tasks)}, should be {', '.join(self.taught)}")
        elif lengths != self.table.config.lengths:
            wrong.append(f"tasks of {self.table.config.lengths} rows, should be {lengths}")
        else:
            parts = zip(tasks, whole.split(list(lengths)), self.taught.values(), strict=True)
            for task, ours, theirs in parts:
                rows = (ours != theirs.to(ours.dtype)).any(1).nonzero().flatten()
                if len(rows):
                    wrong.append(f"{task}: {len(rows)} of {len(ours)} rows from row {int(rows[0])}")
        finite = bool(torch.isfinite(whole).all())
        return Verdict(
            name="prompt table",
            passed=not wrong and finite,
            found=f"{len(tasks) - len(wrong)} of {len(tasks)} tasks",
            bound="all, exactly",
            detail="; ".join(wrong),
        )


def extend_embedding(model: Any, rows: Tensor) -> None:
    """Let a transformers model take ids from its vocabulary's size on as rows of a table.

    Everything behind the embedding is transformers' own: positions are counted through them.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    inner: nn.Embedding = model.get_input_embeddings()

    class Extended(nn.Embedding):
        """The same embedding, tied to whatever its weight is tied to."""

        def forward(self, ids: Tensor) -> Tensor:
            """Map ids [...] to [..., d_model]."""
            real = super().forward(ids.clamp(max=len(self.weight) - 1))
            row = (ids - len(self.weight)).clamp(min=0)
            virtual = functional.embedding(row, rows.to(real))
            return torch.where((ids >= len(self.weight))[..., None], virtual, real)

    extended = Extended(inner.num_embeddings, inner.embedding_dim, _weight=inner.weight.data)
    extended.weight = inner.weight
    model.set_input_embeddings(extended)
