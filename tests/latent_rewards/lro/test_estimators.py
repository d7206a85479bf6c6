"""Every estimator against closed forms; each sample has its own parameters, so one backward gives B estimates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.lro.advantages import leave_one_out
from latent_rewards.lro.estimators import (
    advantages_with_costs,
    chain_log_ratios,
    clipped_objective,
    hybrid,
    pathwise,
    reinforce,
    smoothed,
)
from latent_rewards.rollout import Trajectory, gaussian_log_ratio, policy_transitions, rollout, trajectory_kl

SIGMA, HEAD = 0.7, 0.5


class Chain(nn.Module):
    """mean = gain_b x + shift_b for sample b; std = SIGMA before the last step."""

    def __init__(self, count: int, gain: float, shift: Tensor, sigma: float = SIGMA) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((count, 1, 1, 1, 1), gain, dtype=torch.float64))
        self.shift = nn.Parameter(shift.double().view(1, -1, 1, 1, 1).repeat(count, 1, 1, 1, 1))
        self.sigma, self.calls = sigma, 0

    def transition(self, latents: Tensor, step: int, num_steps: int, condition: object) -> tuple[Tensor, Tensor]:
        self.calls += torch.is_grad_enabled()
        std = 0.0 if step + 1 == num_steps else self.sigma
        return self.gain * latents + self.shift, torch.tensor(std, dtype=torch.float64)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sampled(policy: Chain, num_steps: int, seed: int = 0) -> Trajectory:
    """A rollout that starts from x_0 = 1 everywhere."""
    count, dim = policy.shift.shape[:2]
    stack = noise(num_steps, count, dim, 1, 1, 1, seed=seed)
    stack[0] = 1.0
    with torch.no_grad():
        return rollout(policy, range(count), stack, num_steps)


def estimates(loss: Tensor, parameter: Tensor, group: int = 1) -> Tensor:
    """Minus the loss's gradient, per group of samples: [groups, ...]."""
    (gradient,) = torch.autograd.grad(loss, parameter)
    return (-len(gradient) * gradient.flatten(1)).unflatten(0, (-1, group)).mean(1)


def assert_mean(values: Tensor, exact: Tensor | float) -> None:
    error = (values.mean(0) - exact).abs()
    assert (error <= 4.5 * values.std(0) / math.sqrt(len(values))).all(), (values.mean(0), exact)


def assert_variance(values: Tensor, exact: Tensor | float) -> None:
    squares = (values - values.mean(0)) ** 2
    error = (squares.mean(0) - exact).abs()
    assert (error <= 4.5 * squares.std(0) / math.sqrt(len(values))).all(), (squares.mean(0), exact)


C = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
THETA = torch.tensor([0.3, 0.1, -0.4], dtype=torch.float64)


def linear(latents: Tensor) -> Tensor:
    return latents.flatten(1) @ C


def one_step(count: int = 20_000) -> tuple[Chain, Trajectory]:
    """f = THETA whatever the noise is."""
    policy = Chain(count, 0.0, THETA)
    return policy, sampled(policy, 1)


def test_reinforce_gradient_of_linear_and_quadratic_rewards():  # row 9
    policy, trajectory = one_step()
    head = noise(*trajectory.final.shape, seed=1)
    settings = {"head_std": HEAD, "head_noise": head, "num_generations": 4}
    assert_mean(estimates(reinforce(policy, trajectory, linear, **settings), policy.shift, 4), C)

    a = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 3.0]], dtype=torch.float64)

    def quadratic(latents: Tensor) -> Tensor:
        away = latents.flatten(1) - C
        return -0.5 * torch.einsum("bi,ij,bj->b", away, a, away)

    assert_mean(estimates(reinforce(policy, trajectory, quadratic, **settings), policy.shift, 4), -a @ (THETA - C))


@pytest.mark.parametrize("baseline", [0.0, 0.9])
def test_reinforce_variance_with_a_constant_baseline(baseline):  # row 10
    policy, trajectory = one_step()
    final = policy_transitions(policy, trajectory)[0][0]
    z = final.detach() + HEAD * noise(*final.shape, seed=1)
    ratio = gaussian_log_ratio(z, final, final.detach(), HEAD)
    loss = -clipped_objective(ratio[:, None], linear(z) - baseline, None).mean()
    values = estimates(loss, policy.shift)
    assert_mean(values, C)
    assert_variance(values, (C @ THETA - baseline) ** 2 / HEAD**2 + C @ C + C**2)


def test_leave_one_out_variance_of_a_pair():
    policy, trajectory = one_step()
    loss = reinforce(
        policy, trajectory, linear, head_std=HEAD, head_noise=noise(*trajectory.final.shape, seed=2), num_generations=2
    )
    assert_variance(estimates(loss, policy.shift, 2), C @ C + C**2)


