import math

import pytest
import torch

from distillation.errors import DistillationConfigError, TimestepsError
from distillation.schedule import (
    RectifiedFlow,
    VariancePreserving,
    add_noise,
    check_timesteps,
    coefficients,
    shift_time,
)

TIMES = torch.linspace(0, 1, 11, dtype=torch.float64)
SCHEDULES = [
    RectifiedFlow(),
    RectifiedFlow(shift=3.0),
    VariancePreserving(),
    VariancePreserving("scaled_linear", zero_snr=True, snr_shift=3.0),
    VariancePreserving("linear", beta_start=1e-4, beta_end=0.02),
]


def test_rectified_flow_shift_has_its_exact_values():
    alpha, sigma = RectifiedFlow(shift=3.0)(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    assert torch.allclose(sigma, torch.tensor([0.0, 0.5, 0.75, 0.9, 1.0], dtype=torch.float64), rtol=0, atol=1e-15)
    assert torch.equal(alpha, 1 - sigma)
    assert RectifiedFlow(shift=3.0).time_of(0.9) == pytest.approx(0.75, abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ends_norm_and_the_unit_determinant_of_the_velocity(schedule):
    alpha, sigma = schedule(TIMES)
    assert (alpha[0], sigma[0]) == (1, 0)
    assert torch.all(sigma.diff() > 0)
    p, q = schedule.velocity_coefficients(alpha, sigma)
    assert torch.allclose(alpha * q - sigma * p, torch.ones_like(alpha), rtol=0, atol=1e-14)
    if isinstance(schedule, VariancePreserving):
        assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-15)
        assert (float(alpha[-1]) == 0) is schedule.zero_snr
    else:
        assert (float(alpha[-1]), float(sigma[-1])) == (0, 1)


def test_variance_preserving_tables_equal_those_of_diffusers():
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler

    levels = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    cases = [
        (VariancePreserving("scaled_linear", zero_snr=True, snr_shift=3.0), CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear", rescale_betas_zero_snr=True, snr_shift_scale=3.0)),
        (VariancePreserving("linear", 1e-4, 0.02), DDIMScheduler(beta_start=1e-4, beta_end=0.02)),
        (VariancePreserving("cosine"), DDIMScheduler(beta_schedule="squaredcos_cap_v2")),
    ]  # fmt: skip
    for schedule, theirs in cases:
        assert torch.allclose(schedule(levels)[0] ** 2, theirs.alphas_cumprod.double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scalars_are_float64_and_tensors_keep_their_dtype(schedule):
    assert schedule(0.5)[0].dtype == torch.float64
    assert schedule(torch.tensor([0.5]))[1].dtype == torch.float32
    latents = torch.zeros(2, 1, 1, 1, 1)
    alpha, sigma = coefficients(schedule, torch.tensor([0.2, 0.7], dtype=torch.float64), latents)
    assert alpha.shape == sigma.shape == (2, 1, 1, 1, 1)
    assert alpha.dtype == torch.float32
    assert add_noise(schedule, latents, latents + 1, torch.tensor([0.2, 0.7])).shape == latents.shape


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_boundary_is_the_identity_at_data(schedule):
    c_skip, c_out = schedule.boundary(torch.tensor([0.0, 0.5], dtype=torch.float64))
    assert (float(c_skip[0]), float(c_out[0])) == (1, 0)
    assert float(c_out[1]) == pytest.approx(1, abs=1e-6)


def test_variance_preserving_boundary_has_the_values_of_latent_consistency_models():
    c_skip, c_out = VariancePreserving().boundary(0.003)  # n = 3
    assert float(c_skip) == pytest.approx(0.25 / (30**2 + 0.25), rel=1e-12)
    assert float(c_out) == pytest.approx(30 / math.sqrt(30**2 + 0.25), rel=1e-12)


def test_shift_time_of_one_is_none():
    assert shift_time(TIMES, 1.0) is TIMES
    assert float(shift_time(torch.tensor(0.5), 3.0)) == 0.75


@pytest.mark.parametrize(
    "make",
    [
        lambda: RectifiedFlow(shift=0.0),
        lambda: VariancePreserving("quadratic"),
        lambda: VariancePreserving(beta_start=0.0),
        lambda: VariancePreserving(num_train_timesteps=1),
        lambda: VariancePreserving(snr_shift=0.0),
    ],
)
def test_bad_settings_are_errors(make):
    with pytest.raises(DistillationConfigError):
        make()


def test_time_outside_the_unit_interval_is_an_error():
    with pytest.raises(TimestepsError, match=r"1\.5"):
        RectifiedFlow()(1.5)


def test_check_timesteps_sorts_and_freezes():
    assert check_timesteps({4: [1, 0.75, 0.5, 0.25], 1: [1.0]}) == {1: (1.0,), 4: (1.0, 0.75, 0.5, 0.25)}


@pytest.mark.parametrize(
    ("grids", "named"),
    [
        ({}, "empty"),
        ({0: []}, "count 0"),
        ({5: [1, 0.8, 0.6, 0.4, 0.2]}, "count 5"),
        ({2: [1.0]}, r"exactly 2"),
        ({2: [0.5, 1.0]}, "descending"),
        ({2: [0.5, 0.5]}, "descending"),
        ({2: [1.0, 0.0]}, r"0\.0"),
        ({1: [1.2]}, r"1\.2"),
        ({1: [float("nan")]}, "nan"),
    ],
)
def test_check_timesteps_names_what_is_wrong(grids, named):
    with pytest.raises(TimestepsError, match=named):
        check_timesteps(grids)
