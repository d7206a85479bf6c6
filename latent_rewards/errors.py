"""The errors the library raises on purpose: each names the thing, its value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LatentRewardsError(Exception):
    """Base of every error the library raises on purpose."""


class ConfigError(LatentRewardsError, ValueError):
    """A setting is outside what it may be."""


class DataError(LatentRewardsError, ValueError):
    """Latents, rewards or prompts cannot be used as they are."""


class FingerprintMismatchError(LatentRewardsError, ValueError):
    """Two artefacts belong to different latent spaces or metric configurations."""


class MetricError(LatentRewardsError):
    """A metric broke its contract or failed; the message names the metric."""


class UnknownMetricError(MetricError, KeyError):
    """No metric has that name; close names are listed."""

    def __str__(self) -> str:
        """Return the message without ``KeyError``'s quotes."""
        return str(self.args[0]) if self.args else ""


class DuplicateMetricError(MetricError, ValueError):
    """A metric of that name is registered already."""


class MetricOutputError(MetricError, ValueError):
    """A metric returned the wrong type, shape, dtype or values."""


class MetricTimeoutError(MetricError, TimeoutError):
    """A metric did not answer before its deadline."""


class MetricCrashError(MetricError, RuntimeError):
    """A metric's process died."""


class RankError(LatentRewardsError, RuntimeError):
    """Another process of the launch failed, so the work they share cannot be finished."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return an error message that names ``name``, the closest known names, and all of them when they are few."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    listing = f" Known: {', '.join(names)}." if names and len(names) <= 30 else ""
    return f"unknown {kind} {name!r}.{hint}{listing}"
