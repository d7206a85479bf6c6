"""Where a command works: on which device, as which of a launch's processes, and in which folder."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from latent_rewards.training.checkpoint import MANIFEST, TEMPORARY_PREFIX
from latent_rewards.training.devices import join_launch
from latent_rewards.training.ranks import Ranks


def launched(device: str | None) -> tuple[Ranks, torch.device]:
    """Return this process's place in its launch, and its device; only the first process of a launch warns.

    Arguments and errors are those of :func:`~latent_rewards.training.devices.join_launch`.
    """
    ranks, chosen = join_launch(device)
    if ranks.index:
        warnings.simplefilter("ignore")
    return ranks, chosen


def begin_folder(path: str | Path) -> Path:
    """Return the folder of a command's work, if it may be that: new, empty, or begun by such a command.

    Raises:
        FolderInUseError: it is a file, or holds something else.
    """
    from distillation.families.export import FolderInUseError

    folder = Path(path)
    inside = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    # Looked for after the rest: another process of the launch may begin the folder meanwhile.
    begun = (folder / "settings" / MANIFEST).is_file()
    # What a killed command left half written is nobody's.
    if folder.is_file() or not (begun or all(name.startswith(TEMPORARY_PREFIX) for name in inside)):
        raise FolderInUseError(f"{folder} holds something else than the work of this command; give a new folder")
    return folder
