"""Exact power laws are continued exactly, and parts are nested."""

import math

import pytest
import torch

from latent_rewards.contracts import DataError
from latent_rewards.proxies.learning_curve import expect_twice, learning_curves, nested_parts, power_law_exponent


def test_a_power_law_is_continued_exactly():
    sizes = [100, 200, 400]
    errors = [3 * n**-0.7 for n in (*sizes, 800)]
    assert power_law_exponent(sizes, errors[:3]) == pytest.approx(-0.7, abs=1e-12)
    curve = {"num_train": sizes, "spearman": [1 - e for e in errors[:3]], "r2": [1 - 2 * e for e in errors[:3]]}
    expected = expect_twice({**curve, "mae": errors[:3]})
    assert expected["num_train"] == 800
    assert expected["spearman"] == pytest.approx(1 - errors[3], abs=1e-12)
    assert expected["r2"] == pytest.approx(1 - 2 * errors[3], abs=1e-12)
    assert expected["mae"] == pytest.approx(errors[3], abs=1e-12)


def test_noise_promises_nothing_and_the_unknown_stays_unknown():
    curve = {"num_train": [1, 2, 4], "spearman": [0.9, 0.8, 0.7], "r2": [None, 0.1, 0.2], "mae": [0.0, 0.0, 0.0]}
    expected = expect_twice(curve)
    assert expected["spearman"] == pytest.approx(0.7) and expected["r2"] is None and expected["mae"] == 0.0


def test_parts_are_nested_sorted_and_follow_the_seed():
    training = torch.arange(100) * 2
    rewards = torch.rand(200, 1, generator=torch.Generator().manual_seed(0)).double()
    quarter, half = nested_parts(rewards, ["r"], training, 0)
    assert (len(quarter), len(half)) == (25, 50) and set(quarter.tolist()) < set(half.tolist()) < set(training.tolist())
    assert torch.equal(quarter, quarter.sort().values)
    assert torch.equal(quarter, nested_parts(rewards, ["r"], training, 0)[0])
    assert not torch.equal(quarter, nested_parts(rewards, ["r"], training, 1)[0])
    with pytest.raises(DataError, match="a quarter of 60 training samples is 15"):
        nested_parts(rewards, ["r"], training[:60], 0)
    rewards[quarter] = math.nan
    with pytest.raises(DataError, match="reward 'r' has 0 values, 0 of them distinct, in a part of 25"):
        nested_parts(rewards, ["r"], training, 0)


def test_curves_by_hand():
    truth = torch.tensor([[1.0], [2.0], [3.0]]).double()
    parts = [torch.arange(4), torch.arange(8), torch.arange(16)]
    known = torch.ones(16, 1, dtype=torch.bool)
    known[0] = False
    asked = []

    def refit(rows):
        asked.append(len(rows))
        return truth + 8 / len(rows)

    (curve,) = learning_curves(refit, parts, truth + 0.5, truth, known)
    assert asked == [4, 8] and curve["num_train"] == [3, 7, 15] and curve["mae"] == [2.0, 1.0, 0.5]
    assert curve["spearman"] == pytest.approx([1.0, 1.0, 1.0]) and curve["twice"]["spearman"] == pytest.approx(1.0)
    assert curve["r2"] == pytest.approx([1 - 6.0, 1 - 1.5, 1 - 0.375]) and 0.2 < curve["twice"]["mae"] < 0.3
