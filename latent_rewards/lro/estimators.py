"""Gradient estimators of E[R(x_K)] for a few-step policy, each a pure function returning a scalar surrogate loss.

The gradient of the loss is minus the estimate. Parameters enter a chain of K steps twice: through the densities of
steps 1 .. K-1 (*score terms*, ``advantage * grad log p``) and through the deterministic last step. Score terms alone
miss the second; the estimators differ in how they account for it:

============ ======================================================= =================================================
estimator    last step                                               unbiased for
============ ======================================================= =================================================
reinforce    score term of one draw z = x_K + head_std eps           E[R(z)], the smoothed reward
smoothed     M draws z_m per latent, averaged; steps before it by    the smoothed reward; M lowers the variance only
             score terms or by reparameterisation
hybrid       backpropagation through R                               the reward function itself
pathwise     backpropagation through R and the last k steps, no      the reward function itself if k = K
             score terms (DRaFT-K, 2309.17400)
============ ======================================================= =================================================

Smoothing has a bias of order head_std^2: for R = sin 3z it multiplies the gradient by exp(-9 head_std^2 / 2).

A reward function takes latents ``[N, C, F, H, W]`` and returns ``[N]``, N a multiple of B: ``latents[i]`` belongs to
sample ``i % B``. Samples are groups of ``num_generations`` neighbours with the same prompt. Every step is evaluated
with gradient once; pass ``transitions`` (or ``final``, the end of a reparameterised chain) to share those evaluations
with a KL.

What a step costs, its KL for one, depends on the steps before it. ``costs`` gives score terms their part of the
gradient of E[sum_k cost_k]: each step's advantage is lowered by what its chain pays after it, less the leave-one-out
mean of that. The other part, ``sum_k grad cost_k``, is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from latent_rewards.contracts import ConfigError, Policy
from latent_rewards.lro.advantages import ScaleRewards, leave_one_out, reward_scale
from latent_rewards.rollout import Trajectory, Transitions, gaussian_log_ratio, policy_transitions, reparameterised
from latent_rewards.training.ranks import ALONE, Ranks

RewardFunction = Callable[[Tensor], Tensor]


def _mean_over_valid(values: Tensor, rewards: Tensor) -> Tensor:
    valid = ~torch.isnan(rewards)
    return torch.where(valid, values, torch.zeros_like(values)).sum() / valid.sum().clamp(min=1)


def chain_log_ratios(trajectory: Trajectory, transitions: Transitions) -> Tensor:
    """Return ``[B, K-1]``: log of the new over the sampling policy's density of each step that has one.

    Raises:
        DataError: a step before the last is deterministic (eta = 0).
    """
    columns = []
    for step in range(trajectory.num_steps - 1):
        mean, std = transitions[step]
        old_mean = trajectory.means[step] if trajectory.means else mean.detach()
        columns.append(gaussian_log_ratio(trajectory.states[step + 1].detach(), mean, old_mean, std))
    return torch.stack(columns, dim=1) if columns else trajectory.final.new_zeros(trajectory.final.shape[0], 0)


def clipped_objective(log_ratios: Tensor, advantages: Tensor, epsilon: float | None) -> Tensor:
    """Return the sum over steps of ``min(r A, clip(r, 1 - epsilon, 1 + epsilon) A)``, ``[B]`` (PPO, 1707.06347).

    At r = 1 its gradient is ``A grad log p``.

    Args:
        log_ratios: log r, ``[B, S]``.
        advantages: A, ``[B]``, or ``[B, S]`` where steps differ in it.
        epsilon: None does not clip.
    """
    ratios, weights = log_ratios.exp(), advantages if advantages.ndim == 2 else advantages[:, None]
    terms = ratios * weights
    if epsilon is not None:
        terms = torch.minimum(terms, ratios.clamp(1 - epsilon, 1 + epsilon) * weights)
    return terms.sum(dim=1)


def advantages_with_costs(advantages: Tensor, costs: Tensor | None, num_generations: int) -> Tensor:
    """Return each step's advantage ``[B, K]``: the reward's less the baselined costs of the steps after it.

    The cost of a step is settled before it is taken, so the last step pays for nothing and a step's own cost is not its
    own doing. The baseline is the mean of the siblings' costs after the same step.

    Args:
        advantages: of the reward, ``[B]``.
        costs: ``[B, K]``, in the advantages' units; None returns the advantages ``[B]`` as they are.
        num_generations: samples per group; at least 2 if K > 1.

    Raises:
        ConfigError: fewer than 2 generations.
    """
    if costs is None:
        return advantages
    after = costs.detach().flip(1).cumsum(1).flip(1)[:, 1:]
    columns = [advantages - leave_one_out(column, num_generations) for column in after.unbind(1)]
    return torch.stack([*columns, advantages], dim=1)


def reinforce(
    policy: Policy,
    trajectory: Trajectory,
    reward: RewardFunction,
    *,
    head_std: float,
    head_noise: Tensor | None,
    num_generations: int,
    scale_rewards: ScaleRewards = "none",
    ranks: Ranks = ALONE,
    epsilon: float | None = None,
    transitions: Transitions | None = None,
    costs: Tensor | None = None,
) -> Tensor:
    """REINFORCE with a Gaussian head on the last step and the leave-one-out baseline.

    Without a head the last step is left out, as in most public code: what the parameters do there is not seen, and the
    gradient is biased (half of the true one where all steps share their parameters and matter alike, for instance).

    Args:
        policy: the policy that is trained.
        trajectory: B sampled chains.
        reward: called once, without gradient, on ``[B, C, F, H, W]``.
        head_std: standard deviation of the head z = x_K + head_std eps.
        head_noise: eps, ``[B, C, F, H, W]``; None leaves the last step out.
        num_generations: samples per prompt, at least 2.
        scale_rewards: see :func:`~latent_rewards.lro.advantages.reward_scale`.
        ranks: likewise.
        epsilon: clips the probability ratio of each step; None does not.
        transitions: the policy's transitions at the trajectory's states, if computed already.
        costs: ``[B, K]``, what each step of each chain costs, without gradient; None is nothing.

    Raises:
        ConfigError: ``num_generations`` or ``head_std`` is too small.
        DataError: a step before the last is deterministic.
    """
    steps = transitions if transitions is not None else policy_transitions(policy, trajectory)
    final = trajectory.final.detach()
    sample = final if head_noise is None else final + _checked_std(head_std) * head_noise
    with torch.no_grad():
        rewards = reward(sample)
    advantages = leave_one_out(rewards, num_generations) / reward_scale(rewards, num_generations, scale_rewards, ranks)
    log_ratios = chain_log_ratios(trajectory, steps)
    if head_noise is not None:
        head = gaussian_log_ratio(sample, steps[-1][0], final, head_std)
        log_ratios = torch.cat([log_ratios, head[:, None]], dim=1)
    advantages = advantages_with_costs(advantages, costs, num_generations)
    if advantages.ndim == 2:
        advantages = advantages[:, : log_ratios.shape[1]]
    return -_mean_over_valid(clipped_objective(log_ratios, advantages, epsilon), rewards)


def smoothed(
    policy: Policy,
    trajectory: Trajectory,
    reward: RewardFunction,
    *,
    head_std: float,
    head_noise: Tensor,
    num_generations: int,
    antithetic: bool = False,
    chain: Literal["score", "path"] = "score",
    last_k: int | None = None,
    scale_rewards: ScaleRewards = "none",
    ranks: Ranks = ALONE,
    epsilon: float | None = None,
    transitions: Transitions | None = None,
    final: Tensor | None = None,
    costs: Tensor | None = None,
) -> Tensor:
    """REINFORCE on the head alone: M draws from a cheap reward at each final latent.

    The last step's surrogate is ``-<g, x_K>`` with ``g = 1/M sum_m (R_m - baseline_m) eps_m / head_std`` held constant.
    The baseline is the mean of the other draws, or with ``antithetic`` the mean of the pair. Steps before the last
    either have score terms, whose leave-one-out advantages come from the mean over a chain's draws, or are
    reparameterised: then ``<g, x_K>`` is backpropagated through the last ``last_k`` of them. Both are unbiased (the
    second for ``last_k`` = K) and neither asks the reward for a gradient; the variance of score terms grows with the
    event dimension, that of the path does not.

    Args:
        policy: the policy that is trained.
        trajectory: B sampled chains.
        reward: called once, without gradient, on ``[M * B, C, F, H, W]``.
        head_std: standard deviation of the head.
        head_noise: ``[M, B, C, F, H, W]``, M at least 2; with ``antithetic`` ``[M/2, B, C, F, H, W]``, used twice.
        num_generations: samples per prompt; at least 2 if there is a step < K.
        antithetic: use each noise with both signs.
        chain: "score" or "path", for the steps before the last.
        last_k: steps that "path" goes through, the last included; None is all.
        scale_rewards: see :func:`~latent_rewards.lro.advantages.reward_scale`.
        ranks: likewise.
        epsilon: clips the probability ratio of each step < K; None does not.
        transitions: the policy's transitions at the trajectory's states, if computed already.
        final: with "path", the end ``[B, C, F, H, W]`` of the reparameterised chain, if computed already.
        costs: ``[B, K]``, what each step of each chain costs, without gradient; for "score".

    Raises:
        ConfigError: ``num_generations``, ``head_std`` or the number of draws is too small.
        DataError: a step before the last is deterministic.
    """
    draws = torch.cat([head_noise, -head_noise]) if antithetic else head_noise
    if chain == "path":
        final = final if final is not None else reparameterised(policy, trajectory, last_k, transitions).final
    else:
        steps = transitions if transitions is not None else policy_transitions(policy, trajectory)
        final = steps[-1][0]
    with torch.no_grad():
        rewards = reward((final.detach() + _checked_std(head_std) * draws).flatten(0, 1)).view(draws.shape[:2])
        slope = _head_slope(rewards, draws, head_std, antithetic)
        means = rewards.nanmean(dim=0)
        scale = reward_scale(means, num_generations, scale_rewards, ranks)
    last = (slope * (final - final.detach())).flatten(1).sum(dim=1) / scale
    loss = -_mean_over_valid(last, means)
    if chain == "path":
        return loss
    return loss + _score_loss(trajectory, steps, means, scale, num_generations, epsilon, costs)


def _head_slope(rewards: Tensor, draws: Tensor, head_std: float, antithetic: bool) -> Tensor:
    """Estimate the smoothed gradient at the final latents, ``[B, ...]``, from draws with rewards ``[M, B]``."""
    if antithetic:
        plus, minus = rewards.chunk(2)
        half = (plus - minus) / 2
        centred = torch.cat([half, -half]).nan_to_num(nan=0.0)
        count = 2 * (~torch.isnan(half)).sum(dim=0)
    else:
        centred = leave_one_out(rewards.T.reshape(-1), rewards.shape[0]).view(rewards.T.shape).T
        count = (~torch.isnan(rewards)).sum(dim=0)
    weights = centred / (count.clamp(min=1) * head_std)
    return (weights.view(weights.shape + (1,) * (draws.ndim - 2)).to(draws.dtype) * draws).sum(dim=0)


def hybrid(
    policy: Policy,
    trajectory: Trajectory,
    reward: RewardFunction,
    *,
    num_generations: int,
    scale_rewards: ScaleRewards = "none",
    ranks: Ranks = ALONE,
    epsilon: float | None = None,
    transitions: Transitions | None = None,
    costs: Tensor | None = None,
) -> Tensor:
    """Score terms for steps < K with the sampled chains' advantages, and backpropagation of R through step K.

    Both terms use the same rewards in the same units, so their sum is unbiased for the reward function itself.

    Args:
        policy: the policy that is trained.
        trajectory: B sampled chains.
        reward: called once, with gradient, on ``[B, C, F, H, W]``.
        num_generations: samples per prompt; at least 2 if there is a step < K.
        scale_rewards: see :func:`~latent_rewards.lro.advantages.reward_scale`; divides both terms.
        ranks: likewise.
        epsilon: clips the probability ratio of each step < K; None does not.
        transitions: the policy's transitions at the trajectory's states, if computed already.
        costs: ``[B, K]``, what each step of each chain costs, without gradient; None is nothing.

    Raises:
        ConfigError: ``num_generations`` is too small.
        DataError: a step before the last is deterministic.
    """
    steps = transitions if transitions is not None else policy_transitions(policy, trajectory)
    rewards = _with_gradient(reward, steps[-1][0])
    constant = rewards.detach()
    scale = reward_scale(constant, num_generations, scale_rewards, ranks)
    return -_mean_over_valid(rewards / scale, constant) + _score_loss(
        trajectory, steps, constant, scale, num_generations, epsilon, costs
    )


def pathwise(
    policy: Policy,
    trajectory: Trajectory,
    reward: RewardFunction,
    *,
    last_k: int | None = None,
    num_generations: int = 1,
    scale_rewards: ScaleRewards = "none",
    ranks: Ranks = ALONE,
    transitions: Transitions | None = None,
    final: Tensor | None = None,
) -> Tensor:
    """Backpropagation of R through the last ``last_k`` steps (DRaFT-K; Clark et al. 2023).

    Args:
        policy: the policy that is trained.
        trajectory: B chains sampled from it.
        reward: called once, with gradient, on ``[B, C, F, H, W]``.
        last_k: number of steps the gradient goes through; None is all, which is unbiased. More than K counts as K.
        num_generations: samples per prompt; matters to ``scale_rewards`` only.
        scale_rewards: see :func:`~latent_rewards.lro.advantages.reward_scale`.
        ranks: likewise.
        transitions: the policy's transitions at the trajectory's states; only the tail's first is used.
        final: the end ``[B, C, F, H, W]`` of the reparameterised chain, if computed already; the rest is then not used.

    Raises:
        ConfigError: ``last_k`` is below 1.
    """
    end = final if final is not None else reparameterised(policy, trajectory, last_k, transitions).final
    rewards = _with_gradient(reward, end)
    scale = reward_scale(rewards, num_generations, scale_rewards, ranks)
    return -_mean_over_valid(rewards / scale, rewards.detach())


def _with_gradient(reward: RewardFunction, latents: Tensor) -> Tensor:
    rewards = reward(latents)
    if latents.requires_grad and not rewards.requires_grad:
        raise ConfigError(
            "the reward has no gradient at the latents, so nothing would be learnt through it: leave out what detaches "
            "or thresholds it (detach, item, comparisons), or use ReinforceTrainer, which needs none"
        )
    return rewards


def _score_loss(
    trajectory: Trajectory,
    transitions: Transitions,
    rewards: Tensor,
    scale: Tensor,
    num_generations: int,
    epsilon: float | None,
    costs: Tensor | None,
) -> Tensor:
    if trajectory.num_steps == 1:
        return rewards.new_zeros(())
    advantages = advantages_with_costs(leave_one_out(rewards, num_generations) / scale, costs, num_generations)
    if costs is not None:
        advantages = advantages[:, :-1]
    log_ratios = chain_log_ratios(trajectory, transitions)
    return -_mean_over_valid(clipped_objective(log_ratios, advantages, epsilon), rewards)


def _checked_std(head_std: float) -> float:
    if not head_std > 0:
        raise ConfigError(f"head_std must be positive; got {head_std}")
    return head_std
