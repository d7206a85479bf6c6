import math

import pytest
import torch

from distillation.denoiser import EmpiricalDenoiser, GaussianDenoiser, Prediction, guided, limited_guidance
from distillation.errors import ConditionError, DistillationConfigError, PredictionError
from distillation.schedule import RectifiedFlow, VariancePreserving

SCHEDULES = [RectifiedFlow(), RectifiedFlow(shift=3.0), VariancePreserving(), VariancePreserving(zero_snr=True)]
T = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)


def column(values):
    return values.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_prediction_determines_the_others(schedule, randn):
    x0, eps = randn(3, 2, 2, 2, 2), randn(3, 2, 2, 2, 2, seed=1)
    alpha, sigma = (column(c) for c in schedule(T))
    x_t = alpha * x0 + sigma * eps
    v = eps - x0 if isinstance(schedule, RectifiedFlow) else alpha * eps - sigma * x0
    for native in ({"x0": x0}, {"eps": eps}, {"v": v}):
        prediction = Prediction(x_t, T, schedule, **native)
        for name, expected in (("x0", x0), ("eps", eps), ("v", v)):
            assert torch.allclose(getattr(prediction, name), expected, rtol=0, atol=1e-12), (native.keys(), name)
        assert torch.allclose(prediction.native_target(x0, eps), prediction.value, rtol=0, atol=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gaussian_teacher_is_exact(schedule, randn):
    # Row 1: D = m + (alpha s^2 / v)(x_t - alpha m), score = -(x_t - alpha m) / v = -eps / sigma.
    m, s = 0.3, 0.7
    x_t = randn(3, 1, 2, 2, 2)
    alpha, sigma = (column(c) for c in schedule(T))
    variance = alpha**2 * s**2 + sigma**2
    prediction = GaussianDenoiser(m, s, schedule)(x_t, T)
    assert torch.allclose(prediction.x0, m + alpha * s**2 / variance * (x_t - alpha * m), rtol=0, atol=1e-12)
    assert torch.allclose(-prediction.eps / sigma, -(x_t - alpha * m) / variance, rtol=0, atol=1e-12)
    again = Prediction(x_t, T, schedule, eps=prediction.eps)
    assert torch.allclose(again.x0, prediction.x0, rtol=0, atol=1e-12)
    assert torch.allclose(again.v, prediction.v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gaussian_teacher_holds_at_both_ends(schedule, randn):
    x = randn(2, 1, 2, 2, 2)
    denoiser = GaussianDenoiser(0.3, 0.7, schedule)
    assert torch.allclose(denoiser(x, torch.tensor(0.0, dtype=torch.float64)).x0, x, rtol=0, atol=1e-14)
    if float(schedule(1.0)[0]) == 0:
        at_noise = denoiser(x, torch.tensor(1.0, dtype=torch.float64))
        assert torch.allclose(at_noise.x0, torch.full_like(x, 0.3), rtol=0, atol=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_correlated_frames_have_the_matrix_posterior(schedule, randn):
    frames = torch.arange(4, dtype=torch.float64)
    covariance = 0.49 * 0.8 ** (frames[:, None] - frames[None]).abs()
    x_t = randn(3, 2, 4, 1, 2)
    x0 = GaussianDenoiser(0.3, 0.7, schedule, frame_covariance=covariance / 0.49)(x_t, T).x0
    for row, (alpha, sigma) in enumerate(zip(*schedule(T), strict=True)):
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(4).double())
        expected = 0.3 + torch.einsum("fg,cghw->cfhw", gain, x_t[row] - alpha * 0.3)
        assert torch.allclose(x0[row], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_finite_data_set_is_the_softmax_weighted_mean(schedule, randn):
    # Row 18, by its definition: Bayes' rule over the points, one sample and one point at a time.
    points, x_t, weights = randn(5, 2, 2, 1, 1), randn(3, 2, 2, 1, 1, seed=1), torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5])
    x0 = EmpiricalDenoiser(points, schedule, weights=weights)(x_t, T).x0
    for row, (alpha, sigma) in enumerate(zip(*schedule(T), strict=True)):
        density = [
            float(weight) * math.exp(-float(((x_t[row] - alpha * point) ** 2).sum() / (2 * sigma**2)))
            for weight, point in zip(weights, points, strict=True)
        ]
        expected = sum(share * point for share, point in zip(density, points, strict=True)) / sum(density)
        assert torch.allclose(x0[row], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_mixture_of_two_gaussians_is_the_posterior_mean_by_quadrature(schedule):
    # E[x0 | x_t] = int x0 p(x0) p(x_t | x0) / int p(x0) p(x_t | x0) on a fine grid.
    centres, std, shares = (-0.9, 0.7), 0.3, (0.4, 0.6)
    points = torch.tensor(centres, dtype=torch.float64).view(2, 1, 1, 1, 1)
    x_t = torch.tensor([-0.5, 0.1, 0.8], dtype=torch.float64)
    denoiser = EmpiricalDenoiser(points, schedule, std=std, weights=torch.tensor(shares))
    prediction = denoiser(column(x_t), T)
    grid = torch.linspace(-4, 4, 20001, dtype=torch.float64)
    prior = sum(share * torch.exp(-((grid - c) ** 2) / (2 * std**2)) for share, c in zip(shares, centres, strict=True))
    for row, (alpha, sigma) in enumerate(zip(*schedule(T), strict=True)):
        joint = prior * torch.exp(-((x_t[row] - alpha * grid) ** 2) / (2 * sigma**2))
        assert float(prediction.x0[row]) == pytest.approx(float((grid * joint).sum() / joint.sum()), abs=1e-7)
        again = Prediction(column(x_t), T, schedule, eps=prediction.eps)
        assert float(again.x0[row]) == pytest.approx(float(prediction.x0[row]), abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_point_with_a_spread_is_the_gaussian_and_both_ends_are_exact(schedule, randn):
    x, point = randn(3, 1, 2, 2, 2), torch.full((1, 1, 2, 2, 2), 0.3, dtype=torch.float64)
    one, gaussian = EmpiricalDenoiser(point, schedule, std=0.7), GaussianDenoiser(0.3, 0.7, schedule)
    zero, half = (torch.tensor(time, dtype=torch.float64) for time in (0.0, 0.5))
    for t in (T, zero, half):
        assert torch.allclose(one(x, t).x0, gaussian(x, t).x0, rtol=0, atol=1e-12)
        assert torch.allclose(one(x, t).v, gaussian(x, t).v, rtol=0, atol=1e-12)
    assert torch.equal(EmpiricalDenoiser(x, schedule)(x, zero).x0, x)
    if float(schedule(1.0)[0]) == 0:
        at_noise = EmpiricalDenoiser(x, schedule)(x, torch.tensor(1.0, dtype=torch.float64)).x0
        assert torch.allclose(at_noise, x.mean(dim=0, keepdim=True).expand_as(x), rtol=0, atol=1e-14)


def test_a_data_set_needs_points_and_weights_that_fit(randn):
    schedule, points = RectifiedFlow(), randn(2, 1, 1, 1, 1)
    for wrong in ({"points": points[:0]}, {"std": -0.1}):
        with pytest.raises(DistillationConfigError, match="at least one point and std >= 0"):
            EmpiricalDenoiser(**({"points": points, "schedule": schedule} | wrong))
    for weights in (torch.ones(3), torch.tensor([1.0, -1.0]), torch.zeros(2)):
        with pytest.raises(DistillationConfigError, match="weights must be 2 numbers"):
            EmpiricalDenoiser(points, schedule, weights=weights)


def test_half_precision_is_read_in_float32():
    half = torch.ones(1, 1, 1, 1, 1, dtype=torch.bfloat16)
    prediction = Prediction(half, torch.tensor(0.3), RectifiedFlow(), v=half)
    assert prediction.x0.dtype == prediction.eps.dtype == torch.float32
    assert float(prediction.x0) == pytest.approx(0.7, abs=1e-6)


def test_noise_prediction_at_zero_snr_is_a_clear_error(randn):
    x = randn(1, 1, 1, 1, 1)
    prediction = Prediction(x, torch.tensor(1.0), VariancePreserving(zero_snr=True), eps=x)
    with pytest.raises(PredictionError, match="zero terminal SNR"):
        _ = prediction.x0


def test_x0_prediction_at_data_has_no_noise(randn):
    x = randn(1, 1, 1, 1, 1)
    with pytest.raises(PredictionError, match="sigma is 0"):
        _ = Prediction(x, torch.tensor(0.0), RectifiedFlow(), x0=x).eps


def test_exactly_one_form_is_given(randn):
    x = randn(1, 1, 1, 1, 1)
    for given in ({}, {"x0": x, "eps": x}):
        with pytest.raises(PredictionError, match="exactly one"):
            Prediction(x, torch.tensor(0.5), RectifiedFlow(), **given)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_guidance_extrapolates_every_form(schedule, learnable_gaussian, numbers, randn):
    denoiser, x_t = learnable_gaussian(schedule, 0.1, 0.7, reach=2.0), randn(3, 1, 1, 1, 1)
    ask, avoid = numbers(torch.tensor([1.0, 2.0, 3.0])), numbers(torch.zeros(3))
    c, u, blend = denoiser(x_t, T, ask), denoiser(x_t, T, avoid), guided(denoiser, x_t, T, ask, avoid, 4.0)
    for name in ("x0", "eps", "v"):
        expected = getattr(u, name) + 4.0 * (getattr(c, name) - getattr(u, name))
        assert torch.allclose(getattr(blend, name), expected, rtol=0, atol=1e-12)
    per_sample = guided(denoiser, x_t, T, ask, avoid, torch.tensor([0.0, 1.0, 4.0]))
    assert torch.allclose(per_sample.x0[:2], torch.stack([u.x0[0], c.x0[1]]), rtol=0, atol=1e-12)
    assert torch.allclose(per_sample.x0[2], blend.x0[2], rtol=0, atol=1e-12)


def test_limited_guidance_leaves_low_noise_unguided(learnable_gaussian, numbers, randn):
    t = torch.tensor([0.2, 0.35, 0.9], dtype=torch.float64)
    assert limited_guidance(3.0, t, 0.0) == 3.0
    assert limited_guidance(1.0, t, 0.35) == 1.0, "which needs no negative condition"
    scale = limited_guidance(3.0, t, 0.35)
    assert scale.tolist() == [1.0, 3.0, 3.0]
    denoiser, x_t = learnable_gaussian(RectifiedFlow(), 0.1, 0.7, reach=2.0), randn(3, 1, 1, 1, 1)
    ask, avoid = numbers(torch.ones(3)), numbers(torch.zeros(3))
    mixed, full = (guided(denoiser, x_t, t, ask, avoid, w).x0 for w in (scale, 3.0))
    assert torch.allclose(mixed[0], denoiser(x_t, t, ask).x0[0], rtol=0, atol=1e-12)
    assert torch.allclose(mixed[1:], full[1:], rtol=0, atol=1e-12)


def test_samples_without_guidance_cost_one_call(affine, numbers, randn):
    denoiser, x_t, t = affine(RectifiedFlow()), randn(3, 1, 1, 1, 1), torch.tensor([0.2, 0.35, 0.9]).double()
    ask, avoid = numbers(torch.ones(3)), numbers(torch.zeros(3))
    guided(denoiser, x_t, t, ask, avoid, torch.tensor([1.0, 3.0, 1.0]))
    assert [times.tolist() for times in denoiser.times] == [t.tolist(), [t[1].item()]]
    guided(denoiser, x_t, t, ask, avoid, torch.ones(3))
    assert len(denoiser.times) == 3


def test_no_guidance_is_one_call_and_guidance_needs_a_negative(affine, randn):
    denoiser, x_t = affine(RectifiedFlow()), randn(3, 1, 1, 1, 1)
    guided(denoiser, x_t, T, None)
    assert len(denoiser.times) == 1
    with pytest.raises(ConditionError, match="guidance_scale = 5"):
        guided(denoiser, x_t, T, None, guidance_scale=5.0)
