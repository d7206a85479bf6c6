"""Trajectories of a policy, and log-probabilities and KL of its Gaussian transitions.

A policy of K steps is the chain ``x_0 ~ N(0, I)``, ``x_{k+1} = mean_k(x_k) + std_k eps_{k+1}``, whose last step is
deterministic: ``x_K = mean_{K-1}(x_{K-1})``. So only the first K - 1 steps have a density; a *Gaussian head*
``z = x_K + head_std eps`` (see :mod:`latent_rewards.lro.estimators`) stands in where the last one needs one.

Log-probabilities and KL are sums over event dimensions, in nats, in float32 (float64 stays float64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latent_rewards.contracts import Condition, ConfigError, DataError, Policy

Transitions = Sequence[tuple[Tensor, Tensor]]
"""One ``(mean [B, C, F, H, W], std [] or [B, 1, 1, 1, 1])`` per step, as ``Policy.transition`` returns them."""


@dataclass
class Chain:
    """Steps of a policy, evaluated with gradient at the states of a trajectory.

    Attributes:
        states: what each step started from, ``[B, C, F, H, W]`` each; with a gradient where the chain is
            reparameterised, else detached.
        transitions: what the policy made of them.
    """

    states: Sequence[Tensor]
    transitions: Transitions

    @property
    def final(self) -> Tensor:
        """The final latents ``[B, C, F, H, W]``, with gradient."""
        return self.transitions[-1][0]


@dataclass
class Trajectory:
    """What one rollout went through.

    Attributes:
        states: K + 1 tensors ``[B, C, F, H, W]``: pure noise first, the final latents last.
        condition: the condition of the B samples.
        num_steps: K.
        means: the K means of the policy that sampled the states, detached; empty if they are not known.
    """

    states: list[Tensor]
    condition: Condition
    num_steps: int
    means: list[Tensor] = field(default_factory=list)

    @property
    def final(self) -> Tensor:
        """The final latents ``[B, C, F, H, W]``."""
        return self.states[-1]


def rollout(policy: Policy, condition: Condition, noise: Tensor, num_steps: int) -> Trajectory:
    """Sample a trajectory; whether a gradient is recorded is the caller's choice (``torch.no_grad``).

    Args:
        policy: the generator.
        condition: one row per sample.
        noise: ``[num_steps, B, C, F, H, W]``; ``noise[0]`` is the initial latents, ``noise[k]`` follows step k-1.
        num_steps: length of the chain.

    Raises:
        DataError: ``noise`` has another shape, or the policy's last step is not deterministic.
    """
    if noise.ndim != 6 or noise.shape[0] != num_steps or noise.shape[1] != len(condition):
        raise DataError(
            f"noise must be [num_steps={num_steps}, B={len(condition)}, C, F, H, W]; got shape {tuple(noise.shape)}"
        )
    latents = noise[0]
    states, means = [latents], []
    for step in range(num_steps):
        mean, std = policy.transition(latents, step, num_steps, condition)
        if step + 1 < num_steps:
            latents = mean + std * noise[step + 1]
        elif bool((torch.as_tensor(std) != 0).any()):
            raise DataError(
                f"the last of {num_steps} steps must be deterministic (std 0); the policy returned std {std}"
            )
        else:
            latents = mean
        states.append(latents)
        means.append(mean.detach())
    return Trajectory(states, condition, num_steps, means)


def policy_transitions(policy: Policy, trajectory: Trajectory) -> list[tuple[Tensor, Tensor]]:
    """Return the K transitions at the trajectory's detached states: one forward each, shared by log-probs and KL."""
    steps = zip(range(trajectory.num_steps), trajectory.states, strict=False)
    return [policy.transition(x.detach(), k, trajectory.num_steps, trajectory.condition) for k, x in steps]


def detached_chain(policy: Policy, trajectory: Trajectory) -> Chain:
    """Return all K steps at the trajectory's detached states: see :func:`policy_transitions`."""
    return Chain([state.detach() for state in trajectory.states[:-1]], policy_transitions(policy, trajectory))


