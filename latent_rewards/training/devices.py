"""What every setting called ``device`` means: where this process computes."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from latent_rewards.training.ranks import Ranks, current_ranks
from latent_rewards.training.settings import SettingsError


class DeviceError(SettingsError):
    """A device cannot be used here; the message names it and the remedy."""


def choose_device(name: str | None = None) -> torch.device:
    """Return the device that ``name`` means for this process, after making it torch's current one.

    Args:
        name: "cpu"; a kind of accelerator such as "cuda", "mps" or "xpu", of which each process of a launch takes its
            own and a single process torch's current one; one of several, such as "cuda:1", in a single process only.
            None takes an accelerator if there is one, else the CPU; the CPU too where ``ACCELERATE_USE_CPU`` is set,
            and on a machine whose only accelerator is "mps": that has no float64, which the fits of proxies need.

    Raises:
        DeviceError: there is no such device, or an index is given in a launch of several processes.
    """
    wanted = _default() if name is None else _parsed(name)
    if wanted.type == "cpu":
        return torch.device("cpu")
    module, count = _devices(wanted.type)
    if (wanted.index or 0) >= count:
        there = f"there are {count} devices of that kind" if count else "there is no such device"
        raise DeviceError(f"device {name!r} cannot be used: {there}; known here: {_known(wanted.type, count)}")
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and wanted.index is not None:
        raise DeviceError(
            f"device {name!r} names one device for a launch of several processes, each of which has its own; use "
            f"{wanted.type!r}, and choose devices for the launch (CUDA_VISIBLE_DEVICES, or the launcher's options)"
        )
    if not hasattr(module, "set_device"):  # mps, of which there is only one
        return torch.device(wanted.type)
    index = wanted.index
    if index is None:
        index = int(os.environ.get("LOCAL_RANK", "0")) % count if launched else module.current_device()
    module.set_device(index)
    return torch.device(wanted.type, index)


def join_launch(name: str | None = None) -> tuple[Ranks, torch.device]:
    """Return this process's place in its launch, which it joins, and its device.

    Args:
        name: see :func:`choose_device`.

    Raises:
        DeviceError: see :func:`choose_device`.
    """
    device = choose_device(name)
    return current_ranks(cpu=device.type == "cpu"), device


def moved(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a device, there cast to ``dtype``.

    A GPU is not waited for: a plain copy from the CPU begins when the GPU has done all it was told before, and then it
    has nothing to do until it is told more.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device=device, dtype=dtype)


def _default() -> torch.device:
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None or found.type == "mps" else torch.device(found.type)


def _parsed(name: str) -> torch.device:
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"device {name!r} is none; use 'cpu', 'cuda', 'cuda:1', 'mps', or none at all") from error


def _devices(kind: str) -> tuple[object, int]:
    """Return torch's module for a kind of device, and how many of them there are."""
    try:
        module = torch.get_device_module(kind)
    except RuntimeError:
        return None, 0
    return module, int(module.device_count())


def _known(kind: str, count: int) -> str:
    here = [f"{kind}:{index}" for index in range(count)]
    if not here and (found := _default()).type != "cpu":
        here = [found.type]
    return ", ".join(map(repr, [*here, "cpu"]))
