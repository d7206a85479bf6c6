import numpy as np
import pytest
import scipy.linalg
import torch

from latent_rewards.contracts import DataError
from recipes.moving_digits import scores


def test_closeness_is_100_on_itself_0_on_noise_and_linear_between() -> None:
    real, noise = [0.0, 1.0], [4.0, 5.0]
    assert scores.closeness(real, real, noise) == 100
    assert scores.closeness(noise, real, noise) == 0
    assert scores.closeness([1.0, 2.0], real, noise) == pytest.approx(75)
    assert scores.closeness([-1.0, 0.0], real, noise) == pytest.approx(75)
    assert scores.closeness([50.0], real, noise) == 0


def test_closeness_compares_distributions_not_means() -> None:
    # W1([0.5, 0.5], [0, 1]) = 0.5 and W1(noise, real) = 4, though the means agree.
    assert scores.closeness([0.5, 0.5], [0.0, 1.0], [4.0, 5.0]) == pytest.approx(87.5)


def test_closeness_leaves_nan_out_and_weights_count() -> None:
    real, noise = [0.0, 1.0, 7.0], [10.0, 11.0]
    assert scores.closeness([0.0, float("nan"), 3.0], real, noise) == scores.closeness([0.0, 3.0], real, noise)
    weighted = scores.closeness([0.0, 3.0, 5.0], real, noise, weights=[2, 1, 0], real_weights=[1, 0, 3])
    assert weighted == pytest.approx(scores.closeness([0.0, 0.0, 3.0], [0.0, 7.0, 7.0, 7.0], noise))
    with pytest.raises(scores.UndefinedError, match="all NaN; none of 1"):
        scores.closeness([float("nan")], real, noise)
    with pytest.raises(scores.UndefinedError, match="same distribution"):
        scores.closeness(real, real, real)
    with pytest.raises(DataError, match="1 of 2 are infinite") as raised:
        scores.closeness([0.0, float("inf")], real, noise)
    assert not isinstance(raised.value, scores.UndefinedError)


def covered(real: torch.Tensor, samples: torch.Tensor, *, neighbours: int) -> float:
    return scores.within_neighbourhood(real, samples, neighbours=neighbours).any(dim=1).double().mean().item()


def test_coverage_of_hand_computed_points() -> None:
    # Nearest-neighbour radii with k = 1: 1, 1, 1 and 8.
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    assert covered(real, torch.tensor([[0.5]]), neighbours=1) == 0.5
    assert covered(real, torch.tensor([[2.5]]), neighbours=1) == 0.5
    assert covered(real, torch.tensor([[0.5], [2.5]]), neighbours=1) == 1
    assert covered(real, torch.tensor([[0.0]]), neighbours=1) == 0.25
    assert covered(real, torch.tensor([[100.0]]), neighbours=1) == 0
    assert covered(real, torch.tensor([[0.5]] * 50), neighbours=1) == 0.5
    # k = 2: radii 2, 1, 2 and 9; the point 8.5 is within 9 of 10 only.
    assert covered(real, torch.tensor([[8.5]]), neighbours=2) == 0.25


def test_a_sample_covers_its_own_group_only() -> None:
    real = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    samples, groups = torch.tensor([[0.5]]), torch.tensor([0, 0, 1, 1])
    inside = scores.within_neighbourhood(real, samples, groups, torch.tensor([1]), neighbours=1)
    assert inside[:, 0].tolist() == [False, False, True, True]
    with pytest.raises(DataError, match="group 0 has 2 real points"):
        scores.within_neighbourhood(real, samples, groups, torch.tensor([1]), neighbours=2)


def test_coverage_of_one_distribution_by_itself_is_as_expected() -> None:
    # Naeem et al. 2020, eq. 9: 1 - prod_i (N - i) / (M + N - i), i = 1..k, whatever the distribution.
    n, m, k = 40, 30, 5
    expected = 1 - np.prod([(n - i) / (m + n - i) for i in range(1, k + 1)])
    source = torch.Generator().manual_seed(0)
    drawn = [
        covered(torch.randn(n, 3, generator=source), torch.randn(m, 3, generator=source), neighbours=k)
        for _ in range(200)
    ]
    assert abs(np.mean(drawn) - expected) < 4.5 * np.std(drawn) / np.sqrt(len(drawn))


def test_frechet_of_one_dimensional_gaussians() -> None:
    # Means 1 and 12, variances 2 and 8: 121 + 2 + 8 - 2 sqrt(16).
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [14.0]])
    assert scores.frechet_distance(a, b) == pytest.approx(123, abs=1e-10)
    assert scores.frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_frechet_agrees_with_the_matrix_root_and_survives_singular_covariances() -> None:
    source = torch.Generator().manual_seed(1)
    a = torch.randn(50, 6, generator=source, dtype=torch.float64) @ torch.randn(6, 6, generator=source).double()
    b = 1 + torch.randn(70, 6, generator=source, dtype=torch.float64)
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(sum(covariances) - 2 * root)
    assert scores.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    flat = torch.zeros(5, 6)
    assert scores.frechet_distance(flat, flat + 2) == pytest.approx(24, abs=1e-9)


def test_frechet_weights_are_repetitions() -> None:
    a, b = torch.tensor([[0.0], [2.0], [7.0]]), torch.tensor([[10.0], [14.0]])
    repeated = scores.frechet_distance(torch.tensor([[0.0], [0.0], [2.0]]), b)
    assert scores.frechet_distance(a, b, weights=np.array([2.0, 1.0, 0.0])) == pytest.approx(repeated, abs=1e-10)


def test_resample_weights_draw_with_replacement() -> None:
    weights = scores.resample_weights(7, resamples=300, seed=3)
    assert weights.shape == (300, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert (weights == 0).any() and (weights > 1).any()
    assert (weights == scores.resample_weights(7, resamples=300, seed=3)).all()
    assert (weights != scores.resample_weights(7, resamples=300, seed=4)).any()


def test_an_interval_is_of_the_resamples_that_have_a_value() -> None:
    values = np.arange(41.0)
    found = scores.interval(20.0, values)
    assert (found.low, found.high) == pytest.approx((1.0, 39.0))
    assert scores.interval(20.0, [float("nan"), *values, float("nan")]) == found
    none = scores.interval(20.0, [float("nan")] * 3)
    assert none.difference == 20.0 and np.isnan(none.low) and np.isnan(none.high)


def test_weighted_mean() -> None:
    assert scores.weighted_mean([1.0, 5.0, float("nan")], [3, 1, 1]) == 2
    assert np.isnan(scores.weighted_mean([float("nan"), 1.0], [1, 0]))
