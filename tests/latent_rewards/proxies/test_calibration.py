"""Intervals cover what they promise."""

import math

import pytest
import torch

from latent_rewards.proxies.calibration import Z_LEVEL, Calibration, crossfit_coverage


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_temperature_is_the_conformal_quantile():
    errors = torch.arange(1.0, 20.0)[:, None]
    calibration = Calibration(1)
    calibration.fit(errors, torch.zeros(19, 1))
    width = Z_LEVEL * float(calibration(torch.zeros(1, 1)))
    assert width == pytest.approx(18.0, rel=1e-5)


def test_coverage_on_new_data_is_ninety_percent():
    count = 4000
    variance = (0.2 + torch.rand(2 * count, 1, generator=torch.Generator().manual_seed(0))) ** 2
    errors = draw(1, 2 * count, 1) * (0.3**2 + 4 * variance).sqrt()
    calibration = Calibration(1)
    calibration.fit(errors[:count], variance[:count])
    assert float(calibration.disagreement_scale) == 4.0
    assert float(calibration.temperature) == pytest.approx(1.0, abs=0.05)
    inside = errors[count:].abs() <= Z_LEVEL * calibration(variance[count:])
    assert abs(float(inside.float().mean()) - 0.9) < 4.5 * math.sqrt(2 * 0.09 / count)


def test_disagreement_widens_and_carries_a_gradient():
    calibration = Calibration(2)
    calibration.fit(draw(0, 50, 2), torch.rand(50, 2))
    variance = torch.tensor([[0.1, 0.1], [1.0, 1.0]], requires_grad=True)
    std = calibration(variance)
    assert (std[1] > std[0]).all()
    std.sum().backward()
    assert (variance.grad > 0).all()


def test_unknown_rewards_are_left_out():
    errors = draw(0, 40, 2)
    errors[::2, 0] = math.nan
    errors[:, 1] = math.nan
    calibration, alone = Calibration(2), Calibration(1)
    calibration.fit(errors, torch.zeros(40, 2))
    alone.fit(errors[1::2, :1], torch.zeros(20, 1))
    assert calibration.residual_variance[0] == alone.residual_variance[0]
    assert calibration.temperature.tolist()[1] == 1.0
    coverage = crossfit_coverage(draw(0, 400, 1), torch.zeros(400, 1))
    assert abs(float(coverage) - 0.9) < 4.5 * math.sqrt(2 * 0.09 / 400)
    assert crossfit_coverage(errors, torch.zeros(40, 2))[1].isnan()
