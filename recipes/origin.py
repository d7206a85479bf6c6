"""Which commit made something, so that a number can be told from that of other code."""

from __future__ import annotations

import subprocess
from pathlib import Path

DIRTY = "+dirty"
"""What follows a commit where tracked files differ from it."""

_RESULTS = "benchmarks/results"


def commit_of(folder: Path) -> str | None:
    """Return the commit of a folder, with :data:`DIRTY` where files of its repository are not as in the commit.

    Files that git does not track do not count, nor do committed results, which are measured one after the other. None
    where there is no git or no repository.
    """
    commit = _told(folder, "rev-parse", "--short", "HEAD")
    if not commit:
        return None
    where = (":/", f":(top,exclude){_RESULTS}")
    # Without its lock, so that it is in nobody's way who commits meanwhile.
    changed = _told(folder, "--no-optional-locks", "status", "--porcelain", "--untracked-files=no", "--", *where)
    return commit + DIRTY if changed else commit


def _told(folder: Path, *arguments: str) -> str:
    try:
        told = subprocess.run(  # noqa: S603 - a fixed command
            ["git", *arguments],  # noqa: S607
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return ""
    return told.stdout.strip()
