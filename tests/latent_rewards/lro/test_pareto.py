from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError, DataError, Policy
from latent_rewards.lro.config import LROConfig
from latent_rewards.lro.pareto import PreferredReward, WeightConditioned
from latent_rewards.lro.sampling import SampleSource
from latent_rewards.lro.trainers import DifferentiableRewardTrainer, ReinforceTrainer
from latent_rewards.rollout import rollout
from latent_rewards.training.checkpoint import CheckpointError, FolderInUseError
from latent_rewards.training.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:no oracle", "ignore:one reward and no holdout")

NAMES = ("left", "right")
POINTS = torch.tensor([[-1.0, 0.5], [1.0, 0.0]], dtype=torch.float64)


class Body(nn.Module):
    """A Policy of one hidden layer; its parameters start at random but repeatable values."""

    def __init__(self, rows: type, sigma: float = 0.5) -> None:
        super().__init__()
        self.rows, self.sigma = rows, sigma
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        with torch.no_grad():
            for i, p in enumerate(self.net.parameters()):
                p.copy_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64))

    def encode(self, prompts):
        return self.rows(torch.zeros(len(prompts), 1, dtype=torch.float64))

    def latent_shape(self, condition):
        return (2, 1, 1, 1)

    def timesteps(self, num_steps):
        return [1 - k / num_steps for k in range(num_steps)]

    def transition(self, latents: Tensor, step: int, num_steps: int, condition):
        mean = self.net(latents.flatten(1)).view(latents.shape)
        return mean, torch.tensor(0.0 if step + 1 == num_steps else self.sigma, dtype=torch.float64)


class Distances:
    reward_names = NAMES

    def scores(self, latents: Tensor, prompts: list[str], pessimism: float = 0.0) -> dict[str, Tensor]:
        flat = latents.flatten(1)
        return {n: -0.5 * (flat - point).square().sum(1) for n, point in zip(NAMES, POINTS, strict=True)}


def config(**settings) -> LROConfig:
    chosen = {
        "num_updates": 300, "learning_rate": 0.03, "learning_rate_floor": 0.0, "prompts_per_update": 8,
        "num_generations": 2, "step_counts": [1], "beta": 0.0, "pessimism": 0.0, "max_grad_norm": 0.0,
        "device": "cpu", "progress": False,
    }  # fmt: skip
    return LROConfig(**(chosen | settings))


UNITS = {"left": 1.0, "right": 1.0}


@pytest.fixture
def conditioned(rows):
    return lambda **settings: WeightConditioned(Body(rows), NAMES, **settings)


def sampled(policy, count: int = 64, num_steps: int = 1) -> Tensor:
    source = torch.Generator().manual_seed(5)
    noise = torch.randn(num_steps, count, 2, 1, 1, 1, generator=source, dtype=torch.float64)
    with torch.no_grad():
        return rollout(policy, policy.encode(["a"] * count), noise, num_steps).final.flatten(1)


def test_it_starts_as_the_policy_it_wraps(rows, conditioned):
    policy, plain = conditioned(), Body(rows)
    assert isinstance(policy, Policy)
    for weights in ({"left": 1.0}, {"left": 1.0, "right": 3.0}):
        assert torch.equal(sampled(policy.at(weights), num_steps=2), sampled(plain, num_steps=2))
    assert [name for name, p in policy.named_parameters() if p.requires_grad and name.startswith("policy")] == []
    assert len(policy.additions) == 2 and not list(policy.policy.net[0]._forward_hooks)


def test_one_run_ends_in_the_whole_front(conditioned):
    policy = conditioned(freeze=False, rank=4)
    DifferentiableRewardTrainer(
        policy, Distances(), ["a"], config(num_updates=600), reward=PreferredReward(UNITS)
    ).train()
    for left in (0.1, 0.5, 0.9):
        best = left * POINTS[0] + (1 - left) * POINTS[1]  # of the weighted sum of two equal parabolas
        found = sampled(policy.at({"left": left, "right": 1 - left}))
        torch.testing.assert_close(found.mean(0), best, rtol=0, atol=0.05)
        assert float((found - best).square().sum(1).mean()) < 0.02


@pytest.mark.parametrize("estimator", ["reinforce", "smoothed"])
def test_score_estimators_train_it_with_kl_to_a_copy(conditioned, estimator):
    policy = conditioned()
    settings = config(num_updates=150, estimator=estimator, step_counts=[1, 2], beta=1e-3, head_std=0.3, num_draws=4)
    result = ReinforceTrainer(policy, Distances(), ["a", "b"], settings, reward=PreferredReward(UNITS)).train()
    assert result.history[0]["kl"] == 0.0 < result.history[-1]["kl"]
    left, right = (sampled(policy.at({name: 1.0})).mean(0) for name in NAMES)
    assert left[0] < -0.3 and right[0] > 0.3


