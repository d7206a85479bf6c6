"""The processes of one launch (``accelerate launch``, ``torchrun``) that share a piece of work."""

from __future__ import annotations

import os
from dataclasses import dataclass


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
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def current_ranks() -> Ranks:
    """Return this process's place in its launch; joins the launch's process group if that is still to be done."""
    import torch.distributed

    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not launched and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Ranks()  # accelerate is not asked, for that would fix the device of this process
    from accelerate import PartialState

    state = PartialState()
    return Ranks(state.process_index, state.num_processes)
