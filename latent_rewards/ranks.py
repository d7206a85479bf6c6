"""The processes of one launch (``accelerate launch``, ``torchrun``) that share a piece of work."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ranks:
    """This process among those of its launch.

    Attributes:
        index: 0 to ``count - 1``.
        count: number of processes; 1 without a launcher.
    """

    index: int = 0
    count: int = 1

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            torch.distributed.barrier()


def current_ranks() -> Ranks:
    """Return this process's place in its launch; joins the launch's process group if that is still to be done."""
    if not torch.distributed.is_available():
        return Ranks()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        # Without being told, accelerate takes the processes of a launch on CPUs for strangers.
        PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    if not torch.distributed.is_initialized():
        return Ranks()
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
