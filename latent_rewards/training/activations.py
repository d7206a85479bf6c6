"""Activation checkpointing: a network's blocks keep their inputs only, and are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def checkpoint_activations(module: nn.Module, *function: Callable[..., Any]) -> list[Any] | None:
    """Switch activation checkpointing on in the diffusers networks of a module.

    Args:
        module: is, or holds, networks with ``enable_gradient_checkpointing``.
        function: what calls a block in place of torch's checkpoint, if it shall be another.

    Returns:
        The networks in which it was off; None where no network supports it.
    """
    able: list[Any] = [part for part in module.modules() if getattr(part, "_supports_gradient_checkpointing", False)]
    were_off = [part for part in able if not part.is_gradient_checkpointing]
    for part in able:
        part.enable_gradient_checkpointing(*function)
    return were_off if able else None
