"""Intervals cover what they promise."""

import math

import pytest
import torch

from latent_rewards.proxies.calibration import Z_LEVEL, Calibration, calibrate, crossfit, crossfit_coverage
from latent_rewards.proxies.isotonic import MonotoneMap


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


def heavy(seed, *shape):
    """Laplace errors: no Gaussian interval holds at every level."""
    uniform = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return -uniform.sign() * (1 - 2 * uniform.abs()).log()


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
def test_conformal_intervals_cover_at_every_level_where_the_gaussian_does_not(level):
    count, repeats, inside, gaussian = 99, 300, 0.0, 0.0
    for repeat in range(repeats):
        variance = torch.rand(count + 100, 1, generator=torch.Generator().manual_seed(repeat)).double()
        errors = heavy(repeat + 1000, count + 100, 1) * (0.5 + variance).sqrt()
        calibration = Calibration(1).double()
        calibration.fit(errors[:count], variance[:count])
        std = calibration(variance[count:])
        inside += float((errors[count:].abs() <= calibration.ratios[0, round(1000 * level) - 1] * std).double().mean())
        z = math.sqrt(2) * float(torch.erfinv(torch.tensor(level)))
        gaussian += float((errors[count:].abs() <= z * std).double().mean())
    error = math.sqrt(level * (1 - level) * (1 / (100 * repeats) + 1 / (count * repeats)))
    assert abs(inside / repeats - level) < 4.5 * error
    if level < 0.9:
        assert gaussian / repeats - level > 9 * error


def test_ratios_start_as_a_gaussians_and_agree_with_the_temperature():
    calibration = Calibration(2)
    assert calibration.ratios[:, 899].tolist() == pytest.approx([Z_LEVEL, Z_LEVEL])
    calibration.fit(draw(0, 60, 2), torch.rand(60, 2, generator=torch.Generator().manual_seed(1)))
    assert calibration.ratios[:, 899].tolist() == pytest.approx([Z_LEVEL, Z_LEVEL])
    assert calibration.ratios[:, 998].isinf().all() and (calibration.ratios.diff(dim=1).nan_to_num(0) >= 0).all()


def test_each_half_is_judged_by_the_other():
    errors = torch.cat([torch.full((50, 1), 1.0), torch.full((50, 1), 3.0)]).double()
    errors *= 1 - 2 * (torch.arange(100)[:, None] % 2)
    halves = torch.arange(100) < 50
    means, std = crossfit(errors, torch.zeros(100, 1).double(), torch.zeros(100, 1).double(), halves)
    assert torch.equal(means, errors)
    torch.testing.assert_close(std[:50, 0] * Z_LEVEL, torch.full((50,), 3.0).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(std[50:, 0] * Z_LEVEL, torch.full((50,), 1.0).double(), atol=1e-6, rtol=0)


def test_a_calibrated_mean_is_judged_by_maps_of_the_other_half():
    mean = draw(2, 400, 1).double()
    noise = draw(3, 400, 1).double()
    halves = torch.arange(400) % 2 == 0
    means, std = crossfit(mean, torch.zeros(400, 1).double(), noise, halves, isotonic=True)
    # There is nothing to know: a map judged on its own samples would seem to explain some of the noise.
    assert float((means - noise).square().mean()) > float((noise - noise.mean()).square().mean())
    calibration, monotone = Calibration(1).double(), MonotoneMap(1).double()
    calibrate(calibration, monotone, mean, torch.zeros(400, 1).double(), 0.5 * mean + 2 + 0.1 * noise, halves)
    fresh, more = draw(4, 4000, 1).double(), draw(5, 4000, 1).double()
    error = monotone(fresh) - (0.5 * fresh + 2 + 0.1 * more)
    inside = error.abs() <= Z_LEVEL * calibration(torch.zeros(4000, 1).double())
    assert abs(float(inside.double().mean()) - 0.9) < 4.5 * math.sqrt(0.09 * (1 / 4000 + 1 / 400))
    assert float(error.square().mean().sqrt()) < 0.13


def test_errors_of_a_calibrated_mean_are_those_of_the_other_halfs_map():
    mean = torch.linspace(-1, 1, 80).double()[:, None]
    halves = torch.arange(80) % 2 == 0
    target = torch.where(halves[:, None], mean, mean + 5)
    calibration = Calibration(1).double()
    calibrate(calibration, MonotoneMap(1).double(), mean, torch.zeros(80, 1).double(), target, halves)
    assert float(Z_LEVEL * calibration(torch.zeros(1, 1).double())) == pytest.approx(5.0, abs=0.1)
