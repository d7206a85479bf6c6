"""What must hold before a policy is changed: finite numbers, and log-probabilities that are the policy's own.

And a warning where nothing would tell that the policy exploits its reward.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError, Oracle, Policy, Prompt, Reward
from latent_rewards.digests import value_digest, weights_digest
from latent_rewards.directions import falling
from latent_rewards.lro.sampling import Batch
from latent_rewards.lro.scoring import Proxy, ProxyReward
from latent_rewards.rewards import WeightedSum
from latent_rewards.rollout import Trajectory, Transitions, gaussian_kl, gaussian_log_ratio
from latent_rewards.training.activations import checkpoint_activations
from latent_rewards.training.loop import NonFiniteError

RATIO_TOLERANCE = 1e-2
"""Largest log-probability ratio of an update that should be on-policy; rounding stays well below."""


class OffPolicyError(RuntimeError):
    """The policy's forward with gradient differs from the one that sampled, so log-probabilities are not its own."""


def as_module(policy: Policy) -> nn.Module:
    """Return a policy as the module that it is.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(policy, nn.Module):
        raise ConfigError(f"the policy must be an nn.Module; got {type(policy).__name__}")
    return policy


def checkpointed(module: nn.Module) -> list[Any]:
    """Switch activation checkpointing on, and return the networks in which it was off.

    Raises:
        ConfigError: no network of the module can do it.
    """
    were_off = checkpoint_activations(module)
    if were_off is None:
        raise ConfigError(
            f"gradient_checkpointing: {type(module).__name__} has no diffusers network that can; set it to False"
        )
    return were_off


def started_with(module: nn.Module, prompts: Sequence[Prompt], scoring: ProxyReward) -> dict[str, str]:
    """Return short texts that change with the policy, the prompts, the proxy and the weights of its rewards."""
    proxy, reward = scoring.proxy, scoring.reward
    told = {"policy": weights_digest(module), "prompts": value_digest(list(prompts))}
    if isinstance(proxy, nn.Module):
        told["proxy"] = weights_digest(proxy)
    told["reward"] = type(reward).__qualname__
    if isinstance(reward, WeightedSum):
        told["reward"] += " " + value_digest(vars(reward))
    return told


def describe(batch: Batch, rows: list[int]) -> str:
    """Return the samples at ``rows`` of a batch as text: ids and prompts, the first eight."""
    shown = ", ".join(f"{batch.sample_ids[row]} ({batch.prompts[row]!r})" for row in rows[:8])
    return shown + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


def check_finite(what: str, values: Tensor, step: int, batch: Batch) -> None:
    """Check per-sample values ``[B]``.

    Raises:
        NonFiniteError: one is NaN or infinite; the message names the update and the samples.
    """
    finite = torch.isfinite(values.detach())
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"lro: {what} not finite at step {step}, samples {describe(batch, bad)}; parameters kept. Lower the "
            "learning rate, or look at what these prompts do to policy and proxy"
        )


@torch.no_grad()
def check_on_policy(step: int, trajectory: Trajectory, transitions: Transitions, head_std: float) -> None:
    """Check that the first optimiser step after a rollout has probability ratio 1.

    Raises:
        OffPolicyError: a log ratio exceeds :data:`RATIO_TOLERANCE`.
    """
    for k, (mean, std) in enumerate(transitions):
        old = trajectory.means[k]
        if bool((torch.as_tensor(std) != 0).any()):
            deviation = gaussian_log_ratio(trajectory.states[k + 1], mean, old, std)
        else:
            deviation = gaussian_kl(mean, old, head_std)
        worst = float(deviation.abs().max())
        if worst > RATIO_TOLERANCE:
            raise OffPolicyError(
                f"at update {step} the policy gives another mean for step {k} than it sampled from (log ratio "
                f"{worst:.3g}, at most {RATIO_TOLERANCE} expected): something in it is random or depends on gradient "
                "mode, such as dropout; make the forward deterministic"
            )


def check_direction(proxy: Proxy, reward: Reward | None, oracle: Oracle | None) -> None:
    """Check that a metric of which less is better is not maximised for want of a word.

    Raises:
        ConfigError: it is the only reward, and nothing says how to combine it.
    """
    names = tuple(proxy.reward_names)
    if reward is None and len(names) == 1 and names[0] in falling(proxy, oracle):
        raise ConfigError(
            f"less of {names[0]!r} is better, and a reward is maximised: pass "
            f"reward=WeightedSum({{{names[0]!r}: -1.0}}), or a weight of 1.0 if more of it is what you want"
        )


def warn_of_exploitation(proxy: Proxy, oracle: Oracle | None, holdout: Oracle | None) -> None:
    """Warn where nothing would tell that a policy climbs what the proxy, or the only metric, does not see."""
    if oracle is None and not getattr(proxy, "is_true", False):
        warnings.warn(
            "no oracle: the proxy stays frozen, and a policy that climbs a frozen proxy usually ends where the "
            "proxy is wrong, with a rising score and a falling true metric; pass oracle=MetricOracle(...)",
            stacklevel=4,
        )
    if len(tuple(proxy.reward_names)) == 1 and holdout is None:
        warnings.warn(
            "one reward and no holdout: what that reward does not see (motion, diversity) may fall unnoticed; pass "
            "holdout=MetricOracle(...) with another metric to stop early and roll back",
            stacklevel=4,
        )
