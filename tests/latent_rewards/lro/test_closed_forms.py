"""The public trainers against exact values, for every estimator: each update gives one estimate of the gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from latent_rewards.lro.config import LROConfig
from latent_rewards.lro.trainers import DifferentiableRewardTrainer, ReinforceTrainer

pytestmark = pytest.mark.filterwarnings("ignore:no oracle", "ignore:one reward and no holdout")

ALL = [
    (ReinforceTrainer, "reinforce", "score"),
    (ReinforceTrainer, "smoothed", "score"),
    (ReinforceTrainer, "smoothed", "path"),
    (DifferentiableRewardTrainer, "hybrid", "path"),
    (DifferentiableRewardTrainer, "pathwise", "path"),
]
SIGMA, HEAD, DIM, GAIN, SHIFT = 0.6, 0.5, 3, 0.8, 0.3


def trained(case, policy, proxy, reference=None, **settings):
    trainer, estimator, chain = case
    chosen = {
        "num_updates": 40,
        "learning_rate": 1e-30,
        "prompts_per_update": 16,
        "num_generations": 4,
        "step_counts": [2],
        "head_std": HEAD,
        "num_draws": 4,
        "estimator": estimator,
        "chain": chain,
        "beta": 0.0,
        "pessimism": 0.0,
        "max_grad_norm": 0.0,
        "device": "cpu",
        "progress": False,
    }
    return trainer(policy, proxy, ["a", "b", "c"], LROConfig(**chosen | settings), reference=reference)


def ascent(found: dict[str, Tensor]) -> Tensor:
    """Estimates of d E[R] / d(gain, shift), the shifts of all dimensions being one number: ``[n, 2]``."""
    return -torch.stack([found["gain"], found["shift"].flatten(1).sum(1)], dim=1)


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize(("slope", "curvature"), [(0.7, 0.0), (0.0, 0.9)])
def test_gradient_of_linear_and_quadratic_rewards(  # row 9, and through a chain
    linear_policy, exact_proxy, gradient_estimates, assert_mean, case, num_steps, slope, curvature
):
    target = 1.5
    gain, shift = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (GAIN, SHIFT))
    mean, variance = torch.zeros(()), torch.ones(())
    for step in range(num_steps):
        mean, variance = gain * mean + shift, gain**2 * variance + (SIGMA**2 if step + 1 < num_steps else 0)
    reward = DIM * (slope * mean - curvature / 2 * ((mean - target) ** 2 + variance))
    exact = torch.stack(torch.autograd.grad(reward, (gain, shift), allow_unused=True, materialize_grads=True))

    policy = linear_policy(dim=DIM, gain=GAIN, shift=SHIFT, sigma=SIGMA)
    proxy = exact_proxy(target=target, curvature=curvature, slope=slope)
    assert_mean(ascent(gradient_estimates(trained(case, policy, proxy, step_counts=[num_steps]))), exact)


@pytest.mark.parametrize("case", ALL)
def test_variance_of_a_linear_reward(linear_policy, exact_proxy, gradient_estimates, case):  # row 10, per update
    slope, generations, draws = 0.7, 2, 4
    policy = linear_policy(dim=DIM, gain=0.0, shift=SHIFT)
    policy.gain.requires_grad_(False)
    proxy = exact_proxy(curvature=0.0, slope=slope)
    updates = 20 if case[0] is DifferentiableRewardTrainer else 1200
    settings = {"step_counts": [1], "num_updates": updates, "prompts_per_update": 1, "num_generations": generations}
    values = -gradient_estimates(trained(case, policy, proxy, num_draws=draws, **settings))["shift"].flatten(1)
    one = DIM * slope**2 + slope**2  # |c|^2 + c_i^2
    exact = {"reinforce": one, "smoothed": one / (draws / 2) / generations}.get(case[1], 0.0)
    squares = (values - values.mean(0)) ** 2
    allowed = 4.5 * squares.std(0) / math.sqrt(len(values))
    assert ((squares.mean(0) - exact).abs() <= allowed + 1e-15).all(), (squares.mean(0), exact)
    assert (allowed < 0.5 * exact).all() or exact == 0.0


class Affine(nn.Module):
    """Another proxy's scores, times ``factor`` plus ``offset``."""

    reward_names = ("quality",)

    def __init__(self, proxy: nn.Module, factor: float, offset: float) -> None:
        super().__init__()
        self.proxy, self.factor, self.offset = proxy, factor, offset

    def scores(self, latents: Tensor, prompts: list[str], pessimism: float = 0.0) -> dict[str, Tensor]:
        scores = self.proxy.scores(latents, prompts, pessimism)
        return {name: self.factor * score + self.offset for name, score in scores.items()}


@pytest.mark.parametrize("case", ALL)
def test_baselines_ignore_an_offset_and_the_groups_deviation_ignores_a_factor(  # row 12
    linear_policy, exact_proxy, gradient_estimates, case
):
    def gradient(factor, offset, scale_rewards):
        policy = linear_policy(dim=DIM, gain=GAIN, shift=SHIFT, sigma=SIGMA)
        proxy = Affine(exact_proxy(), factor, offset)
        settings = {"num_updates": 2, "prompts_per_update": 2, "scale_rewards": scale_rewards}
        return ascent(gradient_estimates(trained(case, policy, proxy, **settings)))

    plain, scaled = gradient(1.0, 0.0, "none"), gradient(1.0, 0.0, "group")
    torch.testing.assert_close(gradient(3.0, 50.0, "none"), 3 * plain, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradient(3.0, 50.0, "group"), scaled, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(scaled, plain, rtol=1e-2)


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("kl", ["per_state", "return"])
def test_the_logged_kl_is_the_gaussian_one(linear_policy, exact_proxy, case, kl):  # row 14
    away, other = 0.25, 0.9
    policy = linear_policy(dim=DIM, gain=GAIN, shift=SHIFT, sigma=SIGMA)
    reference = linear_policy(dim=DIM, gain=GAIN, shift=SHIFT + away, sigma=other)
    settings = {"num_updates": 1, "beta": 0.1, "kl": kl, "prompts_per_update": 2}
    (entry,) = trained(case, policy, exact_proxy(), reference, **settings).train().history
    first = 0.5 * ((SIGMA / other) ** 2 + (away / other) ** 2 - 1 + 2 * math.log(other / SIGMA))
    assert entry["kl"] == pytest.approx(first + away**2 / (2 * HEAD**2), rel=1e-12)