def reparameterised(
    policy: Policy, trajectory: Trajectory, last_k: int | None = None, transitions: Transitions | None = None
) -> Chain:
    """Return the last ``last_k`` steps, each taken from where the one before it ended, so that gradients go through.

    Sampled states keep their values: ``x_{k+1} + (mean_k - stopgrad mean_k)`` is the reparameterised step.

    Args:
        policy: carries the gradient.
        trajectory: states sampled from it.
        last_k: how many steps; None is all, and so is more than K.
        transitions: the policy's transitions at the trajectory's states; only that of the first step is used.

    Raises:
        ConfigError: ``last_k`` is below 1.
    """
    if last_k is not None and last_k < 1:
        raise ConfigError(f"last_k must be at least 1, or None for all steps; got {last_k}")
    first = max(0, trajectory.num_steps - (last_k or trajectory.num_steps))
    states = [trajectory.states[first].detach()]
    steps: list[tuple[Tensor, Tensor]] = []
    for step in range(first, trajectory.num_steps):
        if step > first:
            mean = steps[-1][0]
            states.append(trajectory.states[step].detach() + (mean - mean.detach()))
        if step == first and transitions is not None:
            steps.append(transitions[step])
        else:
            steps.append(policy.transition(states[-1], step, trajectory.num_steps, trajectory.condition))
    return Chain(states, steps)


def path_chain(policy: Policy, trajectory: Trajectory, last_k: int | None = None) -> Chain:
    """Return all K steps, the last ``last_k`` of them reparameterised and those before at detached states.

    Raises:
        ConfigError: ``last_k`` is below 1.
    """
    tail = reparameterised(policy, trajectory, last_k)
    before = [state.detach() for state in trajectory.states[: trajectory.num_steps - len(tail.states)]]
    steps = [policy.transition(x, k, trajectory.num_steps, trajectory.condition) for k, x in enumerate(before)]
    return Chain([*before, *tail.states], [*steps, *tail.transitions])


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _event_sum(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).sum(dim=1)


def _positive(std: Tensor | float, like: Tensor) -> Tensor:
    std = torch.as_tensor(std, dtype=like.dtype, device=like.device)
    if not bool((std > 0).all()):
        raise DataError(f"a transition with std {std.flatten()[0].item()} has no density; use a positive std")
    return std


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    """Return log N(x; mean, std^2 I), ``[B]``, a sum over the D dimensions of an event.

    ``-|x - mean|^2 / (2 std^2) - (D/2) log(2 pi std^2)``.

    Args:
        x: ``[B, ...]``; no gradient is taken away from it.
        mean: ``[B, ...]``.
        std: positive, ``[]`` or ``[B, 1, ...]``.

    Raises:
        DataError: ``std`` is not positive.
    """
    x, mean = _full(x), _full(mean)
    std = _positive(std, mean)
    return _event_sum(-0.5 * ((x - mean) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi))


def gaussian_log_ratio(x: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor | float) -> Tensor:
    """Return log N(x; mean) - log N(x; old_mean), ``[B]``, exactly 0 for equal means.

    Computed as ``<mean - old_mean, x - (mean + old_mean)/2> / std^2``: the difference of two log-probabilities of
    millions of dimensions would lose all its digits in float32.

    Raises:
        DataError: ``std`` is not positive.
    """
    x, mean, old_mean = _full(x), _full(mean), _full(old_mean)
    std = _positive(std, mean)
    return _event_sum((mean - old_mean) * (x - 0.5 * (mean + old_mean)) / std**2)


