"""Pairs, calibration error and the bootstrap by hand and by exact values."""

import math

import pytest
import torch

from latent_rewards.proxies.heldout import HeldOut
from latent_rewards.proxies.honesty import (
    CALIBRATION_LEVELS,
    _count_by_tau,
    calibration_error,
    clustered_interval,
    count_pairs,
    honesty,
    interval_coverage,
    pairwise_accuracy,
    reliability,
)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_pairs_by_hand():
    target = torch.tensor([1.0, 2.0, 3.0, 3.0, math.nan])
    predicted = torch.tensor([1.0, 3.0, 2.0, 3.0, 9.0])
    # Of (1,2) (1,3) (1,4) (2,3) (2,4): right, right, right, wrong, tied in the prediction.
    assert pairwise_accuracy(predicted, target) == pytest.approx(3.5 / 5)
    assert pairwise_accuracy(torch.zeros(5), target) == 0.5
    prompts = torch.tensor([0, 7, 7, 0, 7])
    assert pairwise_accuracy(predicted, target, prompts) == pytest.approx(1 / 2)
    assert math.isnan(pairwise_accuracy(predicted, target, torch.arange(5)))


def test_the_fast_count_is_the_plain_one():
    predicted, target = draw(0, 200).round(decimals=1), draw(1, 200).round(decimals=1)
    right, pairs = _count_by_tau(predicted, target)
    assert (right, pairs) == pytest.approx(count_pairs(predicted, target))
    assert _count_by_tau(torch.zeros(4).double(), torch.arange(4.0).double()) == (3.0, 6.0)
    large = pairwise_accuracy(draw(2, 3000), draw(3, 3000))
    assert large != 0.5 and abs(large - 0.5) < 4.5 * math.sqrt(1 / (9 * 3000))


def test_two_gaussians_of_correlation_rho_order_pairs_as_the_arcsine_says():
    x, noise = draw(4, 20_000), draw(5, 20_000)
    y = 0.8 * x + 0.6 * noise
    expected = 0.5 + math.asin(0.8) / math.pi
    assert pairwise_accuracy(y, x) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("factor", [1.0, 0.5, 2.0])
def test_calibration_error_is_the_exact_one_of_a_wrong_scale(factor):
    errors = draw(6, 40_000)
    normal = torch.distributions.Normal(0.0, 1.0)
    gaps = []
    for level in CALIBRATION_LEVELS:
        half = normal.icdf(torch.tensor((1 + level) / 2)) * factor
        gaps.append(abs(float(2 * normal.cdf(half) - 1) - level))
    assert CALIBRATION_LEVELS == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    found = calibration_error(errors, torch.full((40_000,), factor, dtype=torch.float64))
    assert found == pytest.approx(sum(gaps) / 9, abs=4.5 * math.sqrt(0.25 / 40_000))
    assert interval_coverage(torch.tensor([0.5, -3.0]), torch.ones(2), 0.9) == 0.5


def test_the_bootstrap_is_the_binomial_one_and_copies_of_a_prompt_add_nothing():
    inside = torch.arange(400) % 10 != 0
    low, high = clustered_interval(inside, torch.arange(400), 0)
    spread = 1.96 * math.sqrt(0.09 / 400)
    assert low == pytest.approx(0.9 - spread, abs=0.006) and high == pytest.approx(0.9 + spread, abs=0.006)
    copied = clustered_interval(inside.repeat_interleave(5), torch.arange(400).repeat_interleave(5), 0)
    assert copied == pytest.approx((low, high), abs=1e-12)
    assert clustered_interval(inside, torch.arange(400), 0) == (low, high)
    uneven = (torch.arange(400) ** 0.5).long()
    assert clustered_interval(inside, uneven, 1) != clustered_interval(inside, uneven, 0)
    naive = clustered_interval(inside.repeat_interleave(5), torch.arange(2000), 0)
    assert naive[1] - naive[0] < 0.6 * (high - low)


def test_an_entry_by_hand_and_one_of_nothing():
    truth = torch.tensor([[0.0, math.nan], [1.0, math.nan], [2.0, math.nan]]).double()
    heldout = HeldOut(
        truth.nan_to_num(0.0) + 0.5, torch.full((3, 2), 0.25).double(), truth, torch.zeros(3), torch.arange(3)
    )
    entry = honesty(heldout, 0, seed=0)
    assert entry["pairwise_accuracy"] == 1.0 and entry["pairwise_accuracy_within_prompt"] is None
    assert (entry["coverage"], entry["coverage_interval"]) == (0.0, [0.0, 0.0])
    assert entry["interval_width"] == pytest.approx(2 * 1.6448536 * 0.25)
    assert entry["calibration_error"] == pytest.approx(0.5)
    assert set(honesty(heldout, 1, seed=0)) == set(entry) and not any(honesty(heldout, 1, seed=0).values())
    assert reliability(heldout, 0) == (list(CALIBRATION_LEVELS), [0.0] * 9)
