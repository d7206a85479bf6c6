"""A folder that one run at a time writes into."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from latent_rewards.training.checkpoint import CheckpointError
from latent_rewards.training.ranks import Ranks


class FolderLockedError(CheckpointError):
    """Another run is writing into the folder."""


@contextmanager
def exclusive(
    folder: str | Path, ranks: Ranks, doing: str, error: type[Exception] = FolderLockedError
) -> Iterator[None]:
    """Make a folder and hold its lock in the block; the system takes it back from a process that dies.

    Args:
        folder: need not be there.
        ranks: the processes that write into it together; the first one holds the lock.
        doing: what they do there, for the message: "training in".
        error: what is raised.

    Raises:
        FolderLockedError: another run holds the lock.
    """
    import fcntl

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise error(f"{folder} cannot be made ({reason}); give another output_dir") from reason
    if ranks.index:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise error(f"another run is {doing} {folder}; wait for it or end it, or use another output_dir") from None
        except OSError as reason:
            warnings.warn(f"{folder} cannot be locked ({reason}): let no other run write there", stacklevel=3)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing leaves it to a child that was forked meanwhile
        os.close(descriptor)
