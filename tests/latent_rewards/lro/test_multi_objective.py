"""Several rewards in one run: how the trainers aggregate them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError
from latent_rewards.lro.advantages import normalize_then_sum
from latent_rewards.lro.config import LROConfig
from latent_rewards.lro.trainers import DifferentiableRewardTrainer, ReinforceTrainer
from latent_rewards.rewards import Tchebycheff, WeightedSum

pytestmark = pytest.mark.filterwarnings("ignore:no oracle", "ignore:one reward and no holdout")

WEIGHTS = {"near": 1.0, "far": 0.5}


class Two(nn.Module):
    """Minus the squared distances to two points, one of them in far larger units."""

    reward_names = ("near", "far")

    def __init__(self, near: tuple[float, ...] = (1.0, 0.0), far: tuple[float, ...] = (0.0, 1.0)) -> None:
        super().__init__()
        self.near, self.far, self.units = near, far, 100.0

    def scores(self, latents: Tensor, prompts: list[str], pessimism: float = 0.0) -> dict[str, Tensor]:
        x = latents.flatten(1)
        squared: Callable[[tuple[float, ...]], Tensor] = lambda point: (x - x.new_tensor(point)).square().sum(1)  # noqa: E731
        return {"near": -0.5 * squared(self.near), "far": -0.5 * self.units * squared(self.far)}


def config(**settings) -> LROConfig:
    chosen = {
        "num_updates": 3, "learning_rate": 0.05, "prompts_per_update": 3, "num_generations": 4, "step_counts": [1],
        "beta": 0.0, "pessimism": 0.0, "max_grad_norm": 0.0, "head_std": 0.3, "num_draws": 4, "device": "cpu",
        "progress": False,
    }  # fmt: skip
    return LROConfig(**(chosen | settings))


def gradients(trainer, policy: nn.Module, logs: dict | None = None) -> Tensor:
    batch = trainer._draw_batch(0)
    loss, parts = trainer._loss(0, 0, batch, trainer._rollout(batch))
    loss.backward()
    (logs if logs is not None else {}).update(parts)
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


GDPO = {"multi_objective_aggregation": "normalize_then_sum"}


def test_normalize_then_sum_has_gdpos_advantages(linear_policy):
    policy = linear_policy(dim=2, gain=0.5)
    settings = config(estimator="reinforce", **GDPO)
    trainer = ReinforceTrainer(policy, Two(), ["a"], settings, reward=WeightedSum(WEIGHTS))
    batch = trainer._draw_batch(0)
    start = batch.noise[0]
    noise = trainer.samples.noise("lro/head", 0, batch.sample_ids, 1)[0]
    scores = Two().scores(0.5 * start + 0.3 * noise, [])
    advantages = 4 / 3 * normalize_then_sum(scores, WEIGHTS, 4)
    score = (advantages[:, None] * (noise / 0.3).flatten(1)).mean(0)  # of the shift
    logs: dict = {}
    found = gradients(trainer, policy, logs)
    torch.testing.assert_close(found[1:], -score, rtol=1e-10, atol=1e-12)
    assert logs["reward"] == pytest.approx(float(scores["near"].mean() + 0.5 * scores["far"].mean()), rel=1e-12)


def test_draws_of_a_sample_share_its_groups_statistics(linear_policy):
    policy = linear_policy(dim=2, gain=0.5)
    settings = config(estimator="smoothed", num_draws=2, **GDPO)
    trainer = ReinforceTrainer(policy, Two(), ["a"], settings, reward=WeightedSum(WEIGHTS))
    batch = trainer._draw_batch(0)
    noise = trainer.samples.noise("lro/head/0", 0, batch.sample_ids, 1)[0]
    plus, minus = (Two().scores(0.5 * batch.noise[0] + sign * 0.3 * noise, []) for sign in (1, -1))
    expected = torch.zeros(2, dtype=torch.float64)
    for name, weight in WEIGHTS.items():
        std = ((plus[name] + minus[name]) / 2).view(3, 4).std(1, keepdim=True)
        half = ((plus[name] - minus[name]) / 2).view(3, 4) / std
        expected += weight * (half.view(-1, 1) * noise.flatten(1) / 0.3).mean(0)
    torch.testing.assert_close(gradients(trainer, policy)[1:], -expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("trainer", "estimator"),
    [
        (ReinforceTrainer, "reinforce"), (ReinforceTrainer, "smoothed"),
        (DifferentiableRewardTrainer, "pathwise"), (DifferentiableRewardTrainer, "hybrid"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chain", ["score", "path"])
def test_normalize_then_sum_does_not_depend_on_units(linear_policy, trainer, estimator, chain):
    def gradient(units):
        policy, proxy = linear_policy(dim=2, gain=0.5), Two()
        proxy.units = units
        settings = config(estimator=estimator, step_counts=[2], chain=chain, **GDPO)
        return gradients(trainer(policy, proxy, ["a"], settings, reward=WeightedSum(WEIGHTS)), policy)

    torch.testing.assert_close(gradient(100.0), gradient(1e-3), rtol=1e-8, atol=1e-12)
    assert gradient(1.0).abs().min() > 1e-3


@pytest.mark.parametrize("reward", [WeightedSum(WEIGHTS, normalize="zscore"), Tchebycheff(WEIGHTS, WEIGHTS), None])
def test_normalize_then_sum_takes_a_plain_weighted_sum(linear_policy, exact_proxy, reward):
    proxy = exact_proxy() if reward is None else Two()
    with pytest.raises(ConfigError, match=r"needs reward=WeightedSum\(weights\) with normalize=None"):
        ReinforceTrainer(linear_policy(dim=2), proxy, ["a"], config(**GDPO), reward=reward)
    with pytest.raises(ConfigError, match="num_generations must be at least 2"):
        settings = config(estimator="pathwise", num_generations=1, **GDPO)
        DifferentiableRewardTrainer(linear_policy(dim=2), Two(), ["a"], settings, reward=WeightedSum(WEIGHTS))
    with pytest.raises(ConfigError, match="multi_objective_aggregation"):
        config(multi_objective_aggregation="sum")


def test_ranks_tune_through_their_slope(linear_policy):
    policy = linear_policy(dim=2, gain=0.5)
    reward = WeightedSum({"near": 1.0, "far": 1.0}, normalize="rank")
    settings = config(num_updates=60, prompts_per_update=8)
    DifferentiableRewardTrainer(policy, Two(), ["a"], settings, reward=reward).train()
    near, far = policy.shift.detach().flatten().tolist()
    assert near > 0.2 and far > 0.2  # towards both points, whatever their units
