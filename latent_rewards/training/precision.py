"""What is trained is held in 32 bits or more: a step of a few millionths of a weight is lost in 16."""

from __future__ import annotations

from itertools import chain
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def widened(module: M) -> M:
    """Return the module with its 16-bit floating parameters and buffers held in float32, in place; others stay."""
    for tensor in chain(module.parameters(), module.buffers()):
        if _is_narrow(tensor):
            tensor.data = tensor.data.float()
    return module


def widened_to_train(module: M) -> M:
    """Return the module, :func:`widened` if a parameter that asks for gradients has 16 bits; adapters leave a base."""
    narrow = any(parameter.requires_grad and _is_narrow(parameter) for parameter in module.parameters())
    return widened(module) if narrow else module


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4
