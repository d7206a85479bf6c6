"""The score is a quantile: uniform on data like the training data, one far away."""

import math

import pytest
import torch

from latent_rewards.contracts import ConfigError
from latent_rewards.proxies.ood import DistanceQuantile, OodScore


def draw(seed, count):
    mixing = torch.tensor([[1.0, 0.9], [0.0, 0.2]])
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed)) @ mixing + 5


def test_distance_is_mahalanobis():
    score = DistanceQuantile(2)
    data = draw(0, 500)
    score.fit(data, draw(1, 200))
    covariance = torch.cov(data.T, correction=0).double()
    shrunk = 0.9 * covariance + 0.1 * torch.diag(covariance.diagonal())
    offset = (draw(2, 3) - data.mean(dim=0)).double()
    expected = torch.einsum("bi,ij,bj->b", offset, shrunk.inverse(), offset).sqrt()
    torch.testing.assert_close(score.distance(draw(2, 3)).double(), expected, atol=1e-4, rtol=1e-4)


def test_score_is_uniform_on_the_same_data_and_one_far_away():
    score = DistanceQuantile(2)
    score.fit(draw(0, 2000), draw(1, 2000))
    same = score(draw(2, 2000))
    assert abs(float(same.mean()) - 0.5) < 4.5 * math.sqrt(2 / 12 / 2000)
    assert abs(float((same > 0.9).float().mean()) - 0.1) < 4.5 * math.sqrt(2 * 0.09 / 2000)
    assert score(torch.tensor([[5.0, 5.0]])).item() < 0.05
    assert score(torch.tensor([[5.0, 12.0]])).item() == 1.0


def test_constant_and_repeated_features_do_not_break_it():
    data = torch.cat([draw(0, 20), draw(0, 20), torch.ones(20, 1)], dim=1)
    score = DistanceQuantile(5)
    score.fit(data, data)
    assert torch.isfinite(score.distance(data)).all()


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alarms(held, fresh, false_alarm, repeats):
    """Shares of fresh samples above the threshold, over many draws of ``held`` samples."""
    shares = []
    for repeat in range(repeats):
        values = normal(repeat, held + fresh, 2).abs()
        for parts, disagreement in ((1, None), (2, values[:held, 1])):
            score = OodScore().double()
            score.fit(values[:held, 0], disagreement)
            above = score(values[held:, 0], values[held:, 1]) > score.threshold(false_alarm)
            shares.append((parts, float(above.double().mean())))
    return [sum(share for parts, share in shares if parts == kind) / repeats for kind in (1, 2)]


def test_false_alarms_are_as_rare_as_the_threshold_says():
    one, two = alarms(99, 100, 0.1, 300)
    error = 4.5 * math.sqrt(0.09 * (1 / (300 * 100) + 1 / (300 * 99)))
    assert abs(one - 0.1) < error  # rank 90 of 100 is exact
    assert 0.1 - 3 / 99 - error < two < 0.1 + error


def test_detection_of_a_shifted_gaussian_is_that_of_the_exact_quantile():
    score = OodScore().double()
    score.fit(normal(0, 50_000).abs(), None)
    # |x + 2| > 1.95996 for x ~ N(0, 1) has probability 1 - Phi(-0.04004) + Phi(-3.95996) = 0.51601.
    shifted = (normal(1, 50_000) + 2).abs()
    found = float((score(shifted, shifted) > score.threshold(0.05)).double().mean())
    assert abs(found - 0.51601) < 4.5 * math.sqrt(0.25 / 50_000) + 0.4 * 4.5 * math.sqrt(0.0475 / 50_000) / 0.1169


def test_either_part_alone_raises_the_score_and_it_stays_between_0_and_1():
    score = OodScore()
    score.fit(normal(0, 500).abs().float(), normal(1, 500).abs().float())
    usual, far = torch.tensor([0.6, 0.6, 0.0]), torch.tensor([99.0, 0.6, 0.0])
    assert score(far[:1], usual[:1]).item() == 1.0 == score(usual[:1], far[:1]).item()
    assert score(torch.zeros(1), torch.zeros(1)).item() == 0.0
    scores = score(normal(2, 2000).abs().float(), normal(3, 2000).abs().float())
    assert (scores >= 0).all() and (scores <= 1).all() and abs(float(scores.mean()) - 0.5) < 0.05


def test_a_threshold_that_cannot_be_told_is_refused():
    score = OodScore()
    with pytest.raises(ConfigError, match="no held-out samples"):
        score.threshold(0.05)
    score.fit(
        torch.rand(20, generator=torch.Generator().manual_seed(0)),
        torch.rand(20, generator=torch.Generator().manual_seed(1)),
    )
    with pytest.raises(ConfigError, match=r"20 held-out samples cannot tell a false alarm of 0.05, but 0.095 or more"):
        score.threshold(0.05)
    assert 0.89 < score.threshold(0.1) < 0.91
    for wrong in (0.0, 1.0, -1.0):
        with pytest.raises(ConfigError, match="1 - false_alarm must lie in"):
            score.threshold(wrong)


def test_the_threshold_splits_999_samples_at_the_rank_it_says():
    values = torch.arange(999.0)
    score = OodScore()
    score.fit(values, None)
    assert int((score(values, values) > score.threshold(0.05)).sum()) == 49
    assert int((score(values, values) > score.threshold(0.2)).sum()) == 199


def test_a_sample_is_as_strange_as_the_stranger_of_its_parts():
    score = OodScore()
    score.fit(torch.arange(500.0), torch.arange(500.0).roll(250))
    strange, usual = torch.tensor([495.0]), torch.tensor([3.0])
    assert score(strange, usual).item() > 0.9 and score(usual, strange).item() > 0.9