def test_a_baseline_that_includes_the_sample_scales_the_gradient():  # row 12
    policy, trajectory = one_step(40)
    final = policy_transitions(policy, trajectory)[0][0]
    z = final.detach() + HEAD * noise(*final.shape, seed=1)
    rewards = linear(z).view(-1, 4)
    included = (rewards - rewards.mean(1, keepdim=True)).view(-1)
    biased, unbiased = (
        estimates(
            -clipped_objective(gaussian_log_ratio(z, final, final.detach(), HEAD)[:, None], a, None).mean(), final
        )
        for a in (included, leave_one_out(rewards.view(-1), 4))
    )
    torch.testing.assert_close(biased, 0.75 * unbiased, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("draws", "antithetic", "divisor"), [(8, False, 7), (8, True, 4)])
def test_smoothed_variance_falls_with_the_draws(draws, antithetic, divisor):
    policy, trajectory = one_step(5000)
    head = noise(draws // (1 + antithetic), *trajectory.final.shape, seed=3)
    loss = smoothed(
        policy, trajectory, linear, head_std=HEAD, head_noise=head, num_generations=1, antithetic=antithetic
    )
    values = estimates(loss, policy.shift)
    assert_mean(values, C)
    assert_variance(values, (C @ C + C**2) / divisor)


@pytest.mark.parametrize("draws", [2, 64])
def test_smoothing_bias_does_not_depend_on_the_number_of_draws(draws):
    exact = 0.212
    policy = Chain(128_000 // draws, 0.0, torch.tensor([math.acos(exact / 3) / 3], dtype=torch.float64))
    trajectory = sampled(policy, 1)

    def wave(latents: Tensor) -> Tensor:
        return (3 * latents).sin().flatten(1).sum(1)

    head = noise(draws, *trajectory.final.shape, seed=4)
    values = estimates(
        smoothed(policy, trajectory, wave, head_std=0.5, head_noise=head, num_generations=1), policy.shift
    )
    assert_mean(values, exact * math.exp(-9 * 0.5**2 / 2))
    assert round(exact * math.exp(-9 * 0.5**2 / 2), 3) == 0.069
    assert float((values.mean() - exact).abs()) > 10 * float(values.std()) / math.sqrt(len(values))
    exact_values = estimates(pathwise(policy, trajectory, wave), policy.shift)
    torch.testing.assert_close(exact_values, torch.full_like(exact_values, exact), rtol=1e-10, atol=0)


GAIN = 1.3
"""x_1 = GAIN + sigma eps, output GAIN x_1, so E R = GAIN^2 for R = x: the gradient is 2 GAIN, half of it per step."""


def identity(latents: Tensor) -> Tensor:
    return latents.flatten(1).sum(1)


def two_steps(count: int = 20_000) -> tuple[Chain, Trajectory]:
    policy = Chain(count, GAIN, torch.zeros(1))
    return policy, sampled(policy, 2)


def test_score_terms_alone_give_half_of_the_gradient():
    policy, trajectory = two_steps()
    loss = reinforce(policy, trajectory, identity, head_std=HEAD, head_noise=None, num_generations=4)
    values = estimates(loss, policy.gain, 4)
    assert_mean(values, GAIN)
    assert float(values.mean()) < 1.5 * GAIN


def test_every_estimator_counts_the_last_step():
    policy, trajectory = two_steps()
    head = noise(4, *trajectory.final.shape, seed=5)
    losses = {
        "reinforce": reinforce(policy, trajectory, identity, head_std=HEAD, head_noise=head[0], num_generations=4),
        "smoothed": smoothed(policy, trajectory, identity, head_std=HEAD, head_noise=head, num_generations=4),
        "antithetic": smoothed(
            policy, trajectory, identity, head_std=HEAD, head_noise=head, num_generations=4, antithetic=True
        ),
        "smoothed path": smoothed(
            policy, trajectory, identity, head_std=HEAD, head_noise=head, num_generations=1, chain="path"
        ),
        "hybrid": hybrid(policy, trajectory, identity, num_generations=4),
        "pathwise": pathwise(policy, trajectory, identity),
    }
    for loss in losses.values():
        assert_mean(estimates(loss, policy.gain, 4), 2 * GAIN)


def test_pathwise_through_the_last_step_only_is_half():
    policy, trajectory = two_steps()
    assert_mean(estimates(pathwise(policy, trajectory, identity, last_k=1), policy.gain), GAIN)
    head = noise(4, *trajectory.final.shape, seed=6)
    options = {"head_std": HEAD, "head_noise": head, "num_generations": 1, "chain": "path", "last_k": 1}
    assert_mean(estimates(smoothed(policy, trajectory, identity, **options), policy.gain), GAIN)
    torch.testing.assert_close(pathwise(policy, trajectory, identity), -identity(trajectory.final).mean())


def test_hybrid_is_unbiased_for_a_curved_reward_where_smoothed_is_not():
    policy, trajectory = two_steps(60_000)

    def wave(latents: Tensor) -> Tensor:
        return latents.sin().flatten(1).sum(1)

    # y = GAIN x_1 ~ N(GAIN^2, (GAIN SIGMA)^2), E sin y = sin(GAIN^2) exp(-(GAIN SIGMA)^2 / 2)
    damp = math.exp(-((GAIN * SIGMA) ** 2) / 2)
    exact = damp * (2 * GAIN * math.cos(GAIN**2) - GAIN * SIGMA**2 * math.sin(GAIN**2))
    assert_mean(estimates(hybrid(policy, trajectory, wave, num_generations=4), policy.gain, 4), exact)
    assert_mean(estimates(pathwise(policy, trajectory, wave), policy.gain), exact)
    head = noise(8, *trajectory.final.shape, seed=6)
    loss = smoothed(policy, trajectory, wave, head_std=1.0, head_noise=head, num_generations=4, antithetic=True)
    assert_mean(estimates(loss, policy.gain, 4), exact * math.exp(-0.5))


def test_each_needed_step_is_evaluated_with_gradient_once():
    policy = Chain(4, GAIN, torch.zeros(2))
    trajectory = sampled(policy, 3)
    head = noise(2, *trajectory.final.shape)
    grouped = {"num_generations": 2}
    for expected, call in (
        (
            3,
            lambda t: reinforce(
                policy, trajectory, identity, head_std=1.0, head_noise=head[0], transitions=t, **grouped
            ),
        ),
        (3, lambda t: smoothed(policy, trajectory, identity, head_std=1.0, head_noise=head, transitions=t, **grouped)),
        (3, lambda t: hybrid(policy, trajectory, identity, transitions=t, **grouped)),
        (3, lambda t: pathwise(policy, trajectory, identity, transitions=t)),
        (2, lambda t: pathwise(policy, trajectory, identity, transitions=t, last_k=2)),
    ):
        policy.calls = 0
        call(None)
        assert policy.calls == expected
        shared = policy_transitions(policy, trajectory)
        policy.calls = 0
        trajectory_kl(policy, policy, trajectory, 1.0, shared)
        call(shared)
        assert policy.calls <= 2  # only what a longer pathwise tail needs beyond its first step


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_scale_rewards_divides_both_terms(scale):
    policy = Chain(8, GAIN, torch.zeros(1))
    trajectory = sampled(policy, 2)
    rewards = identity(trajectory.final)
    std = rewards.view(-1, 4).std(1).repeat_interleave(4) if scale == "group" else rewards.std().expand(8)
    plain = estimates(hybrid(policy, trajectory, identity, num_generations=4), policy.gain)
    scaled = estimates(hybrid(policy, trajectory, identity, num_generations=4, scale_rewards=scale), policy.gain)
    torch.testing.assert_close(scaled, plain / std[:, None], rtol=1e-10, atol=0)


def test_nan_rewards_are_excluded():
    policy = Chain(6, GAIN, torch.zeros(1))
    trajectory = sampled(policy, 2)
    kept = torch.tensor([True, True, False, True, True, True])

    def sometimes(latents: Tensor) -> Tensor:
        values = identity(latents)
        return torch.where(kept.repeat(len(values) // 6), values, math.nan)

    head = noise(2, *trajectory.final.shape)
    for loss in (
        hybrid(policy, trajectory, sometimes, num_generations=3),
        smoothed(policy, trajectory, sometimes, head_std=1.0, head_noise=head, num_generations=3),
        reinforce(policy, trajectory, sometimes, head_std=1.0, head_noise=head[0], num_generations=3),
    ):
        (gradient,) = torch.autograd.grad(loss, policy.gain)
        assert gradient.flatten()[2] == 0 and gradient.isfinite().all() and gradient.flatten()[0] != 0
    value = pathwise(policy, trajectory, sometimes)
    torch.testing.assert_close(value, -identity(trajectory.final)[kept].mean())


def test_clipping_stops_the_gradient_of_ratios_that_went_too_far():
    log_ratios = torch.tensor([[0.5], [-0.5], [0.5], [-0.5], [0.1]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    objective = clipped_objective(log_ratios, advantages, 0.2)
    e = math.exp
    expected = torch.tensor([1.2, e(-0.5), -e(0.5), -0.8, e(0.1)], dtype=torch.float64)
    torch.testing.assert_close(objective, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(objective.sum(), log_ratios)
    expected[[0, 3]] = 0
    torch.testing.assert_close(gradient.flatten(), expected, rtol=1e-12, atol=0)
    # Two steps of one sample, each with its own advantage.
    by_step = clipped_objective(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, -1.0]]), 0.2)
    torch.testing.assert_close(by_step, torch.tensor([1.2 - e(0.5)]))


def test_a_step_pays_for_the_steps_after_it_less_what_its_siblings_pay():
    costs = torch.tensor([[9.0, 1.0, 2.0], [9.0, 3.0, 1.0], [9.0, 0.0, 6.0]], dtype=torch.float64)
    advantages = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)
    # To go after step 0: 3, 4, 6; after step 1: 2, 1, 6; after the last: nothing.
    expected = torch.tensor([[12, 11.5, 10], [20.5, 23, 20], [27.5, 25.5, 30]], dtype=torch.float64)
    torch.testing.assert_close(advantages_with_costs(advantages, costs, 3), expected, rtol=1e-12, atol=0)
    assert advantages_with_costs(advantages, None, 3) is advantages
    assert torch.equal(advantages_with_costs(advantages, costs[:, :1], 1), advantages[:, None])
    with pytest.raises(ConfigError, match="num_generations"):
        advantages_with_costs(advantages, costs, 1)


@pytest.mark.parametrize("epsilon", [None, 0.2])
def test_costs_enter_every_score_term_at_the_ratio_of_its_step(epsilon):
    policy = Chain(4, GAIN, torch.zeros(1))
    trajectory = sampled(policy, 3)
    with torch.no_grad():
        policy.gain += 0.1  # a later iteration of the same rollout
    costs = noise(4, 3, seed=7).abs()
    head = noise(2, *trajectory.final.shape, seed=8)
    shared = {"num_generations": 4, "epsilon": epsilon}

    def losses(costs):
        return torch.stack(
            [
                reinforce(policy, trajectory, identity, head_std=HEAD, head_noise=head[0], costs=costs, **shared),
                smoothed(policy, trajectory, identity, head_std=HEAD, head_noise=head, costs=costs, **shared),
                hybrid(policy, trajectory, identity, costs=costs, **shared),
            ]
        )

    steps = policy_transitions(policy, trajectory)
    ratios = chain_log_ratios(trajectory, steps)
    means = identity(trajectory.final + HEAD * head.mean(0))
    for found, without, rewards in zip(
        losses(costs), losses(None), [identity(trajectory.final + HEAD * head[0]), means, identity(steps[-1][0])],
        strict=True,
    ):  # fmt: skip
        advantages = leave_one_out(rewards.detach(), 4)
        both = clipped_objective(ratios, advantages_with_costs(advantages, costs, 4)[:, :-1], epsilon)
        extra = -(both - clipped_objective(ratios, advantages, epsilon)).mean()
        torch.testing.assert_close(found - without, extra, rtol=1e-9, atol=1e-12)
        mine, theirs = (torch.autograd.grad(x, policy.gain, retain_graph=True)[0] for x in (found - without, extra))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert not torch.equal(losses(costs), losses(None))


def test_ratios_are_taken_to_the_policy_that_sampled():
    policy = Chain(4, GAIN, torch.zeros(2))
    trajectory = sampled(policy, 3)
    assert chain_log_ratios(trajectory, policy_transitions(policy, trajectory)).eq(0).all()
    with torch.no_grad():
        policy.gain += 0.1
    moved = chain_log_ratios(trajectory, policy_transitions(policy, trajectory))
    x0, x1 = trajectory.states[:2]
    expected = ((x1 - GAIN * x0) ** 2 - (x1 - (GAIN + 0.1) * x0) ** 2).flatten(1).sum(1) / (2 * SIGMA**2)
    torch.testing.assert_close(moved[:, 0], expected, rtol=1e-10, atol=1e-12)


def test_what_cannot_be_estimated_is_refused():
    policy = Chain(4, GAIN, torch.zeros(1), sigma=0.0)
    trajectory = sampled(policy, 2)
    with pytest.raises(DataError, match="no density"):
        hybrid(policy, trajectory, identity, num_generations=2)
    pathwise(policy, trajectory, identity)  # needs no density
    with pytest.raises(ConfigError, match="last_k"):
        pathwise(policy, trajectory, identity, last_k=0)
    with pytest.raises(ConfigError, match="head_std"):
        reinforce(policy, trajectory, identity, head_std=0.0, head_noise=trajectory.final, num_generations=2)


def test_costs_reach_the_score_terms_whether_or_not_the_last_step_has_a_head():
    """Without a reward the head's advantage is zero, so a head changes nothing; the first step pays for the second."""
    policy, trajectory = two_steps(40)
    costs = noise(40, 2, seed=8)
    gradients = []
    for head in (noise(*trajectory.final.shape, seed=9), None):
        settings = {"head_std": HEAD, "head_noise": head, "num_generations": 4, "costs": costs}
        loss = reinforce(policy, trajectory, lambda latents: torch.zeros(40, dtype=torch.float64), **settings)
        gradients.append(estimates(loss, policy.gain))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)
    assert float(gradients[1].abs().min()) > 0
