"""Which rewards should fall: what metrics say of themselves (``higher_is_better``), by whatever knows the metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def falling_by_fingerprint(fingerprints: Mapping[str, str]) -> set[str]:
    """Return the rewards of which less is better, as far as their metrics' fingerprints name a registered metric.

    Args:
        fingerprints: ``{reward name: fingerprint}``, which begins with the metric's name.
    """
    from latent_rewards.metrics import list_metrics
    from latent_rewards.metrics.registry import metric_info

    known = {*list_metrics()} if fingerprints else set()
    named = {reward: fingerprint.partition("@")[0] for reward, fingerprint in fingerprints.items()}
    return {reward for reward, name in named.items() if name in known and not metric_info(name).higher_is_better}


def falling(proxy: Any, oracle: Any = None) -> set[str]:  # noqa: ANN401 - structural Proxy and Oracle
    """Return the rewards of a proxy of which less is better: by its oracle, its own or its metrics' fingerprints."""
    oracles = (oracle, getattr(proxy, "oracle", None))
    told = {name for known in oracles for name in getattr(known, "lower_is_better", ())}
    told |= falling_by_fingerprint(getattr(proxy, "metric_fingerprints", None) or {})
    return told & {*proxy.reward_names}
