"""Advantages: rewards with a baseline taken from the other samples of the same prompt.

Samples come in groups of ``num_generations`` neighbours that share a prompt: ``rewards [G * num_generations]``. A NaN
reward is excluded: it enters no baseline and its own advantage is 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from latent_rewards.contracts import ConfigError, DataError, unknown_name
from latent_rewards.training.ranks import ALONE, Ranks

ScaleRewards = Literal["none", "group", "batch"]


def _groups(rewards: Tensor, num_generations: int, least: int = 2) -> Tensor:
    if num_generations < least:
        raise ConfigError(f"num_generations must be at least {least} for a group baseline; got {num_generations}")
    if rewards.ndim != 1 or rewards.shape[0] % num_generations:
        raise DataError(
            f"rewards must be [B], B a multiple of num_generations={num_generations}; got shape {tuple(rewards.shape)}"
        )
    return rewards.view(-1, num_generations)


def _mean_and_std(rows: Tensor) -> tuple[Tensor, Tensor]:
    valid = ~torch.isnan(rows)
    mean = rows.nanmean(dim=-1, keepdim=True)
    squared = torch.where(valid, (rows - mean) ** 2, torch.zeros_like(rows)).sum(dim=-1, keepdim=True)
    return mean, (squared / (valid.sum(dim=-1, keepdim=True) - 1).clamp(min=1)).sqrt()


def leave_one_out(rewards: Tensor, num_generations: int) -> Tensor:
    """Return each reward minus the mean of the others of its group, ``[B]`` (Kool et al. 2019; RLOO, 2402.14740).

    The baseline does not depend on the sample itself, so it adds no bias; with the sample included the gradient would
    shrink by 1 - 1/num_generations. A sample without a sibling that has a reward gets 0.

    Args:
        rewards: ``[B]``, NaN is excluded.
        num_generations: samples per group, at least 2.

    Raises:
        ConfigError: fewer than 2 generations.
        DataError: B is not a multiple of ``num_generations``.
    """
    rows = _groups(rewards, num_generations)
    others = (~torch.isnan(rows)).sum(dim=1, keepdim=True) - 1
    baseline = (rows.nansum(dim=1, keepdim=True) - rows) / others.clamp(min=1)
    advantages = torch.where(others > 0, rows - baseline, torch.zeros_like(rows))
    return advantages.nan_to_num(nan=0.0).view(-1)


def group_normalized(rewards: Tensor, num_generations: int) -> Tensor:
    """Return ``(reward - group mean) / group standard deviation``, ``[B]`` (GRPO, 2402.03300); 0 in a constant group.

    No epsilon is added, so ``a * rewards + b`` with a > 0 has the same advantages.

    Args:
        rewards: ``[B]``, NaN is excluded.
        num_generations: samples per group, at least 2.

    Raises:
        ConfigError: fewer than 2 generations.
        DataError: B is not a multiple of ``num_generations``.
    """
    rows = _groups(rewards, num_generations)
    mean, std = _mean_and_std(rows)
    scaled = torch.where(std > 0, (rows - mean) / std, torch.zeros_like(rows))
    return scaled.nan_to_num(nan=0.0).view(-1)


def normalize_then_sum(rewards: Mapping[str, Tensor], weights: Mapping[str, float], num_generations: int) -> Tensor:
    """Return the weighted sum of each reward's group-normalised advantages, ``[B]`` (GDPO, 2601.05242).

    Normalising before summing keeps a reward of small range from vanishing behind one of large range.

    Args:
        rewards: reward name -> ``[B]``; NaN is excluded reward by reward.
        weights: reward name -> weight; rewards without one are ignored.
        num_generations: samples per group, at least 2.

    Raises:
        ConfigError: no weights, or fewer than 2 generations.
        DataError: a weighted reward is missing, or B is not a multiple of ``num_generations``.
    """
    if not weights:
        raise ConfigError("weights is empty; name at least one reward")
    for name in weights:
        if name not in rewards:
            raise DataError(unknown_name("reward", name, rewards))
    parts = [weight * group_normalized(rewards[name], num_generations) for name, weight in weights.items()]
    return torch.stack(parts).sum(dim=0)


def normalize_each(
    rewards: Mapping[str, Tensor], names: Iterable[str], num_generations: int, repeats: int = 1
) -> dict[str, Tensor]:
    """Return each named reward minus the mean of its group, divided by its standard deviation.

    Both are constants to the gradient. The weighted sum of these is :func:`normalize_then_sum`; its leave-one-out
    advantages are G/(G - 1) times itself, for groups of G. A reward that is constant in a group is 0 there.

    Args:
        rewards: reward name -> ``[repeats * B]``; ``[i]`` belongs to sample ``i % B``. NaN is excluded.
        names: the rewards wanted.
        num_generations: samples per group, at least 2.
        repeats: draws per sample; mean and standard deviation are those of the samples' means over draws.

    Raises:
        ConfigError: fewer than 2 generations.
        DataError: a reward is missing, or B is not a multiple of ``num_generations``.
    """
    scaled = {}
    for name in names:
        if name not in rewards:
            raise DataError(unknown_name("reward", name, rewards))
        draws = rewards[name].view(repeats, -1)
        rows = _groups(draws.detach().nanmean(dim=0), num_generations)
        mean, std = (part.expand_as(rows).reshape(-1) for part in _mean_and_std(rows))
        scaled[name] = torch.where(std > 0, (draws - mean) / std, 0 * draws).view(-1)
    return scaled


def reward_scale(rewards: Tensor, num_generations: int, scale_rewards: ScaleRewards, ranks: Ranks = ALONE) -> Tensor:
    """Return what rewards are divided by, ``[B]``, without gradient: 1, or the standard deviation of group or batch.

    The batch is that of all ``ranks``, each of which must call this.

    It divides the score terms and the pathwise term alike, so that both stay in the same units. A standard deviation of
    0 counts as 1.

    Raises:
        ConfigError: ``scale_rewards`` is unknown, or ``"group"`` with fewer than 2 generations.
        DataError: B is not a multiple of ``num_generations``.
    """
    rewards = rewards.detach()
    if scale_rewards == "none":
        return torch.ones_like(rewards)
    if scale_rewards == "group":
        rows = _groups(rewards, num_generations)
    elif scale_rewards == "batch":
        rows = torch.cat(ranks.gather(rewards.cpu())).view(1, -1)
    else:
        raise ConfigError(f"scale_rewards must be 'none', 'group' or 'batch'; got {scale_rewards!r}")
    std = _mean_and_std(rows)[1].to(rewards)
    each = torch.where(std > 0, std, torch.ones_like(std))
    return each.expand(-1, len(rewards) // len(each)).reshape(-1)
