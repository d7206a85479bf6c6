"""Latent-space reward proxies for few-step video generators, and reinforcement learning against them.

Metrics score pixels (:mod:`latent_rewards.metrics`), proxies predict those scores from latents
(:mod:`latent_rewards.proxies`), and trainers tune a few-step policy on the proxies (:mod:`latent_rewards.lro`). Names
are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "latent_rewards.metrics": (
        "Metric",
        "as_reward_func",
        "check_metric",
        "command_metric",
        "create_metric",
        "from_reward_func",
        "http_metric",
        "isolate",
        "list_metrics",
        "register_metric",
        "vbench_score",
    ),
    "latent_rewards.collect": ("collect_rewards",),
    "latent_rewards.collect_videos": ("collect_videos",),
    "latent_rewards.oracle": ("MetricOracle",),
    "latent_rewards.dataset": ("RewardDataset",),
    "latent_rewards.proxies": ("Preferences", "ProxyConfig", "RewardProxy", "train_proxy"),
    "latent_rewards.rewards": ("Constraint", "Tchebycheff", "WeightedSum"),
    "latent_rewards.lro": (
        "DecodedReward",
        "DifferentiableRewardTrainer",
        "LROConfig",
        "Lagrangian",
        "PreferredReward",
        "ReinforceTrainer",
        "TrainResult",
        "TrueReward",
        "WeightConditioned",
        "relative_floors",
        "true_means",
    ),
    "latent_rewards.fronts": ("hypervolume", "non_dominated"),
    "latent_rewards.report": ("Report",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605 - the names are imported lazily


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute of any type
    """Import a public name from the room it lives in."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'latent_rewards' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted({*globals(), *__all__})
