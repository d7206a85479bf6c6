import copy
import math

import pytest
import torch

from distillation.consistency import (
    consistency_function,
    consistency_loss,
    consistency_pair,
    curriculum_pairs,
    pseudo_huber,
    time_grid,
)
from distillation.denoiser import Denoiser, GaussianDenoiser, Prediction
from distillation.errors import DistillationConfigError
from distillation.schedule import RectifiedFlow, VariancePreserving

M, S = 0.3, 0.7
SCHEDULES = [RectifiedFlow(), RectifiedFlow(shift=3.0), VariancePreserving(), VariancePreserving("linear")]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_boundary_holds_for_any_network(schedule, affine, learnable_gaussian, randn):
    # Row 3: f(x, 0) = x, whatever the network puts out.
    x, zero = randn(3, 1, 2, 1, 1), torch.tensor(0.0, dtype=torch.float64)
    for network in (affine(schedule, 3.0, 2.0), learnable_gaussian(schedule, 5.0, 2.0)):
        assert torch.allclose(consistency_function(network, x, zero), x, rtol=0, atol=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("k", [1, 5, 9])
def test_ideal_map_and_exact_step_have_no_loss(schedule, k, randn, ideal_map, exact_step):
    t, s = time_grid(10)[k], time_grid(10)[k - 1]
    student = ideal_map(schedule, M, S).requires_grad_(False)
    x0, noise = M + S * randn(64, 1, 1, 1, 1), randn(64, 1, 1, 1, 1, seed=1)
    loss = consistency_loss(student, student, exact_step(schedule, M, S, lambda t: s), x0, None, noise, t, s)
    assert float(loss) <= 1e-24
    # The guard can fail: one DDIM step of the teacher is not the exact map.
    discrete = consistency_loss(student, student, GaussianDenoiser(M, S, schedule), x0, None, noise, t, s)
    assert float(discrete) > 1e-6


def test_several_solver_steps_lead_to_where_the_teachers_sampler_does(randn, ideal_map):
    # Row 4: from t = 1 to 0.5 in 1, 2 and 4 steps of the rectified flow; the student's target is what lies there.
    schedule, seen = RectifiedFlow(), []

    class Target(ideal_map):
        def forward(self, x_t, t, condition=None):
            seen.append(x_t)
            return super().forward(x_t, t, condition)

    x0, noise = randn(2, 1, 2, 1, 1), randn(2, 1, 2, 1, 1)
    t, s = (torch.tensor(time, dtype=torch.float64) for time in (1.0, 0.5))
    teacher = GaussianDenoiser(M, S, schedule)
    for steps in (1, 2, 4):
        student, target = ideal_map(schedule, M, S), Target(schedule, M, S)
        consistency_loss(student, target, teacher, x0, None, noise, t, s, solver_steps=steps)
        gain = math.prod(
            ((1 - b) * (1 - a) * S**2 + b * a) / ((1 - a) ** 2 * S**2 + a**2)
            for a, b in ((1 - 0.5 * k / steps, 1 - 0.5 * (k + 1) / steps) for k in range(steps))
        )
        assert torch.allclose(seen[-1], 0.5 * M + gain * noise, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_fixed_point_is_the_teachers_discrete_sampler(schedule, randn, table):
    # Row 5: trained with the public loss on a grid of 4, the gain at noise is the DDIM product, not s.
    n, teacher = 4, GaussianDenoiser(M, S, schedule)
    student, target, grid = table(schedule, n), table(schedule, n), time_grid(n)
    x0, noise = M + S * randn(8, 1, 1, 1, 1), randn(8, 1, 1, 1, 1, seed=1)
    for k in range(1, n + 1):
        optimizer = torch.optim.LBFGS(student.parameters(), max_iter=60, tolerance_grad=1e-14, tolerance_change=0)

        def closure(k=k, optimizer=optimizer):
            optimizer.zero_grad()
            loss = consistency_loss(student, target, teacher, x0, None, noise, grid[k], grid[k - 1], huber_c=1.0)
            loss.backward()
            return loss

        optimizer.step(closure)
        target.load_state_dict(student.state_dict())
    alpha, sigma = schedule(grid)
    variance = alpha**2 * S**2 + sigma**2
    kappa = (alpha[:-1] * alpha[1:] * S**2 + sigma[:-1] * sigma[1:]) / variance[1:]
    one = torch.ones(2, 1, 1, 1, 1, dtype=torch.float64) * torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1)
    low, high = consistency_function(student, one, grid[-1]).detach().flatten().tolist()
    assert high - low == pytest.approx(float(kappa.prod()), abs=1e-6)
    if isinstance(schedule, RectifiedFlow) and schedule.shift == 1:
        assert high - low == pytest.approx(0.4969, abs=5e-5)


def test_the_step_is_taken_in_sigma_and_not_in_t(randn):
    # With shift 3 from t = 1 to 0.5 sigma falls by 0.25: x_s = x_t - 0.25 v, and f(x, 0.5) = 0 is the target here.
    schedule, seen = RectifiedFlow(shift=3.0), []

    class Recorder(Denoiser):
        def __init__(self):
            super().__init__()
            self.schedule = schedule

        def forward(self, x_t, t, condition=None):
            seen.append(x_t)
            return Prediction(x_t, t, schedule, v=torch.ones_like(x_t))

    x0, noise = randn(2, 1, 1, 1, 1), randn(2, 1, 1, 1, 1, seed=1)
    one, half = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    consistency_loss(Recorder(), Recorder(), Recorder(), x0, None, noise, one, half)
    teacher_saw, target_saw, student_saw = seen
    assert torch.equal(teacher_saw, student_saw)
    assert torch.allclose(target_saw, noise - 0.25, rtol=0, atol=1e-15)


def test_only_the_student_gets_a_gradient_and_guidance_moves_the_target(affine, learnable_gaussian, numbers, randn):
    schedule = RectifiedFlow()
    student, target = affine(schedule), affine(schedule)
    teacher = learnable_gaussian(schedule, 0.0, 0.7, reach=1.0)
    x0, noise = randn(3, 1, 1, 1, 1), randn(3, 1, 1, 1, 1, seed=1)
    t = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    ask, avoid = numbers(torch.ones(3)), numbers(torch.zeros(3))
    plain = consistency_loss(student, target, teacher, x0, ask, noise, t, t - 0.1)
    guided = consistency_loss(student, target, teacher, x0, ask, noise, t, t - 0.1, guidance_scale=5.0, negative=avoid)
    guided.backward()
    assert student.gain.grad is not None
    assert target.gain.grad is None
    assert teacher.mean.grad is None
    assert float(plain.detach()) != float(guided.detach())


def test_pseudo_huber_has_its_exact_value():
    prediction, target = torch.tensor([3.0, 0.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    assert float(pseudo_huber(prediction, target, 4.0)) == pytest.approx((math.sqrt(9 + 16) - 4) / 2, abs=1e-15)
    # float32: sqrt(0.01 + 1e-10) - 0.1 would be 0 there.
    small = pseudo_huber(torch.tensor([1e-5]), torch.zeros(1), 0.1)
    assert float(small) == pytest.approx(1e-10 / 0.2, rel=1e-5)
    with pytest.raises(DistillationConfigError, match="huber_c"):
        pseudo_huber(prediction, target, 0.0)


def test_time_grid_is_uniform_and_holds_both_ends():
    assert time_grid(4).tolist() == [0, 0.25, 0.5, 0.75, 1]
    with pytest.raises(DistillationConfigError, match="num_timesteps"):
        time_grid(0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_student_may_be_its_own_target(schedule, affine, randn):
    # A stop-gradient target: value and gradient are those of a frozen copy, and no gradient runs through the target.
    student = affine(schedule, 0.6, 0.1, slope=-0.2)
    teacher, x0, noise = GaussianDenoiser(M, S, schedule), randn(4, 1, 2, 1, 1), randn(4, 1, 2, 1, 1, seed=1)
    t = torch.tensor([0.2, 0.4, 0.7, 1.0], dtype=torch.float64)
    results = []
    for target in (student, copy.deepcopy(student)):
        prediction, aim = consistency_pair(student, target, teacher, x0, None, noise, t, t - 0.1)
        assert prediction.requires_grad
        assert not aim.requires_grad
        loss = pseudo_huber(prediction, aim, 0.1)
        results.append(torch.stack([loss.detach(), *torch.autograd.grad(loss, list(student.parameters()))]))
    assert torch.equal(results[0], results[1])
    assert float(results[0][1:].abs().min()) > 1e-4


def test_curriculum_has_its_exact_values():
    u = torch.tensor([0.0, 0.5], dtype=torch.float64)
    t, s = curriculum_pairs(u, 0.5, num_stages=4, k=0.0, lowest=0.1)
    assert torch.allclose(t, torch.tensor([1.0, 0.55], dtype=torch.float64), rtol=0, atol=1e-15)
    assert torch.allclose(s, t * (1 - 1 / 8), rtol=0, atol=1e-15), "the third stage of four: a = 3"
    t, s = curriculum_pairs(u, 1.0, num_stages=4, q=3.0, k=8.0, b=2.0, lowest=0.1)
    for time, earlier in zip(t.tolist(), s.tolist(), strict=True):
        assert earlier == pytest.approx(time * (1 - (1 + 8 / (1 + math.exp(2 * time))) / 3**4), abs=1e-15)


def test_curriculum_begins_at_the_data_and_ends_near_t():
    u = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    gaps = []
    for progress in torch.linspace(0, 1, 33).tolist():
        t, s = curriculum_pairs(u, progress)
        assert bool((s >= 0).all() and (s < t).all() and (t <= 1).all() and (t > 0.02).all())
        gaps.append(float(((t - s) / t).max()))
    assert gaps[0] == 1
    assert all(later <= earlier for earlier, later in zip(gaps, gaps[1:], strict=False))
    assert len(set(gaps)) == 7, "eight stages, of which the first two both reach the data somewhere"
    assert gaps[-1] < 5 / 2**8


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_curriculum_pairs_have_no_loss_at_the_ideal_map(schedule, progress, randn, ideal_map, exact_step):
    # Row 3 away from the grid: a pair per sample, with s = 0 among them at first.
    t, s = curriculum_pairs(torch.linspace(0, 0.95, 32, dtype=torch.float64), progress)
    student, teacher = ideal_map(schedule, M, S).requires_grad_(False), exact_step(schedule, M, S, lambda t: s)
    x0, noise = M + S * randn(32, 1, 1, 1, 1), randn(32, 1, 1, 1, 1, seed=1)
    assert float(consistency_loss(student, student, teacher, x0, None, noise, t, s)) <= 1e-24


def test_curriculum_refuses_what_cannot_be_scheduled():
    u = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(DistillationConfigError, match="progress must lie in .* got 1.5"):
        curriculum_pairs(u, 1.5)
    for wrong in ({"num_stages": 0}, {"q": 1.0}, {"k": -1.0}, {"b": -1.0}, {"lowest": 1.0}):
        with pytest.raises(DistillationConfigError, match="a curriculum needs"):
            curriculum_pairs(u, 0.5, **wrong)
