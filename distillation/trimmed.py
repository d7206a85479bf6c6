"""Many encoded prompts without the zeros at their ends, which are put back when some of them are taken.

512 tokens of 4096 numbers are 8 MiB, and most of a prompt's are padding: ten thousand prompts in full are 80 GiB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distillation.condition import TextCondition


@dataclass(frozen=True)
class TrimmedText:
    """A :class:`~distillation.denoiser.Condition` of many prompts; the rows that are taken are a ``TextCondition``.

    Args:
        rows: of each prompt {"embeddings": [l, D] without the zeros at its end, name of an extra tensor: its row}.
        length: tokens of a row, padding included.
    """

    rows: Sequence[Mapping[str, Tensor]]
    length: int

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.rows)

    def index_select(self, index: Tensor) -> TextCondition:
        """Return the rows at ``index`` (int64 [M]), padded, on the CPU."""
        found = [self.rows[row] for row in index.tolist()]
        first = found[0]["embeddings"]
        embeddings = first.new_zeros(len(found), self.length, first.shape[1])
        for row, tensors in enumerate(found):
            embeddings[row, : len(tensors["embeddings"])] = tensors["embeddings"]
        names = [name for name in found[0] if name != "embeddings"]
        return TextCondition(embeddings, {name: torch.stack([row[name] for row in found]) for name in names})

    def to(self, device: torch.device | str) -> TextCondition:
        """Return all rows, padded, on ``device``."""
        return self.index_select(torch.arange(len(self))).to(device)


def trimmed_rows(condition: TextCondition) -> list[dict[str, Tensor]]:
    """Return the rows of :class:`TrimmedText` of a condition, copied to the CPU; at least one token of each stays."""
    rows = []
    for index in range(len(condition)):
        row = condition.embeddings[index].cpu()
        used = (row != 0).any(dim=1).nonzero()
        tensors = {"embeddings": row[: int(used[-1]) + 1 if len(used) else 1].clone()}
        rows.append(tensors | {name: extra[index].cpu().clone() for name, extra in condition.extra.items()})
    return rows
