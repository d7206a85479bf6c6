"""Metrics of other distributions: the entry points of the group ``latent_rewards.metrics``.

An entry point ``name = "pkg.mod:attr"`` is one metric, and its module is imported when that metric is first used. One
without an attribute, ``anything = "pkg.mod"``, is a module that registers its metrics as it is imported; that happens
when metrics are listed, or when a name is not found anywhere else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from latent_rewards.contracts import MetricError

ENTRY_POINT_GROUP = "latent_rewards.metrics"


@cache
def plugins() -> tuple[EntryPoint, ...]:
    """Return the entry points of every installed distribution; nothing is imported."""
    return tuple(entry_points(group=ENTRY_POINT_GROUP))


def plugin_metrics() -> dict[str, EntryPoint]:
    """Return the entry points that are one metric each, by its name."""
    return {point.name: point for point in plugins() if point.attr}


@cache
def load_plugin_modules() -> None:
    """Import the modules that register their metrics; one that fails is a warning."""
    for point in plugins():
        if not point.attr:
            try:
                point.load()
            except Exception as error:  # a broken plugin must not take the others with it
                warnings.warn(f"entry point {point.name!r} ({point.value}) failed to load: {error}", stacklevel=2)


def load_plugin(point: EntryPoint) -> Callable[..., Any]:
    """Import what one entry point names.

    Raises:
        MetricError: the import failed; the message names the entry point.
    """
    try:
        loaded: Callable[..., Any] = point.load()
    except Exception as error:
        raise MetricError(f"metric {point.name!r}: entry point {point.value!r} failed to load: {error}") from error
    return loaded
