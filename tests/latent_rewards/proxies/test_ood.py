"""The score is a quantile: uniform on data like the training data, one far away."""

import math

import torch

from latent_rewards.proxies.ood import DistanceQuantile


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
