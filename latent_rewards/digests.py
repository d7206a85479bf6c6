"""Short texts that change with what they are made of: how two runs tell that they were given the same."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latent_rewards.training.weights import DIGEST_LENGTH, weights_digest

_DEEPEST = 4
"""Levels of what holds what; beyond them, as where something holds itself, only its type is told."""


def tensor_digests(samples: Tensor) -> list[str]:
    """Return the sha256 of the shape, dtype and bytes of each of ``[B, ...]``, videos or latents."""
    arrays = samples.detach().cpu().contiguous()[..., None].flatten(1).view(torch.uint8).numpy()
    head = f"{list(samples.shape[1:])} {samples.dtype}\n".encode()
    digests = []
    for array in arrays:
        digest = hashlib.sha256(head)
        digest.update(array.data)
        digests.append(digest.hexdigest())
    return digests


def value_digest(value: Any, depth: int = 0) -> str:  # noqa: ANN401 - whatever somebody holds
    """Return a hash of numbers, texts, tensors, arrays, images, networks, functions, and of what holds such.

    Of an object that is none of these its type counts, and what its ``repr`` says where that holds no address.
    """
    return hashlib.sha256(_told(value, depth).encode()).hexdigest()[:DIGEST_LENGTH]


def source_digest(target: object) -> str:
    """Return a text that changes with the source of a function or class, and with the values that it holds.

    Those are what a function's closure captured, a partial's arguments and an object's attributes. "0" where there is
    no source to read.
    """
    source, held = _source(target), _held(target)
    return f"{source}-{value_digest(held)[:8]}" if held else source


def _source(target: object) -> str:
    try:
        source = inspect.getsource(target if hasattr(target, "__qualname__") else type(target))  # type: ignore[arg-type]
    except (OSError, TypeError):
        return "0"
    return "source-" + hashlib.sha256(source.encode()).hexdigest()[:8]


def _held(target: object) -> Any:  # noqa: ANN401
    if isinstance(target, functools.partial):
        return [target.func, target.args, target.keywords]
    if inspect.ismethod(target):
        return target.__self__
    if inspect.isfunction(target):
        return [_content(cell) for cell in target.__closure__ or ()]
    if inspect.isroutine(target) or inspect.isclass(target):
        return None
    return weights_digest(target) if isinstance(target, nn.Module) else getattr(target, "__dict__", None)


def _content(cell: Any) -> Any:  # noqa: ANN401 - of a closure
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet, as of a function that names itself
        return None


def _told(value: Any, depth: int) -> str:  # noqa: ANN401
    kind = type(value).__qualname__
    if depth > _DEEPEST:
        return kind
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return f"{kind} {value!r}"
    if isinstance(value, nn.Module):
        return f"{kind} {weights_digest(value)}"
    if isinstance(value, Tensor):
        return f"{kind} {tensor_digests(value[None])[0]}"
    if isinstance(value, Mapping):
        pairs = [(value_digest(key, depth + 1), value_digest(held, depth + 1)) for key, held in value.items()]
        return f"{kind} {sorted(pairs)}"
    if isinstance(value, list | tuple | set | frozenset):
        parts = [value_digest(part, depth + 1) for part in value]
        return f"{kind} {sorted(parts) if isinstance(value, set | frozenset) else parts}"
    if callable(value) and not isinstance(value, type):
        return f"{kind} {_source(value)} {value_digest(_held(value), depth + 1)}"
    if hasattr(value, "__array_interface__"):  # numpy's, and Pillow's images
        return f"{kind} {tensor_digests(torch.from_numpy(np.array(value))[None])[0]}"
    shown = repr(value)
    return kind if " at 0x" in shown else f"{kind} {shown}"
