"""Where a number came from: command, versions and machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from latent_rewards.training.devices import choose_device
from recipes.origin import commit_of

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "scikit-learn")


def provenance() -> dict[str, Any]:
    """Return the command, the commit, package versions and the machine: call it where something is measured."""
    return {
        "command": _command(),
        "commit": commit_of(Path(__file__).parent),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
    }


def device_name(device: str) -> str:
    """Return what results say of a device: "cpu", or what an accelerator calls itself.

    Raises:
        DeviceError: there is no such device.
    """
    chosen = choose_device(device)
    return torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type


def _nameless(argument: str) -> str:
    """Return an argument without the folders of this machine, which mean nothing on another."""
    option, equals, value = argument.partition("=")
    if equals and option.startswith("--"):
        return f"{option}={_nameless(value)}"
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def _command() -> str | None:
    """Return what was typed; None for code that has no file, which cannot be typed again."""
    spec, script = getattr(sys.modules["__main__"], "__spec__", None), Path(sys.argv[0])
    if spec is None and not script.is_file():
        return None
    begun = ["python", "-m", spec.name] if spec else ["python", _nameless(str(script))]
    return " ".join([*begun, *map(_nameless, sys.argv[1:])])