def gaussian_kl(mean_p: Tensor, mean_q: Tensor, std_p: Tensor | float, std_q: Tensor | float | None = None) -> Tensor:
    """Return KL(N(mean_p, std_p^2 I) || N(mean_q, std_q^2 I)) in nats, ``[B]``.

    ``1/2 [D std_p^2/std_q^2 + |mean_p - mean_q|^2/std_q^2 - D + 2 D log(std_q/std_p)]``.

    Args:
        mean_p: ``[B, ...]``.
        mean_q: ``[B, ...]``.
        std_p: positive, ``[]`` or ``[B, 1, ...]``.
        std_q: the same; None means ``std_p``.

    Raises:
        DataError: a standard deviation is not positive.
    """
    mean_p, mean_q = _full(mean_p), _full(mean_q)
    std_p = _positive(std_p, mean_p)
    squared = (mean_p - mean_q) ** 2
    if std_q is None:
        return _event_sum(0.5 * squared / std_p**2)
    std_q = _positive(std_q, mean_q)
    ratio = std_p / std_q
    return _event_sum(0.5 * (ratio**2 + squared / std_q**2 - 1) - torch.log(ratio))


def trajectory_log_probs(policy: Policy, trajectory: Trajectory, transitions: Transitions | None = None) -> Tensor:
    """Return the log-probabilities ``[B, K-1]`` of the steps that have a density, at detached states.

    Args:
        policy: whose probabilities.
        trajectory: the states.
        transitions: the policy's transitions at these states, if they were computed already.

    Raises:
        DataError: a step before the last is deterministic (eta = 0) and has no density.
    """
    steps = transitions if transitions is not None else policy_transitions(policy, trajectory)
    columns = [gaussian_log_prob(trajectory.states[k + 1].detach(), *steps[k]) for k in range(trajectory.num_steps - 1)]
    final = trajectory.final
    return torch.stack(columns, dim=1) if columns else _full(final.new_zeros(final.shape[0], 0))


def trajectory_kl(
    policy: Policy,
    reference: Policy,
    trajectory: Trajectory,
    head_std: float,
    transitions: Transitions | None = None,
) -> Tensor:
    """Return the per-state KL ``[B, K]`` in nats: the closed form of every step at the trajectory's detached states.

    A deterministic step (always the last) has no KL; it counts as ``|f_policy - f_reference|^2 / (2 head_std^2)``. The
    sum over steps estimates KL of the two chains without bias, but its gradient is the *per-state* one: it leaves out
    ``sum_k E[KL_k sum_{j<k} grad log p_j]``, the change of the states that are visited.

    Args:
        policy: carries the gradient.
        reference: evaluated without gradient.
        trajectory: states sampled from ``policy``.
        head_std: standard deviation of the Gaussian head.
        transitions: the policy's transitions at these states, if they were computed already.

    Raises:
        DataError: ``head_std`` is not positive.
    """
    steps = transitions if transitions is not None else policy_transitions(policy, trajectory)
    with torch.no_grad():
        reference_steps = policy_transitions(reference, trajectory)
    return _kl_columns(steps, reference_steps, head_std)


def path_kl(chain: Chain, reference: Policy, trajectory: Trajectory, head_std: float) -> Tensor:
    """Return the KL ``[B, K]`` in nats as :func:`trajectory_kl` does, at the states of a :func:`path_chain`.

    The values are the same. The gradient of the sum over steps also goes through the states, in the policy's means and
    the reference's: for a chain that is reparameterised throughout it is that of the KL of the two chains.

    Args:
        chain: the policy's K steps.
        reference: evaluated with gradient to the states; its parameters should ask for none.
        trajectory: whose condition.
        head_std: standard deviation of the Gaussian head.

    Raises:
        DataError: ``head_std`` is not positive.
    """
    steps = enumerate(chain.states)
    theirs = [reference.transition(x, k, trajectory.num_steps, trajectory.condition) for k, x in steps]
    return _kl_columns(chain.transitions, theirs, head_std)


def _kl_columns(steps: Transitions, reference_steps: Transitions, head_std: float) -> Tensor:
    columns = []
    for (mean, std), (reference_mean, reference_std) in zip(steps, reference_steps, strict=True):
        std, reference_std = torch.as_tensor(std), torch.as_tensor(reference_std)
        if not bool((std != 0).any()):
            columns.append(gaussian_kl(mean, reference_mean, head_std))
        elif torch.equal(std, reference_std):
            columns.append(gaussian_kl(mean, reference_mean, std))
        else:
            columns.append(gaussian_kl(mean, reference_mean, std, reference_std))
    return torch.stack(columns, dim=1)
