import math

import pytest
import torch

from distillation.denoiser import EmpiricalDenoiser, GaussianDenoiser, Prediction
from distillation.errors import DistillationConfigError, PredictionError
from distillation.sampler import follow_ode, ode_step, sample_teacher, transition
from distillation.schedule import RectifiedFlow, VariancePreserving

SCHEDULES = [RectifiedFlow(), RectifiedFlow(shift=3.0), VariancePreserving(zero_snr=True), VariancePreserving("linear")]
M, S = 0.3, 0.7


def gain_and_mean(schedule, num_steps):
    """The sampler's exact affine map, read off two inputs."""
    noise = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1, 1)
    low, high = sample_teacher(GaussianDenoiser(M, S, schedule), None, noise, num_steps=num_steps).flatten().tolist()
    return high - low, low


@pytest.mark.parametrize(("num_steps", "gain"), [(1, 0.0), (4, 0.4969), (16, 0.6438), (256, 0.6964)])
def test_ddim_gain_has_its_table_values(num_steps, gain):
    # Row 4, rectified flow, s = 0.7; the table has four digits.
    assert gain_and_mean(RectifiedFlow(), num_steps)[0] == pytest.approx(gain, abs=5e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_ddim_gain_is_the_product_of_kappa(schedule, num_steps):
    alpha, sigma = schedule(torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps)
    variance = alpha**2 * S**2 + sigma**2
    kappa = (alpha[1:] * alpha[:-1] * S**2 + sigma[1:] * sigma[:-1]) / variance[:-1]
    gain, mean = gain_and_mean(schedule, num_steps)
    assert gain == pytest.approx(float(kappa.prod()), abs=1e-12)
    assert mean == pytest.approx(M * (1 - float(alpha[0] * kappa.prod())), abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_many_steps_reach_the_probability_flow_map_at_first_order(schedule):
    # Row 2: from t = 1 to data the exact gain is s / sqrt(v_1).
    alpha, sigma = schedule(1.0)
    exact = S / math.sqrt(float(alpha) ** 2 * S**2 + float(sigma) ** 2)
    coarse, fine = (gain_and_mean(schedule, n)[0] - exact for n in (128, 256))
    assert abs(fine) < 0.02
    assert coarse / fine == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("native", ["x0", "eps", "v"])
def test_ode_step_keeps_x0_and_eps(schedule, native, randn):
    x_t, t = randn(2, 1, 2, 1, 1), torch.tensor([0.4, 0.8], dtype=torch.float64)
    exact = GaussianDenoiser(M, S, schedule)(x_t, t)
    prediction = Prediction(x_t, t, schedule, **{native: getattr(exact, native)})
    alpha_s, sigma_s = (c.view(2, 1, 1, 1, 1) for c in schedule(t / 2))
    stepped = ode_step(x_t, prediction, alpha_s, sigma_s)
    assert torch.allclose(stepped, alpha_s * exact.x0 + sigma_s * exact.eps, rtol=0, atol=1e-12)
    if isinstance(schedule, RectifiedFlow):
        euler = x_t + (sigma_s - prediction.sigma) * exact.v
        assert torch.allclose(stepped, euler, rtol=0, atol=1e-12)


def test_ode_step_is_ddim_for_diffusion_and_euler_in_sigma_for_flow(randn):
    # Song et al. 2021, eq. 12 with eta 0, in abar = alpha^2; and x + (sigma_s - sigma_t) v, whatever the shift.
    x_t, t, s = randn(3, 1, 2, 1, 1), torch.tensor(0.8, dtype=torch.float64), 0.3
    for schedule in (VariancePreserving(), VariancePreserving("linear"), VariancePreserving("scaled_linear")):
        prediction = GaussianDenoiser(M, S, schedule)(x_t, t)
        abar, abar_s = (schedule(time)[0] ** 2 for time in (t, s))
        x0 = (x_t - (1 - abar).sqrt() * prediction.eps) / abar.sqrt()
        ddim = abar_s.sqrt() * x0 + (1 - abar_s).sqrt() * prediction.eps
        assert torch.allclose(ode_step(x_t, prediction, *schedule(s)), ddim, rtol=0, atol=1e-12)
    for shift in (1.0, 3.0):
        schedule = RectifiedFlow(shift)
        prediction = GaussianDenoiser(M, S, schedule)(x_t, t)
        sigma, sigma_s = (shift * time / (1 + (shift - 1) * time) for time in (0.8, 0.3))
        euler = x_t + (sigma_s - sigma) * prediction.v
        assert torch.allclose(ode_step(x_t, prediction, *schedule(s)), euler, rtol=0, atol=1e-12)


def test_many_steps_on_a_finite_data_set_end_in_its_points(randn):
    # Row 18 through the sampler: the last prediction is a mean of points weighted 0 and 1.
    points = torch.tensor([[-1.0, 0.5], [1.2, 0.3], [0.0, -1.4]], dtype=torch.float64).view(3, 2, 1, 1, 1)
    for schedule in (RectifiedFlow(), RectifiedFlow(shift=3.0), VariancePreserving()):
        end = sample_teacher(EmpiricalDenoiser(points, schedule), None, randn(40, 2, 1, 1, 1), num_steps=200)
        distance = torch.cdist(end.flatten(1), points.flatten(1))
        assert float(distance.min(dim=1).values.max()) < 1e-3
        assert set(distance.argmin(dim=1).tolist()) == {0, 1, 2}


def test_ode_step_to_the_same_level_stays(randn):
    x_t, t, schedule = randn(1, 1, 1, 1, 1), torch.tensor(0.6, dtype=torch.float64), VariancePreserving()
    prediction = GaussianDenoiser(M, S, schedule)(x_t, t)
    assert torch.allclose(ode_step(x_t, prediction, *schedule(t)), x_t, rtol=0, atol=1e-13)


def test_zero_steps_is_an_error(randn):
    with pytest.raises(DistillationConfigError, match="num_steps"):
        sample_teacher(GaussianDenoiser(0, 1, RectifiedFlow()), None, randn(1, 1, 1, 1, 1), num_steps=0)


def test_sampling_carries_no_gradient_and_guides(learnable_gaussian, numbers, randn):
    denoiser, noise = learnable_gaussian(RectifiedFlow(), 0.0, 0.5, reach=1.0), randn(2, 1, 1, 1, 1)
    ask, avoid = numbers(torch.ones(2)), numbers(torch.zeros(2))
    plain = sample_teacher(denoiser, ask, noise, num_steps=8)
    pushed = sample_teacher(denoiser, ask, noise, num_steps=8, guidance_scale=3.0, negative=avoid)
    assert not pushed.requires_grad
    # The mean enters affinely and gain * mean is what guidance w multiplies: mean 3 instead of 1.
    moved = sample_teacher(denoiser, numbers(torch.full((2,), 3.0)), noise, num_steps=8)
    assert torch.allclose(pushed, moved, rtol=0, atol=1e-12)
    assert not torch.allclose(pushed, plain)


def test_a_path_is_guided_at_its_times_above_the_start_only(learnable_gaussian, numbers, randn):
    denoiser, x = learnable_gaussian(RectifiedFlow(), 0.0, 0.5, reach=1.0), randn(2, 1, 1, 1, 1)
    ask, avoid, far = (numbers(torch.full((2,), mean)) for mean in (1.0, 0.0, 3.0))
    times = [torch.tensor(pair, dtype=torch.float64) for pair in ((1.0, 0.8), (0.5, 0.4), (0.0, 0.0))]
    guidance = {"guidance_scale": 3.0, "guidance_start": 0.45, "negative": avoid}
    path = follow_ode(denoiser, x, times, ask, **guidance)
    middle = follow_ode(denoiser, x, times[:2], far)
    # At 0.5 the first sample is guided still, at 0.4 the second is not.
    expected = torch.cat(
        [follow_ode(denoiser, middle, times[1:], each)[row : row + 1] for row, each in enumerate((far, ask))]
    )
    assert torch.allclose(path, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_transition_preserves_the_coefficients(schedule, eta, randn):
    x0, eps = randn(2, 1, 1, 1, 1), randn(2, 1, 1, 1, 1, seed=1)
    alpha, sigma = schedule(0.5)
    mean, std = transition(x0, eps, alpha, sigma, eta)
    kept = math.cos(eta * math.pi / 2) if eta < 1 else 0.0
    assert torch.allclose(mean, alpha * x0 + sigma * kept * eps, rtol=0, atol=1e-14)
    # Of unit-variance eps, what is kept and what is drawn anew add up to sigma'.
    assert float(std) ** 2 + (float(sigma) * kept) ** 2 == pytest.approx(float(sigma) ** 2, abs=1e-14)


def test_transition_after_the_last_step_is_deterministic(randn):
    x0 = randn(2, 1, 1, 1, 1)
    mean, std = transition(x0, None, torch.tensor(1.0), torch.tensor(0.0), 1.0)
    assert torch.equal(mean, x0)
    assert float(std) == 0


def test_transition_without_eps_needs_fresh_noise(randn):
    with pytest.raises(PredictionError, match="eta = 0.5"):
        transition(randn(1, 1, 1, 1, 1), None, torch.tensor(0.5), torch.tensor(0.5), 0.5)
