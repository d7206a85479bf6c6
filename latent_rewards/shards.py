"""Where the latents of a dataset lie: in memory, or in safetensors files that are read on demand."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from latent_rewards.training.checkpoint import CheckpointError


class Shard(Protocol):
    """Latents ``[count, *shape]`` of one dtype."""

    count: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, rows: Tensor) -> Tensor:
        """Return the latents at ``rows`` (int64 ``[M]``)."""
        ...


class MemoryShard:
    """Latents that are in memory."""

    def __init__(self, latents: Tensor) -> None:
        """Take the latents ``[N, ...]``."""
        self.latents = latents
        self.count = len(latents)
        self.shape = tuple(latents.shape[1:])
        self.dtype = latents.dtype

    def read(self, rows: Tensor) -> Tensor:
        """Return the latents at ``rows`` (int64 ``[M]``)."""
        return self.latents[rows.to(self.latents.device)]


@dataclass
class FileShard:
    """Latents in a safetensors file, under the name "latents", read on demand.

    Args:
        path: the file; once it is opened, another in its place is refused.
    """

    path: Path

    def __post_init__(self) -> None:
        """Read where the latents lie."""
        with safe_open(self.path, "pt") as file:
            view = file.get_slice("latents")
            self.count, *shape = view.get_shape()
            self.shape = tuple(shape)
            self.dtype = view[:0].dtype
        with self.path.open("rb") as raw:
            self._version = _version(raw)
            length = int.from_bytes(raw.read(8), "little")
            self._start = 8 + length + json.loads(raw.read(length))["latents"]["data_offsets"][0]

    def read(self, rows: Tensor) -> Tensor:
        """Return the latents at ``rows`` (int64 ``[M]``), on the CPU.

        Raises:
            CheckpointError: the file is not what it was when it was opened.
        """
        # Read, not mapped: mapped pages of a shard count as memory of this process, whichever of its rows is wanted.
        values = torch.empty(len(rows), *self.shape, dtype=self.dtype)
        buffer, size = values.flatten().view(torch.uint8).numpy().data, values[:1].nbytes
        place = 0
        with self.path.open("rb") as file:
            whole = _version(file) == self._version
            for run in rows.tensor_split((rows.diff() != 1).nonzero()[:, 0] + 1):
                file.seek(self._start + int(run[0]) * size)
                end = place + len(run) * size
                whole = whole and file.readinto(buffer[place:end]) == end - place
                place = end
        if not whole:
            raise CheckpointError(f"{self.path} was changed after it was opened; restore it, or load the dataset again")
        return values


def _version(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns
