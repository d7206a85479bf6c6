"""Where the public trainer ends, in worlds whose optimum is known in closed form."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import distillation as ds
import distillation.trainer as trainer_module
from distillation.config import DistillationConfig
from distillation.denoiser import Denoiser, EmpiricalDenoiser, GaussianDenoiser, Prediction
from distillation.schedule import RectifiedFlow, VariancePreserving, add_noise, coefficients
from distillation.stage import Stage, prepare
from distillation.trainer import start_student
from distillation.vsd import trainable

M, S = 0.3, 0.7
SHAPE = (1, 1, 16, 16)
SCHEDULES = [RectifiedFlow(), RectifiedFlow(shift=3.0), VariancePreserving()]


def settings(**changes):
    base = {
        "vsd_steps": 0,
        "cd_steps": 0,
        "batch_size": 4,
        "step_counts": [1],
        "guidance_scale": 1.0,
        "learning_rate": 0.02,
        "learning_rate_floor": 0.0,
        "fake_learning_rate": 0.01,
        "fake_updates": 2,
        "ema_decay": 0.9,
        "huber_c": 1.0,
        "log_every": 1000,
        "progress": False,
        "device": "cpu",
    }
    return DistillationConfig(**(base | changes))


def distil(teacher, student, config, data=None, shape=SHAPE, encode=None):
    """Train a student network of one and two steps with the public trainer; return it and the history."""
    few_step = ds.FewStepStudent(student, {1: [1.0], 2: [1.0, 0.5]}, latent_shape=shape)
    world = SimpleNamespace(denoiser=teacher, encode=encode)
    result = ds.DistillationTrainer(world, few_step, data, config).train()
    return result.student.denoiser, result.history


class Bent(Denoiser):
    """x0 = mean + gain (x_t - alpha mean), gain = (alpha std^2 + sigma end) / (alpha^2 std^2 + sigma^2).

    For end = 0 it is the exact denoiser of N(mean, std^2); as a one-step generator it puts out N(mean, end^2).
    mean, log std and end are linear in 1, sigma, ..., sigma^(n - 1).
    """

    def __init__(self, schedule, mean=0.0, std=1.0, end=0.0, n=1):
        super().__init__()
        self.schedule = schedule
        self.head = nn.Linear(n, 3, bias=False, dtype=torch.float64)
        start = torch.zeros(3, n, dtype=torch.float64)
        start[:, 0] = torch.tensor([mean, math.log(std), end], dtype=torch.float64)
        self.head.weight = nn.Parameter(start)

    def parts(self, sigma):
        mean, log_std, end = self.head(torch.stack([sigma**k for k in range(self.head.in_features)], -1)).unbind(-1)
        return mean, log_std.exp(), end

    def gain(self, alpha, sigma):
        _, std, end = self.parts(sigma)
        return (alpha * std**2 + sigma * end) / (alpha**2 * std**2 + sigma**2)

    def forward(self, x_t, t, condition=None):
        alpha, sigma = coefficients(self.schedule, t, x_t)
        mean, _, _ = self.parts(sigma)
        return Prediction(x_t, t, self.schedule, x0=mean + self.gain(alpha, sigma) * (x_t - alpha * mean))

    @torch.no_grad()
    def one_step(self):
        """Mean and standard deviation of what it puts out in one step."""
        one = torch.tensor(1.0, dtype=torch.float64)
        return float(self.parts(one)[0]), float(self.gain(1 - one, one).abs())


# Rows 3, 4 and 5: consistency distillation.


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_cd_leaves_the_ideal_map_alone_where_a_teachers_step_is_exact(schedule, ideal_map, exact_step, randn):
    # Row 3, over all eight intervals in one update. A step of the data's own denoiser is not exact: the student moves.
    config = settings(cd_steps=1, num_timesteps=8, batch_size=48, ema_decay=0.0)
    data = (M + S * randn(8, *SHAPE), None)

    def first_update(teacher):
        student, history = distil(teacher, ideal_map(schedule, M, S), config, data)
        moved = abs(float(student.std.detach()) - S) + abs(float(student.mean.detach()) - M)
        return history["cd"][0]["cd_loss"], moved

    loss, moved = first_update(exact_step(schedule, M, S, lambda t: t - 1 / 8))
    assert loss <= 1e-24
    assert moved < 1e-9
    loss, moved = first_update(GaussianDenoiser(M, S, schedule))
    assert loss > 1e-6
    assert moved == pytest.approx(0.04, rel=0.01), "both parameters, by AdamW's first step"


def test_cd_at_the_ideal_map_loses_what_the_solver_does_and_that_is_of_first_order(ideal_map, randn):
    # An interval's error falls with the number of its steps, and the loss is its square.
    def first_loss(solver_steps):
        config = settings(cd_steps=1, num_timesteps=2, batch_size=8, solver_steps=solver_steps)
        teacher, student = GaussianDenoiser(M, S, RectifiedFlow()), ideal_map(RectifiedFlow(), M, S)
        _, history = distil(teacher, student, config, (M + S * randn(8, *SHAPE), None))
        return history["cd"][0]["cd_loss"]

    losses = [first_loss(steps) for steps in (16, 32, 64)]
    assert losses[0] > 1e-6
    assert losses[0] / losses[1] == pytest.approx(4, rel=0.05)
    assert losses[1] / losses[2] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n", [2, 4])
def test_cd_ends_at_the_teachers_sampler_and_not_at_the_data(schedule, n, table, randn):
    # Row 5: the gain from noise is row 4's product of kappas over the grid, the mean that of a sampler from there.
    config = settings(cd_steps=250, num_timesteps=n, learning_rate=0.05, ema_decay=0.5)
    teacher, network = GaussianDenoiser(M, S, schedule), table(schedule, n)
    network, _ = distil(teacher, network, config, (M + S * randn(16, *SHAPE), None))
    noise = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 2, 1, 1, 1, 1)
    low, high = (ds.sample_teacher(teacher, None, z.view(1, 1, 1, 1, 1), num_steps=n).item() for z in noise[0])
    alpha, sigma = schedule(torch.arange(n + 1, dtype=torch.float64) / n)
    kappa = (alpha[:-1] * alpha[1:] * S**2 + sigma[:-1] * sigma[1:]) / (alpha[1:] ** 2 * S**2 + sigma[1:] ** 2)
    assert high - low == pytest.approx(float(kappa.prod()), abs=1e-12)
    gain, shift = float(network.gains[n].detach()), float(network.shifts[n].detach())
    assert gain == pytest.approx(high - low, abs=1e-2)
    assert shift == pytest.approx(low, abs=1e-2)
    assert abs(gain - S) > 0.03
    if n == 4 and schedule == RectifiedFlow():
        assert gain == pytest.approx(0.4969, abs=1e-2)


# Rows 6, 7 and 8: VSD and its fake score.


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("step_counts", [[1], [2]])
def test_vsd_ends_at_the_data(schedule, step_counts, ideal_map, learnable_gaussian):
    config = settings(vsd_steps=150, step_counts=step_counts)
    student, _ = distil(learnable_gaussian(schedule, M, S), ideal_map(schedule, -0.2, 1.2), config)
    assert abs(float(student.std.detach())) == pytest.approx(S, rel=0.02)
    assert float(student.mean.detach()) == pytest.approx(M, abs=0.02 * S)


def test_vsd_without_its_fake_score_collapses(affine, learnable_gaussian, monkeypatch):
    # Row 7: the noise itself in place of the fake score's view of it (SDS); all else is the same trainer.
    class Noise(Denoiser):
        def __init__(self, schedule, noise):
            super().__init__()
            self.schedule, self.noise = schedule, noise

        def forward(self, x_t, t, condition=None):
            return Prediction(x_t, t, self.schedule, eps=self.noise)

    def run():
        config, schedule = settings(vsd_steps=150), RectifiedFlow()
        student, _ = distil(learnable_gaussian(schedule, M, S), affine(schedule, 0.5, 0.0), config)
        return abs(float((student.gain + student.slope).detach())), float(student.shift.detach())

    difference = trainer_module.score_difference
    assert run() == (pytest.approx(S, rel=0.03), pytest.approx(M, abs=0.02))

    def blind(x, teacher, fake_score, condition, t, noise, *rest):
        return difference(x, teacher, Noise(teacher.schedule, noise), condition, t, noise, *rest)

    monkeypatch.setattr(trainer_module, "score_difference", blind)
    assert run() == (pytest.approx(0, abs=0.02), pytest.approx(M, abs=0.02))


class LiteralStage(Stage):
    """``|eps_theta - eps_teacher|^2`` on noised data, the VSD loss as the paper's summary has it."""

    def loss(self, step, batch, logs):
        x0 = batch.latents.to(self.dtype)
        t, noise = self.draw_times(step, "literal"), self.draw_noise(step, "literal")
        x_t = add_noise(self.teacher.schedule, x0, noise, t)
        with torch.no_grad():
            wanted = self.teacher(x_t, t, batch.condition).eps
        loss = ((self.student.denoiser(x_t, t, batch.condition).eps - wanted) ** 2).mean()
        logs["literal_loss"] = float(loss.detach())
        return loss


