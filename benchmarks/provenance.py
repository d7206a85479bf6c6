"""Where a number came from: command, versions and machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "scikit-learn")


def provenance() -> dict[str, Any]:
    """Return the command, the commit, package versions and the machine."""
    return {
        "command": " ".join(["python", "-m", _module(), *map(_nameless, sys.argv[1:])]),
        "commit": commit_of(Path(__file__).parent),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
    }


def commit_of(folder: Path) -> str | None:
    """Return the commit of a folder, or None where there is no git or no repository."""
    try:
        told = subprocess.run(  # noqa: S603 - a fixed command
            ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return told.stdout.strip() or None


def _nameless(argument: str) -> str:
    """Return an argument without the folders of this machine, which mean nothing on another."""
    option, equals, value = argument.partition("=")
    if equals and option.startswith("--"):
        return f"{option}={_nameless(value)}"
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).name
