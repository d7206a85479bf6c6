"""Several rewards in one run: how the trainers aggregate them."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError
from latent_rewards.lro.advantages import normalize_then_sum
from latent_rewards.lro.config import LROConfig
from latent_rewards.lro.gradients import GradientAggregation, smallest_cosine
from latent_rewards.lro.trainers import DifferentiableRewardTrainer, ReinforceTrainer
from latent_rewards.rewards import Tchebycheff, WeightedSum
from latent_rewards.training.loop import NonFiniteError
from latent_rewards.training.ranks import ALONE, Ranks

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


ALL = [
    (ReinforceTrainer, {"estimator": "reinforce"}), (ReinforceTrainer, {"chain": "score"}),
    (ReinforceTrainer, {"chain": "path"}), (DifferentiableRewardTrainer, {"estimator": "pathwise"}),
    (DifferentiableRewardTrainer, {"estimator": "hybrid"}),
]  # fmt: skip


def combined(names, rows):
    """The gradient of the loss that two or more linear losses with these gradients become."""
    x = nn.Parameter(torch.zeros(len(rows[0]), dtype=torch.float64))
    reward = WeightedSum(dict.fromkeys("abc"[: len(rows)], 1.0))
    found = []
    for name in names:
        loss, logs = GradientAggregation(name, reward, [x], seed=0)(
            0, lambda one: one(x).sum(), lambda latents: torch.tensor(rows, dtype=torch.float64) * latents, ALONE
        )
        found.append(torch.autograd.grad(loss, x)[0])
    return found, logs["conflict"]


def test_two_gradients_of_known_combinations():
    (up, shortest, cut), conflict = combined(["upgrad", "mgda", "pcgrad"], [[1.0, 0.0], [-1.0, 1.0]])
    expected = torch.tensor([0.5, 1.5], dtype=torch.float64)  # each loses its part against the other
    torch.testing.assert_close(cut, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(up, expected, rtol=0, atol=1e-3)  # torchjd regularises its quadratic programme
    torch.testing.assert_close(shortest, torch.tensor([0.2, 0.4], dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert conflict == pytest.approx(-(0.5**0.5), rel=1e-12)
    for found in (up, shortest, cut):
        assert (torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64) @ found).min() > 0
    (up, cut), conflict = combined(["upgrad", "pcgrad"], [[1.0, 0.5], [0.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(up, torch.tensor([1.0, 1.5], dtype=torch.float64), rtol=0, atol=1e-3)
    torch.testing.assert_close(cut, torch.tensor([1.0, 1.5], dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert conflict == 0.0
    assert smallest_cosine(torch.tensor([[4.0, 1.0], [1.0, 1.0]])) == 0.5


@pytest.mark.parametrize("name", ["upgrad", "mgda", "pcgrad"])
@pytest.mark.parametrize(("trainer", "settings"), ALL)
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_the_trainers_gradient_is_torchjds(linear_policy, trainer, settings, name, aggregation):
    from torchjd.aggregation import MGDA, PCGrad, UPGrad

    aggregators = {"upgrad": UPGrad(torch.ones(2, dtype=torch.float64)), "mgda": MGDA(), "pcgrad": PCGrad()}

    def gradient(weights, how, logs=None):
        policy = linear_policy(dim=2, gain=0.5)
        chosen = config(step_counts=[2], multi_objective_aggregation=aggregation, gradient_aggregation=how, **settings)
        proxy = Two(near=(1.0, 0.0), far=(-1.0, 0.5))
        return gradients(trainer(policy, proxy, ["a"], chosen, reward=WeightedSum(weights)), policy, logs)

    weights, logs = {"near": 1.0, "far": 0.05}, {}
    rows = torch.stack([gradient({**dict.fromkeys(weights, 0.0), n: w}, None) for n, w in weights.items()])
    torch.testing.assert_close(gradient(weights, None), rows.sum(0), rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(gradient(weights, name, logs), aggregators[name](rows), rtol=1e-6, atol=1e-10)
    cosine = torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0)
    assert logs["conflict"] == pytest.approx(float(cosine), rel=1e-6)


def test_kl_and_anchor_are_added_as_usual(linear_policy):
    class Pull:
        def loss(self, policy, condition, noise):
            return 3.0 * policy.shift.sum()

        def after_step(self):
            pass

        state_dict = load_state_dict = None

    def gradient(**extra):
        policy, reference = linear_policy(dim=2, gain=0.5), linear_policy(dim=2, gain=0.2)
        beta = 0.1 if extra else 0.0
        settings = config(gradient_aggregation="pcgrad", beta=beta)
        trainer = DifferentiableRewardTrainer(
            policy, Two(), ["a"], settings, reward=WeightedSum(WEIGHTS), reference=reference if extra else None, **extra
        )
        logs: dict = {}
        return gradients(trainer, policy, logs), logs

    plain, _ = gradient()
    both, logs = gradient(anchor=Pull())
    assert logs["kl"] > 0 and logs["anchor"] == 0.0
    torch.testing.assert_close((both - plain)[1:].mean(), torch.tensor(3.0, dtype=torch.float64), rtol=0.1, atol=0)
    assert (both - plain)[0].abs() > 1e-3


def test_ranks_compare_averaged_gradients(monkeypatch):
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    averaged = []
    monkeypatch.setattr(Ranks, "average", lambda self, tensors: averaged.extend(tensors))
    aggregation = GradientAggregation("pcgrad", WeightedSum({"a": 1.0, "b": 1.0}), [x], seed=0)
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    aggregation(0, lambda one: one(x).sum(), lambda latents: rows * latents, ALONE)
    assert torch.equal(torch.stack(averaged), rows)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    combined(["pcgrad"], [[1.0, 0.0], [-1.0, 1.0]])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_gradient_that_is_not_finite_is_left_to_the_loop(linear_policy):
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    rows = torch.tensor([[1.0, 0.0], [float("nan"), 1.0]], dtype=torch.float64)
    aggregation = GradientAggregation("upgrad", WeightedSum({"a": 1.0, "b": 1.0}), [x], seed=0)
    loss, logs = aggregation(0, lambda one: one(x).sum(), lambda latents: rows * latents, ALONE)
    assert not torch.isfinite(torch.autograd.grad(loss, x)[0]).all() and logs == {}

    class Broken(Two):
        def scores(self, latents, prompts, pessimism=0.0):
            scores = super().scores(latents, prompts)
            return {**scores, "far": scores["far"] + (latents.flatten(1).sum(1) * 0).sqrt()}

    policy = linear_policy(dim=2, gain=0.5)
    settings = config(gradient_aggregation="upgrad")
    with pytest.raises(NonFiniteError, match="parameters kept"):
        DifferentiableRewardTrainer(policy, Broken(), ["a"], settings, reward=WeightedSum(WEIGHTS)).train()
    assert float(policy.gain.detach()) == 0.5


def test_what_gradient_aggregation_needs_is_said(linear_policy, exact_proxy, monkeypatch):
    settings = config(gradient_aggregation="upgrad")
    for reward in (WeightedSum({"near": 1.0}), Tchebycheff(WEIGHTS, WEIGHTS)):
        with pytest.raises(ConfigError, match="at least two rewards"):
            ReinforceTrainer(linear_policy(dim=2), Two(), ["a"], settings, reward=reward)
    with pytest.raises(ConfigError, match="gradient_aggregation"):
        config(gradient_aggregation="nash")
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(ConfigError, match=r"pip install 'latent-rewards\[multi\]'"):
        ReinforceTrainer(linear_policy(dim=2), Two(), ["a"], settings, reward=WeightedSum(WEIGHTS))
