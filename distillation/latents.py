"""Latents in several files, which together may be larger than memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ShardedLatents:
    """Latents [N, C, F, H, W] of which only the rows that are asked for are read.

    Args:
        parts: one or more, each [n, C, F, H, W] of one shape and dtype on the CPU; what safetensors' ``load_file``
            returns is mapped from its file, and stays there.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = list(parts)
        self._ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)
        first = self.parts[0]
        self.shape = torch.Size([len(self), *first.shape[1:]])
        self.dtype, self.device = first.dtype, first.device

    def __len__(self) -> int:
        """Return N."""
        return int(self._ends[-1])

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Return the rows at int64 [B] or of a slice, at least one, in memory: [B, C, F, H, W]."""
        chosen = torch.arange(len(self))[rows]
        inside = torch.bucketize(chosen, self._ends, right=True)
        return torch.stack(
            [
                self.parts[part][row - int(self._ends[part])]  # counted from the part's end
                for part, row in zip(inside.tolist(), chosen.tolist(), strict=True)
            ]
        )