def test_an_interrupted_run_continues_to_the_same_bits(conditioned, tmp_path):
    def run(folder, count):
        policy = conditioned()
        settings = config(num_updates=count, output_dir=str(tmp_path / folder), learning_rate_floor=1.0)
        DifferentiableRewardTrainer(policy, Distances(), ["a"], settings, reward=PreferredReward(UNITS)).train()
        return policy.state_dict()

    run("parts", 3)
    parts, whole = run("parts", 6), run("whole", 6)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_a_group_shares_weights_which_are_a_function_of_seed_update_and_group(conditioned):
    source = SampleSource(conditioned(), ["a", "b"], step_counts=[1], seed=3, device="cpu", dtype=torch.float64)
    drawn = source.update_batch(7, 4, 3).condition.preferences
    groups = drawn.view(4, 3, 2)
    assert torch.equal(groups, groups[:, :1].expand(4, 3, 2)) and len(groups[:, 0].unique(dim=0)) == 4
    torch.testing.assert_close(drawn.sum(1), torch.ones(12), rtol=1e-6, atol=0)
    parts = [source.update_batch(7, 4, 3, Ranks(rank, 2)).condition.preferences for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), drawn)
    assert not torch.equal(source.update_batch(8, 4, 3).condition.preferences, drawn)
    held = [batch.condition.preferences for batch in source.evaluation_batches("x", 0, 2000, 512)]
    left = torch.cat(held)[:, 0]
    assert abs(float(left.mean()) - 0.5) < 4.5 * (1 / 12 / 2000) ** 0.5  # uniform on [0, 1]
    assert abs(float((left < 0.1).double().mean()) - 0.1) < 4.5 * (0.09 / 2000) ** 0.5


def test_each_sample_is_rewarded_with_its_own_weights(conditioned):
    policy = conditioned()
    condition = policy.encode(["a", "b"])
    condition.preferences = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    rewards = {"right": torch.tensor([1.0, 2.0, 3.0, 4.0]), "left": torch.tensor([10.0, 20.0, 30.0, 40.0])}
    linear = PreferredReward({"left": 10.0, "right": 2.0}).given(condition, 2)
    assert linear(rewards).tolist() == [1.0, 0.5 + 0.75, 3.0, 1.0 + 1.5]
    worst = PreferredReward({"left": 10.0, "right": 2.0}, "tchebycheff", {"right": 6.0, "left": 50.0})
    assert worst.given(condition, 2)(rewards).tolist() == [-4.0, -1.5, -2.0, -0.75]
    assert PreferredReward({"left": 10.0, "right": 2.0})(rewards).tolist() == [0.75, 1.5, 2.25, 3.0]
    rows = condition.index_select(torch.tensor([1, 1]))
    assert len(rows) == 2 and torch.equal(rows.preferences, condition.preferences[[1, 1]])


def test_it_is_stored_and_found_again(conditioned, rows, tmp_path):
    policy = conditioned(rank=2, layers=("net.2",))
    with torch.no_grad():
        for p in policy.additions.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p))
    policy.save_pretrained(tmp_path / "front")
    again = WeightConditioned.from_pretrained(Body(rows), tmp_path / "front")
    chosen = {"left": 0.2, "right": 0.8}
    assert again.reward_names == NAMES and torch.equal(sampled(again.at(chosen)), sampled(policy.at(chosen)))
    assert not torch.equal(sampled(policy.at(chosen)), sampled(policy.at({"left": 1.0})))
    copied = copy.deepcopy(policy)
    assert torch.equal(sampled(copied.at(chosen)), sampled(policy.at(chosen)))

    class Other(Body):
        def __init__(self, rows):
            super().__init__(rows)
            self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    with pytest.raises(CheckpointError, match="other linear layers"):
        WeightConditioned.from_pretrained(Other(rows), tmp_path / "front")
    (tmp_path / "front" / "preferences.json").write_text("{}")
    with pytest.raises(CheckpointError, match="differs from the manifest"):
        WeightConditioned.from_pretrained(Body(rows), tmp_path / "front")


def test_a_folder_that_holds_something_else_is_left_alone(conditioned, tmp_path):
    conditioned().save_pretrained(tmp_path / "front")
    conditioned().save_pretrained(tmp_path / "front")
    with pytest.raises(FolderInUseError, match="give a new folder"):
        conditioned().save_pretrained(tmp_path)
    assert (tmp_path / "front").is_dir()


def test_mistakes_are_named(conditioned, rows, linear_policy):
    with pytest.raises(ConfigError, match="two different names"):
        WeightConditioned(Body(rows), ["left", "left"])
    with pytest.raises(ConfigError, match="rank must be"):
        conditioned(rank=0)
    with pytest.raises(ConfigError, match="no nn.Linear named like"):
        conditioned(layers=("body.*",))
    for weights, message in (
        ({"lef": 1.0}, "'lef'.*'left'"),
        ({"left": -1.0}, "negative"),
        ({"left": 0.0}, "positive"),
    ):
        with pytest.raises(ConfigError, match=message):
            conditioned().at(weights)
    for arguments, message in (
        (({"left": 0.0},), "unit of 'left' must be positive"),
        ((UNITS, "sum"), "unknown kind 'sum'"),
        ((UNITS, "tchebycheff", {"left": 1.0}), "ideals"),
        ((UNITS, "linear", {"left": 1.0}), "ideals"),
    ):
        with pytest.raises(ConfigError, match=message):
            PreferredReward(*arguments)
    with pytest.raises(ConfigError, match=r"WeightConditioned\(policy, reward_names\)"):
        DifferentiableRewardTrainer(
            linear_policy(dim=2), Distances(), ["a"], config(), reward=PreferredReward(UNITS)
        ).train()

    class Flat(Body):
        def transition(self, latents, step, num_steps, condition):
            return self.net(latents.flatten(1).repeat(2, 1))[: len(latents)].view(latents.shape), torch.tensor(0.0)

    with pytest.raises(DataError, match="layer 'net.0' has an input of shape"):
        sampled(WeightConditioned(Flat(rows), NAMES))
