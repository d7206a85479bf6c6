from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.rewards import Constraint, Tchebycheff, WeightedSum

NAN = math.nan


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_gradient_of_the_sum_is_the_sum_of_gradients():  # row 16
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    rewards = {"a": x.sin().sum(1), "b": x.square().sum(1)}
    total = WeightedSum({"a": 1.5, "b": -0.3})(rewards)
    (gradient,) = torch.autograd.grad(total.sum(), x, retain_graph=True)
    parts = [torch.autograd.grad(rewards[n].sum(), x, retain_graph=True)[0] for n in "ab"]
    torch.testing.assert_close(gradient, 1.5 * parts[0] - 0.3 * parts[1], rtol=0, atol=1e-10)


def test_zscore_has_exact_values_and_ignores_affine_changes():
    rewards = {"a": tensor(1, 2, 3), "b": tensor(0, 0, 3)}
    combined = WeightedSum({"a": 1.0, "b": 2.0}, normalize="zscore")
    b = (rewards["b"] - 1) / math.sqrt(3)
    torch.testing.assert_close(combined(rewards), tensor(-1, 0, 1) + 2 * b, rtol=1e-12, atol=1e-12)
    moved = {"a": 10 * rewards["a"] - 7, "b": 0.1 * rewards["b"] + 1}
    torch.testing.assert_close(combined(moved), combined(rewards), rtol=1e-12, atol=1e-12)


def test_zscore_statistics_are_constants_to_the_gradient():
    x = tensor(1, 2, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(WeightedSum({"a": 1.0}, normalize="zscore")({"a": x}).sum(), x)
    torch.testing.assert_close(gradient, tensor(1, 1, 1), rtol=1e-12, atol=1e-12)


def test_a_constant_reward_contributes_nothing():
    total = WeightedSum({"a": 1.0, "b": 1.0}, normalize="zscore")({"a": tensor(5, 5), "b": tensor(0, 2)})
    torch.testing.assert_close(total, tensor(-1, 1) / math.sqrt(2), rtol=1e-12, atol=1e-12)


def test_ranks_are_centred_and_ties_averaged():
    row = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(3).round()
    total = WeightedSum({"a": 2.0}, normalize="rank")({"a": row})
    expected = 2 * (torch.from_numpy(scipy.stats.rankdata(row.numpy())) - 10.5) / 19
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)
    lowest_to_highest = WeightedSum({"a": 1.0}, normalize="rank")({"a": tensor(3, -1e9, 7)})
    torch.testing.assert_close(lowest_to_highest, tensor(0, -0.5, 0.5), rtol=0, atol=0)
    for constant in (tensor(4, 4, 4), tensor(4)):
        assert WeightedSum({"a": 1.0}, normalize="rank")({"a": constant}).abs().max() == 0


def test_ranks_have_one_constant_slope_which_scales_with_the_reward():
    def slope(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(WeightedSum({"a": 1.0}, normalize="rank")({"a": x}).sum(), x)[0]

    torch.testing.assert_close(slope(tensor(5, 1, 3)), tensor(1, 1, 1) / 4, rtol=1e-12, atol=0)  # equal steps: 1/range
    x = tensor(0.3, -2, 7, 0.1)
    torch.testing.assert_close(slope(10 * x + 3), slope(x) / 10, rtol=1e-12, atol=0)
    assert slope(x).unique().numel() == 1 and slope(tensor(2, 2)).abs().max() == 0
    # Values fitted on ranks: an outlier enters the spread once, not squared.
    ranks = tensor(1, -3, 3, -1) / 6
    torch.testing.assert_close(slope(x)[0], ranks.square().sum() / (ranks * x).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalize", [None, "zscore", "rank"])
def test_nan_never_enters_an_average(normalize):
    rewards = {"a": tensor(1, NAN, 3, NAN), "b": tensor(1, 1, 1, NAN)}
    combined = WeightedSum({"a": 1.0, "b": 0.5}, normalize=normalize)
    total = combined(rewards)
    assert total.isnan().tolist() == [False, False, False, True]
    without = combined({"a": tensor(1, 3), "b": tensor(1, 1)})
    torch.testing.assert_close(total[[0, 2]], without, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total[1], without.mean())  # takes no side on the reward that does not apply to it


def test_tchebycheff_is_the_worst_weighted_shortfall():
    reward = Tchebycheff({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 1.0})
    total = reward({"a": tensor(0.5, 0.9), "b": tensor(0.9, 0.5)})
    torch.testing.assert_close(total, tensor(-0.5, -1.0), rtol=1e-12, atol=1e-12)


def test_constraint_charges_what_lies_below_the_floor():
    reward = Constraint(WeightedSum({"a": 1.0}), {"motion": 0.5}, penalty=10.0)
    total = reward({"a": tensor(1, 1, 1), "motion": tensor(0.6, 0.4, NAN)})
    torch.testing.assert_close(total, tensor(1, 0, 1), rtol=1e-12, atol=1e-12)
    assert reward.weights == {"motion": 0.0, "a": 1.0}


def test_mistakes_are_named():
    with pytest.raises(DataError, match="legibilty.*legibility"):
        WeightedSum({"legibilty": 1.0})({"legibility": tensor(1)})
    with pytest.raises(ConfigError, match="normalize"):
        WeightedSum({"a": 1.0}, normalize="median")
    with pytest.raises(ConfigError, match="'a' must be finite"):
        WeightedSum({"a": NAN})
    with pytest.raises(ConfigError, match="empty"):
        WeightedSum({})
    with pytest.raises(ConfigError, match="positive"):
        Tchebycheff({"a": -1.0}, {"a": 1.0})
    with pytest.raises(ConfigError, match="targets"):
        Tchebycheff({"a": 1.0}, {"b": 1.0})
    with pytest.raises(ConfigError, match="penalty"):
        Constraint(WeightedSum({"a": 1.0}), {"b": 1.0}, penalty=0)
