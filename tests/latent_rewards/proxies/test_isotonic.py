"""The map is isotonic regression's where that rises, and never flat."""

import math

import pytest
import torch
from sklearn.isotonic import IsotonicRegression

from latent_rewards.proxies.isotonic import SLOPE_FLOOR, MonotoneMap


def draw(count, seed):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).double()


def fitted(x, y):
    monotone = MonotoneMap(1).double()
    monotone.fit(x[:, None], y[:, None])
    return lambda values: monotone(values[:, None])[:, 0]


def test_it_is_the_identity_until_it_is_fitted():
    x = torch.linspace(-9, 9, 50).double()[:, None].repeat(1, 2)
    torch.testing.assert_close(MonotoneMap(2).double()(x), x, atol=1e-6, rtol=0)


def test_a_linear_truth_is_recovered_exactly():
    x = draw(400, 0)
    apply = fitted(x, 2.5 * x - 1)
    torch.testing.assert_close(apply(x), 2.5 * x - 1, atol=1e-9, rtol=0)


def test_it_is_scikit_learns_regression_at_its_knots_and_keeps_the_mean():
    x = draw(500, 1)
    y = x.exp() + 0.05 * draw(500, 2)
    monotone = MonotoneMap(1).double()
    monotone.fit(x[:, None], y[:, None])
    reference = IsotonicRegression(out_of_bounds="clip").fit(x.numpy(), y.numpy())
    expected = torch.from_numpy(reference.predict(monotone.positions[0].numpy()))
    rising = expected.diff() > SLOPE_FLOOR * monotone.positions[0].diff()
    torch.testing.assert_close(monotone.values[0].diff()[rising], expected.diff()[rising], atol=1e-9, rtol=0)
    assert float(monotone(x[:, None]).mean() - y.mean()) == pytest.approx(0, abs=1e-9)
    assert float((monotone(x[:, None])[:, 0] - y).square().mean()) < 0.1 * float((x - y).square().mean())


def test_a_flat_truth_has_the_floor_s_slope_everywhere():
    x = draw(300, 3)
    apply = fitted(x, torch.full_like(x, 4.0))
    points = torch.tensor([-30.0, -0.3, 0.0, 0.7, 30.0], dtype=torch.float64, requires_grad=True)
    apply(points).sum().backward()
    torch.testing.assert_close(points.grad, torch.full_like(points, SLOPE_FLOOR), atol=1e-9, rtol=0)
    assert float(apply(x).mean()) == pytest.approx(4.0, abs=1e-9)


def test_it_rises_strictly_and_its_gradient_is_that_of_finite_differences():
    x = draw(200, 4)
    apply = fitted(x, (x > 0).double() + 0.3 * draw(200, 5))
    grid = torch.linspace(-4, 4, 1001).double()
    assert (apply(grid).diff() >= SLOPE_FLOOR * grid.diff() - 1e-12).all()
    points = torch.tensor([-5.0, -0.111, 0.2345, 6.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(apply, (points,))


def test_ties_and_unknown_rewards():
    x = torch.tensor([0.0, 1.0]).repeat(20).double()
    apply = fitted(x, 3 * x)
    torch.testing.assert_close(
        apply(torch.tensor([0.0, 1.0]).double()), torch.tensor([0.0, 3.0]).double(), atol=0.01, rtol=0
    )
    monotone = MonotoneMap(2)
    monotone.fit(torch.randn(30, 2, generator=torch.Generator().manual_seed(0)), torch.full((30, 2), math.nan))
    assert monotone(torch.tensor([[1.5, -2.0]])).tolist() == [[1.5, -2.0]]
