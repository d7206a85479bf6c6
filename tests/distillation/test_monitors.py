import pytest
import torch

from distillation.denoiser import Denoiser, EmpiricalDenoiser, GaussianDenoiser, Prediction
from distillation.errors import DistillationConfigError, NoiseError
from distillation.monitors import channel_std, fake_score_lag, saturation
from distillation.schedule import RectifiedFlow, VariancePreserving, add_noise
from distillation.vsd import fake_score_loss

SCHEDULES = [RectifiedFlow(), RectifiedFlow(shift=3.0), VariancePreserving()]


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def test_saturation_is_the_ratio_of_the_channels_spreads():
    z = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(1, 1, 2, 1, 1)
    samples = torch.cat([2 * z + 5, 0.5 * z], dim=1)
    assert channel_std(samples).tolist() == [2, 0.5]
    assert saturation(samples, 0.5).tolist() == [4, 1]
    assert saturation(samples, torch.tensor([2.0, 1.0])).tolist() == [1, 0.5]
    assert not saturation(samples.requires_grad_(), 1.0).requires_grad


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_saturation_against_the_teachers_estimate_has_its_closed_form(schedule, signs):
    # Samples a z, noised, denoised for N(0, s^2): the estimates spread by alpha s^2 / v sqrt(u).
    (z, eps), a, s, t = signs, 0.9, 0.7, scalar(0.4)
    alpha, sigma = (float(c) for c in schedule(t))
    u, v = alpha**2 * a**2 + sigma**2, alpha**2 * s**2 + sigma**2
    estimate = GaussianDenoiser(0.0, s, schedule)(add_noise(schedule, a * z, eps, t), t).x0
    expected = a * v / (alpha * s**2 * u**0.5)
    assert float(saturation(a * z, channel_std(estimate))) == pytest.approx(expected, rel=1e-12)


def test_saturation_refuses_what_it_cannot_divide_by(randn):
    with pytest.raises(NoiseError, match="the samples have 2 channels"):
        saturation(randn(2, 2, 1, 1, 1), torch.ones(3))
    with pytest.raises(DistillationConfigError, match="reference_std must be positive"):
        saturation(randn(2, 2, 1, 1, 1), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("time", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.7), (0.3, 0.77), (-0.2, 0.7), (0.5, 0.4)])
def test_lag_of_a_gaussian_student_has_its_closed_form(schedule, time, mean, std, signs):
    (z, eps), a, b, t = signs, 0.7, 0.3, scalar(time)
    alpha, sigma = (float(c) for c in schedule(t))
    u = alpha**2 * a**2 + sigma**2
    k, stale = alpha * a**2 / u, alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    expected = ((stale - k) ** 2 * u + (1 - alpha * stale) ** 2 * (mean - b) ** 2) * u / (a**2 * sigma**2)
    fake = GaussianDenoiser(mean, std, schedule)
    lag = float(fake_score_lag(a * z + b, fake, None, t, eps))
    assert lag == pytest.approx(expected, rel=1e-9, abs=1e-24)
    # The same by its meaning: what the loss is above that of an up-to-date fake score.
    losses = []
    for denoiser in (fake, GaussianDenoiser(b, a, schedule)):
        x0 = denoiser(add_noise(schedule, a * z + b, eps, t), t).x0
        losses.append(float(((x0 - a * z - b) ** 2).mean()))
    assert lag == pytest.approx(losses[0] / losses[1] - 1, rel=1e-6, abs=1e-12)


def test_lag_says_when_it_means_trouble(signs):
    z, eps = signs
    lags = [
        float(fake_score_lag(0.7 * z, GaussianDenoiser(0.0, 0.7 * factor, RectifiedFlow()), None, scalar(0.5), eps))
        for factor in (1.0, 1.1, 1.2)
    ]
    assert lags == pytest.approx([0, 0.01, 0.03], abs=0.003)


def test_lag_falls_as_the_fake_score_catches_up_and_needs_no_one_level(learnable_gaussian, randn):
    schedule, fake = RectifiedFlow(), learnable_gaussian(RectifiedFlow(), 0.0, 1.5)
    x, noise = 0.5 * randn(8, 1, 4, 8, 8), randn(8, 1, 4, 8, 8, seed=1)
    t = torch.linspace(0.2, 0.8, 8, dtype=torch.float64)
    optimizer, lags = torch.optim.Adam(fake.parameters(), lr=0.02), []
    for _ in range(120):
        lags.append(float(fake_score_lag(x, fake, None, t, noise)))
        fake_score_loss(x, fake, None, t, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert lags[0] > 0.3
    assert lags[-1] < 2e-3
    assert schedule == fake.schedule


def test_lag_is_a_lower_bound_where_the_samples_are_no_gaussian(signs, randn):
    # Two points: the best denoiser is a tanh; a Gaussian one of the right moments cannot be mended by rescaling.
    schedule, t = RectifiedFlow(), scalar(0.4)
    points = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1, 1)
    x, noise = points.repeat(2000, 1, 1, 1, 1), randn(4000, 1, 1, 1, 1)
    fake, best = GaussianDenoiser(0.0, 1.0, schedule), EmpiricalDenoiser(points, schedule)
    errors = [float(((d(add_noise(schedule, x, noise, t), t).x0 - x) ** 2).mean()) for d in (fake, best)]
    assert float(fake_score_lag(x, best, None, t, noise)) < 2e-3
    assert float(fake_score_lag(x, fake, None, t, noise)) < errors[0] / errors[1] - 1


def test_lag_of_a_constant_fake_score_is_finite(randn):
    class Constant(Denoiser):
        schedule = RectifiedFlow()

        def forward(self, x_t, t, condition=None):
            return Prediction(x_t, t, self.schedule, x0=torch.full_like(x_t, 2.0))

    x = randn(4, 1, 2, 2, 2)
    lag = fake_score_lag(x, Constant(), None, scalar(0.5), torch.zeros_like(x))
    assert float(lag) == pytest.approx(float((2 - x.mean()) ** 2 / x.var(correction=0)), rel=1e-12)


def test_lag_carries_no_gradient(learnable_gaussian, randn):
    x = randn(2, 1, 1, 2, 2).requires_grad_()
    lag = fake_score_lag(x, learnable_gaussian(RectifiedFlow()), None, scalar(0.5), randn(2, 1, 1, 2, 2, seed=1))
    assert not lag.requires_grad
