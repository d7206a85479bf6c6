"""Where a command works: on which device, as which of a launch's processes, and in which folder."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from latent_rewards.training.checkpoint import MANIFEST, TEMPORARY_PREFIX
from latent_rewards.training.ranks import Ranks, current_ranks


def launched(device: str | None) -> tuple[Ranks, str]:
    """Return this process's place in its launch, and its device: an accelerator, if there is one, unless told.

    Only the first process of a launch warns.
    """
    ranks = current_ranks(cpu=device == "cpu")
    if ranks.index:
        warnings.simplefilter("ignore")
    return ranks, device or ("cuda" if torch.cuda.is_available() else "cpu")


def begin_folder(path: str | Path) -> Path:
    """Return the folder of a command's work, if it may be that: new, empty, or begun by such a command.

    Raises:
        FolderInUseError: it is a file, or holds something else.
    """
    from distillation.families.export import FolderInUseError

    folder = Path(path)
    begun = (folder / "settings" / MANIFEST).is_file()
    inside = [] if begun or not folder.is_dir() else [entry.name for entry in folder.iterdir()]
    # What a killed command left half written is nobody's.
    if folder.is_file() or not all(name.startswith(TEMPORARY_PREFIX) for name in inside):
        raise FolderInUseError(f"{folder} holds something else than the work of this command; give a new folder")
    return folder
