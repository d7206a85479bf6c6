"""Short texts that change with what they are made of: how two runs tell that they were given the same."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latent_rewards.training.weights import DIGEST_LENGTH, weights_digest

_CONSTANTS = (bool, int, float, complex, str, bytes, tuple)
_MOST_SOURCES = 256
"""Functions, classes and constants that a digest of source looks at; more would take seconds to read."""
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

    Source is its own and that of the functions, classes and constants of its own package that it names. Values are what
    a function's closure captured, a partial's arguments and an object's attributes. "0" where there is no source to
    read.
    """
    source, held = _source(target), _held(target)
    return f"{source}-{value_digest(held)[:8]}" if held else source


def _source(target: object) -> str:
    found: dict[str, str] = {}
    try:
        _add_source(target if hasattr(target, "__qualname__") else type(target), found)
    except (OSError, TypeError):
        return "0"
    own, *used = found.values()
    return "source-" + hashlib.sha256("\n".join([own, *sorted(used)]).encode()).hexdigest()[:8]


def _add_source(target: Any, found: dict[str, str]) -> None:  # noqa: ANN401 - a function or class
    """Add the source of a function or class, and of what it uses of its own package, itself first.

    That is every function and class it names, those they name in turn, and the constants (in capitals).
    """
    name = f"{target.__module__}.{target.__qualname__}"
    if name in found or len(found) == _MOST_SOURCES:
        return
    found[name] = inspect.getsource(target)
    if "site-packages" in str(inspect.getsourcefile(target)):
        return  # an installed library has a version, and is large
    for key, value in _named_in(target):
        if inspect.isfunction(value) or inspect.isclass(value):
            if _package(value) == _package(target):
                with contextlib.suppress(OSError, TypeError):  # made by exec, for instance
                    _add_source(value, found)
        elif key.isupper() and isinstance(value, _CONSTANTS) and " at 0x" not in repr(value):
            found[f"{target.__module__}.{key}"] = f"{key} = {value!r}"


def _named_in(target: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - a function or class
    """Yield the globals that a function names, or a class in its methods, and what they name of modules; and bases."""
    if inspect.isclass(target):
        yield from ((base.__name__, base) for base in target.__bases__)
        for value in vars(target).values():
            method = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if inspect.isfunction(method):
                yield from _named_in(method)
        return
    if inspect.ismethod(target):
        owner = target.__self__ if inspect.isclass(target.__self__) else type(target.__self__)
        yield owner.__name__, owner
    function = inspect.unwrap(getattr(target, "__func__", target))
    codes = [function.__code__] if inspect.isfunction(function) else []
    for code in codes:
        codes += filter(inspect.iscode, code.co_consts)
        values = {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
        for module in [value for value in values.values() if inspect.ismodule(value)]:
            if module.__name__.partition(".")[0] == _package(function):
                values |= {name: getattr(module, name) for name in code.co_names if hasattr(module, name)}
        yield from values.items()


def _package(target: Any) -> str:  # noqa: ANN401 - a function or class
    return str(target.__module__).partition(".")[0]


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
