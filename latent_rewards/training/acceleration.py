"""The accelerate side of a loop: trackers, and device and precision, which accelerate holds for the whole process."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import AutocastKwargs, LoggerType, patch_environment

from latent_rewards.training.devices import DeviceError
from latent_rewards.training.settings import SettingsError


class TrackerError(SettingsError):
    """The package of a tracker is not installed; the message names both."""


def make_accelerator(
    device: torch.device,
    *,
    alone: bool,
    mixed_precision: str = "no",
    log_with: str | None = None,
    project_dir: str | None = None,
) -> Accelerator:
    """Return an accelerator on ``device``, also after a stage of this process on another one.

    Args:
        device: of the stage.
        alone: there is one process, which has joined no others.
        mixed_precision: "no" or "bf16".
        log_with: name of a tracker, or None.
        project_dir: where trackers write that write files.

    Raises:
        DeviceError: the processes of this launch have joined on another kind of device.
        TrackerError: the tracker's package is not installed.
    """
    _check_tracker(log_with)
    _allow(mixed_precision, device, alone=alone)
    cpu = device.type == "cpu"
    with patch_environment(ACCELERATE_TORCH_DEVICE=device, ACCELERATE_USE_CPU=cpu):
        return Accelerator(
            cpu=cpu,
            mixed_precision=mixed_precision,
            log_with=log_with,
            project_dir=project_dir,
            # Older torch keeps a weight that was cast under no_grad, and later calls then give it no gradient.
            kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
        )


def _check_tracker(name: str | None) -> None:
    """Check that a tracker can be used; accelerate passes over one that cannot."""
    known = {kind.value for kind in LoggerType} - {"all"}
    if name is not None and name in known and LoggerType(name) not in get_available_trackers():
        raise TrackerError(
            f"log_with={name!r} needs a package that is not installed: pip install {name.replace('_', '-')}, or "
            "choose another tracker, or none"
        )


def _allow(mixed_precision: str, device: torch.device, *, alone: bool) -> None:
    """Let a stage compute elsewhere, or in another precision, than the one before it; accelerate refuses or ignores it.

    Arguments and errors are those of :func:`make_accelerator`.
    """
    joined = PartialState._shared_state.get("device", device)
    indices = (None, device.index) if device.type != "cpu" else (joined.index,)  # a launch counts its CPUs
    if joined.type != device.type or joined.index not in indices:
        if not alone:
            raise DeviceError(
                f"device {str(device)!r} cannot be used: the processes of this launch have joined on "
                f"{str(joined)!r}; give all stages the same device, or start the launch anew"
            )
        AcceleratorState._reset_state(reset_partial_state=True)
    if AcceleratorState._shared_state.get("_mixed_precision", mixed_precision) != mixed_precision:
        AcceleratorState._reset_state()