def test_the_summarys_literal_loss_turns_a_perfect_one_step_student_into_the_teacher(randn):
    schedule = RectifiedFlow()
    network = Bent(schedule, M, S, end=S)
    assert network.one_step() == (pytest.approx(M, abs=1e-12), pytest.approx(S, abs=1e-12))
    student = ds.FewStepStudent(network, {1: [1.0]})
    world, config = (
        SimpleNamespace(denoiser=GaussianDenoiser(M, S, schedule), encode=None),
        settings(vsd_steps=1, batch_size=8, time_shift=5.0),
    )
    setup = prepare(world, student, (M + S * randn(16, *SHAPE), None), config)
    history = LiteralStage(setup, "literal", 300, learning_rate=0.1, ema_decay=0.5, beta1=0.0).run()
    assert history[-1]["literal_loss"] < 1e-6 < 1e-3 < history[0]["literal_loss"]
    assert network.one_step() == (pytest.approx(M, abs=5e-3), pytest.approx(0, abs=5e-3))
    samples = student.sample(None, randn(1, 64, *SHAPE), 1).detach()
    assert float(samples.mean()) == pytest.approx(M, abs=5e-3)
    assert float(samples.std()) < 5e-3
    alpha, sigma = schedule(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    exact = alpha * S**2 / (alpha**2 * S**2 + sigma**2)
    assert torch.allclose(network.gain(alpha, sigma), exact, rtol=0, atol=5e-3)


def test_the_fake_score_learns_the_slope_of_the_students_samples(affine, monkeypatch):
    # Row 8, under a student that stays where it is: alpha a^2 / u, which no end but 0 gives.
    fake, a, b, schedule = [], 0.45, -0.2, RectifiedFlow()
    monkeypatch.setattr(trainer_module, "trainable", lambda module: fake.append(module) or trainable(module))
    config = settings(vsd_steps=150, learning_rate=1e-12, fake_updates=4)
    student, _ = distil(Bent(schedule, M, S), affine(schedule, a, b), config)
    assert float(student.gain.detach()) == pytest.approx(a, abs=1e-9)
    alpha, sigma = schedule(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    slope = alpha * a**2 / (alpha**2 * a**2 + sigma**2)
    assert torch.allclose(fake[0].gain(alpha, sigma), slope, rtol=0, atol=0.02)
    assert float(fake[0].parts(sigma)[0].mean().detach()) == pytest.approx(b, abs=0.02)


@pytest.mark.parametrize("stage", ["vsd", "cd"])
def test_the_guided_optimum_is_that_of_one_convention(stage, affine, learnable_gaussian, numbers, randn):
    # u + w (c - u) with c at M + reach and u at M: the optimum is at M + w reach, and not at M + (1 + w) reach.
    scale, reach, schedule = 3.0, 0.5, RectifiedFlow()
    config = settings(**{f"{stage}_steps": 200}, guidance_scale=scale, num_timesteps=1)
    data = ["prompt"] if stage == "vsd" else (M + S * randn(8, *SHAPE), ["prompt"] * 8)
    student, _ = distil(
        learnable_gaussian(schedule, M, S, reach=reach),
        affine(schedule, 0.5, 1.0),
        config,
        data,
        encode=lambda prompts: numbers(torch.tensor([float(bool(text)) for text in prompts])),
    )
    assert float(student.shift.detach()) == pytest.approx(M + scale * reach, abs=1e-2)


# Row 17: frames, and what the temporal terms do.


class Frames(Denoiser):
    """The exact denoiser of frames N(mean, L L^T), mean [F] and L [F, F] learnable."""

    def __init__(self, schedule, mean, factor):
        super().__init__()
        self.schedule, self.factor = schedule, nn.Parameter(factor.clone())
        self.mean = nn.Parameter(torch.full((len(factor),), mean, dtype=torch.float64))

    def forward(self, x_t, t, condition=None):
        alpha, sigma = (c.view(-1, 1, 1) for c in coefficients(self.schedule, t, x_t))
        covariance = self.factor @ self.factor.T
        noised = alpha**2 * covariance + sigma**2 * torch.eye(len(covariance), dtype=covariance.dtype)
        gains = alpha * torch.linalg.solve(noised, covariance.expand_as(noised))
        mean = self.mean.view(-1, 1, 1)
        moved = torch.einsum("bgf,bcghw->bcfhw", gains, x_t - alpha.view(-1, 1, 1, 1, 1) * mean)
        return Prediction(x_t, t, self.schedule, x0=mean + moved)


class Mixing(Denoiser):
    """x0 = A x_t + b over frames."""

    def __init__(self, schedule, frames):
        super().__init__()
        self.schedule = schedule
        self.matrix = nn.Parameter(torch.eye(frames, dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros(frames, dtype=torch.float64))

    def forward(self, x_t, t, condition=None):
        x0 = torch.einsum("fg,bcghw->bcfhw", self.matrix, x_t) + self.shift.view(-1, 1, 1)
        return Prediction(x_t, t, self.schedule, x0=x0)


@pytest.mark.parametrize(("weight", "causal"), [(0.0, False), (1.0, False), (1.0, True)])
def test_vsd_keeps_the_correlation_of_ar1_frames(weight, causal, randn):
    schedule, frames, rho = RectifiedFlow(), 3, 0.8
    lags = torch.arange(frames, dtype=torch.float64)
    truth = S**2 * rho ** (lags[:, None] - lags[None]).abs()
    teacher, shape = Frames(schedule, M, torch.linalg.cholesky(truth)), (1, frames, 16, 16)
    exact = GaussianDenoiser(M, S, schedule, frame_covariance=truth / S**2)
    x, t = randn(2, *shape), torch.tensor([0.3, 0.8], dtype=torch.float64)
    assert torch.allclose(teacher(x, t).x0, exact(x, t).x0, rtol=0, atol=1e-12)
    config = settings(vsd_steps=220, fake_learning_rate=0.02, temporal_weight=weight, causal_first_frame=causal)
    student, _ = distil(teacher, Mixing(schedule, frames), config, shape=shape)
    covariance = (student.matrix @ student.matrix.T).detach()
    spread = covariance.diagonal().sqrt()
    lag_one = (covariance / spread[:, None] / spread[None]).diagonal(1)
    assert torch.allclose(lag_one, torch.full_like(lag_one, rho), rtol=0, atol=0.02)
    assert torch.allclose(spread, torch.full_like(spread, S), rtol=0.03, atol=0)
    assert torch.allclose(student.shift, torch.full_like(student.shift, M), rtol=0, atol=0.02)


@pytest.mark.parametrize("stage", ["vsd", "cd"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_causal_first_frame_feels_no_motion(
    stage, causal, ideal_map, learnable_gaussian, exact_step, randn, monkeypatch
):
    # Only frame 1 is off, so only the temporal term can reach frames 0 and 2: 0 by the difference 0->1, 2 by 1->2.
    class Offset(ideal_map):
        def __init__(self, schedule):
            super().__init__(schedule, M, S)
            self.requires_grad_(False)
            self.offset = nn.Parameter(torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64))

        def forward(self, x_t, t, condition=None):
            return Prediction(x_t, t, self.schedule, x0=super().forward(x_t, t).x0 + self.offset.view(-1, 1, 1))

    def difference(x, *rest):
        away = torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64).view(-1, 1, 1).expand_as(x)
        return away, torch.ones(len(x), 1, 1, 1, 1, dtype=torch.float64)

    monkeypatch.setattr(trainer_module, "score_difference", difference)
    schedule, shape = RectifiedFlow(), (1, 3, 2, 2)
    changes = {f"{stage}_steps": 1, "num_timesteps": 1, "temporal_weight": 1.0, "causal_first_frame": causal}
    config = settings(**changes, ema_decay=0.0, learning_rate=0.01)
    exact = {"vsd": learnable_gaussian(schedule, M, S), "cd": exact_step(schedule, M, S, lambda t: t - 1)}
    student, _ = distil(exact[stage], Offset(schedule), config, (M + S * randn(4, *shape), None))
    moved = (student.offset.detach() - torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64)).tolist()
    assert moved[1] == pytest.approx(-0.01, rel=1e-3)
    assert moved[2] == pytest.approx(0.01, rel=1e-3)
    assert moved[0] == pytest.approx(0.0 if causal else 0.01, rel=1e-3, abs=1e-8)


# Row 18: mixtures.


class Mixture(Denoiser):
    """Each element by itself of two Gaussians, learnable."""

    def __init__(self, schedule, points, std):
        super().__init__()
        self.schedule = schedule
        self.points = nn.Parameter(torch.tensor(points, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(float(std), dtype=torch.float64).log())

    def forward(self, x_t, t, condition=None):
        alpha, sigma = coefficients(self.schedule, t, x_t)
        std = self.log_std.exp()
        variance = alpha**2 * std**2 + sigma**2
        away = x_t.unsqueeze(-1) - alpha.unsqueeze(-1) * self.points
        mean = ((-(away**2) / (2 * variance.unsqueeze(-1))).softmax(-1) * self.points).sum(-1)
        x0 = mean + alpha * std**2 / variance * (x_t - alpha * mean)
        return Prediction(x_t, t, self.schedule, x0=x0)


class TwoModes(Denoiser):
    """x0 = shift + w sign(z) + a z', z' the normal number that |z| stands for: a mixture of two Gaussians, exactly."""

    def __init__(self, schedule, w, a, shift):
        super().__init__()
        self.schedule = schedule
        self.w, self.a, self.shift = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (w, a, shift))

    def forward(self, x_t, t, condition=None):
        z = torch.special.ndtri(torch.erf(x_t.abs() / 2**0.5))
        return Prediction(x_t, t, self.schedule, x0=self.shift + self.w * x_t.sign() + self.a * z)


def test_vsd_keeps_both_modes_of_a_mixture(randn):
    schedule, points, std = RectifiedFlow(), [-0.6, 1.2], 0.3
    teacher = Mixture(schedule, points, std)
    exact = EmpiricalDenoiser(torch.tensor(points, dtype=torch.float64).view(2, 1, 1, 1, 1), schedule, std=std)
    x, t = randn(8, 1, 1, 1, 1), torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    assert torch.allclose(teacher(x, t).x0, exact(x, t).x0, rtol=0, atol=1e-12)
    config = settings(vsd_steps=250, fake_updates=3)
    student, _ = distil(teacher, TwoModes(schedule, 0.2, 0.6, 0.0), config)
    with torch.no_grad():
        samples = student(randn(16, *SHAPE, seed=9), torch.tensor(1.0, dtype=torch.float64)).x0.flatten()
    for point, mode in zip(points, (samples[samples < 0.3], samples[samples > 0.3]), strict=True):
        assert len(mode) / len(samples) == pytest.approx(0.5, abs=0.03)
        assert float(mode.mean()) == pytest.approx(point, abs=0.03)
        assert float(mode.std()) == pytest.approx(std, abs=0.03)


# Roles on one base.


@pytest.mark.parametrize("rank", [None, 1])
def test_adapters_on_one_base_reach_the_optimum_of_full_fine_tuning(rank):
    # The student starts as the teacher, whose single step has no spread, and the way from there is a change of rank 1.
    teacher = SimpleNamespace(denoiser=Bent(RectifiedFlow(), M, S, n=2), encode=None, latent_shape=SHAPE)
    config = settings(vsd_steps=250, fake_learning_rate=0.005, fake_updates=4, ema_decay=0.95, adapter_rank=rank)
    student = start_student(teacher, config, {1: [1.0]})
    assert student.denoiser is not teacher.denoiser
    result = ds.DistillationTrainer(teacher, student, None, config).train()
    mean, std = result.student.merged().denoiser.one_step()
    assert std == pytest.approx(S, rel=0.02)
    assert mean == pytest.approx(M, abs=0.02 * S)
