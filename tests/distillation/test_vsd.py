import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from distillation.denoiser import Denoiser, EmpiricalDenoiser, GaussianDenoiser, Prediction
from distillation.errors import ConditionError, DistillationConfigError, NoiseError, StepCountError
from distillation.schedule import RectifiedFlow, VariancePreserving, add_noise
from distillation.student import FewStepStudent
from distillation.vsd import (
    VSDAnchor,
    backward_simulation,
    fake_score_loss,
    sample_times,
    surrogate_loss,
    vsd_gradient,
    vsd_loss,
    vsd_target,
)
from latent_rewards.training.loop import NonFiniteError

M, S = 0.3, 0.7
SCHEDULES = [RectifiedFlow(), RectifiedFlow(shift=3.0), VariancePreserving()]
TIMES = [0.1, 0.5, 0.9]


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def leaf(value):
    return scalar(value).requires_grad_()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize(("a", "b"), [(0.4, -0.2), (1.3, 0.9), (-0.5, 0.3)])
def test_gradient_is_that_of_the_kl(schedule, time, a, b, signs):
    # Row 6: before the normaliser, (sigma^2 / alpha^2) times d KL / d(a, b), KL(student_t || teacher_t).
    z, eps = signs
    scale, offset, t = leaf(a), leaf(b), scalar(time)
    fake = GaussianDenoiser(b, abs(a), schedule)
    vsd_loss(scale * z + offset, GaussianDenoiser(M, S, schedule), fake, None, t, eps, 1.0, normalize=False).backward()
    alpha, sigma = (float(c) for c in schedule(t))
    v, u = alpha**2 * S**2 + sigma**2, alpha**2 * a**2 + sigma**2
    factor = sigma**2 / alpha**2
    assert float(offset.grad) == pytest.approx(factor * alpha**2 * (b - M) / v, abs=1e-12)
    assert float(scale.grad) == pytest.approx(factor * alpha**2 * a * (1 / v - 1 / u), abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("time", [0.3, 0.7])
def test_gradient_for_mixtures_is_that_of_the_kl(schedule, time):
    # Row 6 for two-component mixtures x = +-w + a z: the KL by quadrature, its gradient in (w, a) by autograd.
    w, a, t, components = leaf(0.5), leaf(0.4), scalar(time), scalar([-1.0, 1.0]).view(2, 1, 1, 1, 1)
    alpha, sigma = (float(c) for c in schedule(t))
    grid = torch.linspace(-9, 9, 6001, dtype=torch.float64)

    def density(centre, std):
        variance = alpha**2 * std**2 + sigma**2
        parts = [torch.exp(-((grid - sign * alpha * centre) ** 2) / (2 * variance)) for sign in (-1, 1)]
        return sum(parts) / (2 * torch.sqrt(2 * math.pi * variance))

    student, teacher = density(w, a), density(scalar(0.9), scalar(0.25))
    kl = torch.trapezoid(student * (student.log() - teacher.log()), grid)
    expected = torch.autograd.grad(kl, [w, a])

    # E over component, z and eps by Gauss-Hermite quadrature of g dx/d(w, a).
    nodes, mass = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(60))
    z, eps = (values.reshape(-1, 1, 1, 1, 1) for values in torch.meshgrid(nodes, nodes, indexing="ij"))
    mass = (mass[:, None] * mass[None]).flatten() / (2 * mass.sum() ** 2)
    total = [0.0, 0.0]
    for sign in (-1.0, 1.0):
        x = (sign * w + a * z).detach()
        g = vsd_gradient(
            x,
            EmpiricalDenoiser(0.9 * components, schedule, std=0.25),
            EmpiricalDenoiser(0.5 * components, schedule, std=0.4),
            None,
            t,
            eps,
            normalize=False,
        )
        total[0] += float((mass * (g * sign).flatten()).sum())
        total[1] += float((mass * (g * z).flatten()).sum())
    for value, gradient in zip(total, expected, strict=True):
        assert alpha**2 / sigma**2 * value == pytest.approx(float(gradient), rel=1e-6)
        assert abs(float(gradient)) > 1e-5


def test_vsd_finds_both_components_of_a_mixture(randn):
    # x = +-w + a z starts as one lump; its exact fake score is the mixture it is.
    schedule, components = RectifiedFlow(), scalar([-1.0, 1.0]).view(2, 1, 1, 1, 1)
    teacher = EmpiricalDenoiser(0.9 * components, schedule, std=0.3)
    z = randn(256, 1, 1, 1, 1)
    z = torch.cat([z, -z]) / z.square().mean().sqrt()
    sign = scalar([-1.0, 1.0]).repeat_interleave(2).repeat(128).view(-1, 1, 1, 1, 1)
    w, a = leaf(0.2), leaf(0.6)
    for step in range(300):
        t, eps = scalar(0.15 + 0.6 * (step % 5) / 4), randn(512, 1, 1, 1, 1, seed=step)
        fake = EmpiricalDenoiser(float(w.detach()) * components, schedule, std=float(a.detach()))
        vsd_loss(w * sign + a * z, teacher, fake, None, t, eps, 1.0, normalize=False).backward()
        with torch.no_grad():
            for value in (w, a):
                value -= 0.5 * value.grad
                value.grad = None
    assert float(w.detach()) == pytest.approx(0.9, rel=0.02)
    assert abs(float(a.detach())) == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("normalize", [True, False])
def test_optimum_is_the_data_with_and_without_the_normaliser(schedule, normalize, signs):
    z, eps = signs
    for a, b, at_rest in ((S, M, True), (-S, M, True), (0.5, M, False), (S, 0.0, False)):
        scale, offset, fake = leaf(a), leaf(b), GaussianDenoiser(b, abs(a), schedule)
        teacher = GaussianDenoiser(M, S, schedule)
        vsd_loss(scale * z + offset, teacher, fake, None, scalar(0.5), eps, 1.0, normalize=normalize).backward()
        assert (max(abs(float(scale.grad)), abs(float(offset.grad))) < 1e-12) is at_rest


def test_normaliser_is_per_sample_and_the_loss_has_gradient_g_over_n(randn):
    schedule, t = RectifiedFlow(), scalar([0.3, 0.8])
    teacher, fake = GaussianDenoiser(M, S, schedule), GaussianDenoiser(0.0, 1.0, schedule)
    x, noise = randn(2, 2, 3, 1, 1).requires_grad_(), randn(2, 2, 3, 1, 1, seed=1)
    raw = vsd_gradient(x, teacher, fake, None, t, noise, normalize=False)
    real = teacher(add_noise(schedule, x.detach(), noise, t), t).x0
    distance = (x.detach() - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    g = vsd_gradient(x, teacher, fake, None, t, noise)
    assert torch.allclose(g, raw / (distance + 1e-6), rtol=0, atol=1e-14)
    loss = vsd_loss(x, teacher, fake, None, t, noise, 1.0)
    loss.backward()
    assert torch.allclose(x.grad, g / x.numel(), rtol=0, atol=1e-14)
    assert float(loss.detach()) == pytest.approx(float(0.5 * (g**2).mean()), abs=1e-14)
    assert not g.requires_grad
    assert torch.equal(loss, surrogate_loss(x, g))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("time", TIMES)
def test_fake_score_learns_the_regression_slope(schedule, time, signs):
    # Row 8: the minimiser of the denoising loss on x = a z + b has slope alpha a^2 / u and passes through b.
    z, eps = signs
    a, b, t = 0.4, -0.2, scalar(time)
    alpha, sigma = (float(c) for c in schedule(t))

    class Line(Denoiser):
        def __init__(self, slope, offset, native):
            super().__init__()
            self.schedule, self.native = schedule, native
            self.slope, self.offset = nn.Parameter(scalar(slope)), nn.Parameter(scalar(offset))

        def forward(self, x_t, t, condition=None):
            x0 = self.slope * (x_t - alpha * b) + self.offset
            exact = Prediction(x_t, t, schedule, x0=x0)
            return Prediction(x_t, t, schedule, **{self.native: getattr(exact, self.native)})

    slope = alpha * a**2 / (alpha**2 * a**2 + sigma**2)
    weight = {"x0": 1.0, "v": 1 / sigma**2, "eps": alpha**2 / sigma**2}
    for native in weight:
        best, worse = Line(slope, b, native), Line(slope + 0.1, b, native)
        loss = fake_score_loss(a * z + b, best, None, t, eps)
        loss.backward()
        assert abs(float(best.slope.grad)) + abs(float(best.offset.grad)) < 1e-11
        posterior_variance = a**2 * sigma**2 / (alpha**2 * a**2 + sigma**2)
        assert float(loss.detach()) == pytest.approx(weight[native] * posterior_variance, rel=1e-9)
        assert float(fake_score_loss(a * z + b, worse, None, t, eps).detach()) > float(loss.detach())


def test_fake_score_loss_gives_the_student_no_gradient(affine, signs):
    z, eps = signs
    scale, fake = leaf(0.5), affine(RectifiedFlow())
    fake_score_loss(scale * z, fake, None, scalar(0.5), eps).backward()
    assert scale.grad is None
    assert fake.gain.grad is not None


def descend(schedule, signs, fake_for, steps=400, learning_rate=0.4):
    """Gradient descent on x = a z + b with exact expectations; ``fake_for(x, t, eps)`` is the fake score."""
    z, eps = signs
    scale, offset, teacher = leaf(1.5), leaf(-0.5), GaussianDenoiser(M, S, schedule)
    for step in range(steps):
        t, x = scalar(0.2 + 0.6 * (step % 5) / 4), scale * z + offset
        fake = fake_for(x.detach(), t, eps)
        vsd_loss(x, teacher, fake, None, t, eps, 1.0, normalize=False).backward()
        with torch.no_grad():
            for value in (scale, offset):
                value -= learning_rate * value.grad
                value.grad = None
    return float(scale.detach()), float(offset.detach())


def test_vsd_with_a_trained_fake_score_keeps_the_spread(signs, learnable_gaussian):
    # Row 7, first half, with the fake score trained by the public loss.
    schedule = RectifiedFlow()
    fake = learnable_gaussian(schedule, -0.5, 1.5)
    optimizer = torch.optim.SGD(fake.parameters(), lr=0.2)

    def follow(x, t, eps):
        for time in (0.3, 0.5):
            fake_score_loss(x, fake, None, scalar(time), eps).backward()
            optimizer.step()
            optimizer.zero_grad()
        return fake

    scale, offset = descend(schedule, signs, follow)
    assert scale == pytest.approx(S, rel=0.02)
    assert offset == pytest.approx(M, abs=0.02)


def test_score_distillation_without_a_fake_score_contracts(signs):
    # Row 7, second half: the noise itself in place of the fake score's prediction of it.
    schedule = RectifiedFlow()

    class NoFake(Denoiser):
        def __init__(self, eps):
            super().__init__()
            self.schedule, self.eps = schedule, eps

        def forward(self, x_t, t, condition=None):
            return Prediction(x_t, t, schedule, eps=self.eps)

    scale, offset = descend(schedule, signs, lambda x, t, eps: NoFake(eps))
    assert abs(scale) < 1e-3
    assert offset == pytest.approx(M, abs=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_literal_summary_loss_is_minimised_by_the_teacher_itself(schedule, signs):
    # |eps_theta - eps_teacher|^2 on noised data: its minimiser is the teacher's line, so one step gives the mean.
    z, eps = signs
    t, teacher = scalar(0.6), GaussianDenoiser(M, S, schedule)
    x_t = add_noise(schedule, M + S * z, eps, t)
    inputs = torch.stack([x_t.flatten(), torch.ones(4, dtype=torch.float64)], dim=1)
    slope, offset = torch.linalg.lstsq(inputs, teacher(x_t, t).eps.flatten()[:, None]).solution.flatten().tolist()
    alpha, sigma = (float(c) for c in schedule(t))
    variance = alpha**2 * S**2 + sigma**2
    assert slope == pytest.approx(sigma / variance, abs=1e-12)
    assert offset == pytest.approx(-sigma * alpha * M / variance, abs=1e-12)


def test_a_student_of_the_literal_summary_loss_gives_the_mean_in_one_step(learnable_gaussian, signs, randn):
    # Trained to the end it is the teacher, and row 4 with N = 1 says what one call of that returns: no spread at all.
    schedule, (z, eps) = RectifiedFlow(), signs
    network, teacher = learnable_gaussian(schedule, -0.5, 1.5), GaussianDenoiser(M, S, schedule)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    for step in range(300):
        t = scalar(0.2 + 0.6 * (step % 5) / 4)
        x_t = add_noise(schedule, M + S * z, eps, t)
        loss = ((network(x_t, t).eps - teacher(x_t, t).eps) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(network.mean.detach()) == pytest.approx(M, abs=1e-3)
    assert float(network.log_std.detach().exp()) == pytest.approx(S, rel=1e-3)
    with torch.no_grad():
        samples = FewStepStudent(network, timesteps={1: [1.0]}).sample(None, randn(1, 50, 1, 1, 1, 1), 1)
    assert float(samples.std()) < 1e-12
    assert float(samples.mean()) == pytest.approx(M, abs=1e-3)


def test_vsd_target_is_the_sample_against_the_gradient_and_carries_none(randn):
    x, g = randn(2, 1, 2, 1, 1).requires_grad_(), randn(2, 1, 2, 1, 1, seed=1)
    assert torch.equal(vsd_target(x, g), (x - g).detach())
    assert not vsd_target(x, g).requires_grad


def test_ar1_frames_keep_their_correlation(randn):
    # Row 17: x = A z with the exact fake score of N(0, A A^T); the moment design makes every step exact.
    schedule, frames, rho = RectifiedFlow(), 3, 0.8
    lags = torch.arange(frames, dtype=torch.float64)
    truth = rho ** (lags[:, None] - lags[None]).abs()
    teacher = GaussianDenoiser(0.0, S, schedule, frame_covariance=truth)
    basis = torch.eye(2 * frames, dtype=torch.float64) * (2 * frames) ** 0.5
    points = torch.cat([basis, -basis])
    z, eps = points[:, :frames], points[:, frames:].reshape(-1, 1, frames, 1, 1)
    mixing = torch.eye(frames, dtype=torch.float64).requires_grad_()
    for step in range(400):
        covariance = (mixing @ mixing.T).detach()
        fake = GaussianDenoiser(0.0, 1.0, schedule, frame_covariance=covariance)
        x = (z @ mixing.T).reshape(-1, 1, frames, 1, 1)
        t = scalar(0.2 + 0.5 * (step % 4) / 3)
        vsd_loss(x, teacher, fake, None, t, eps, 1.0, normalize=False).backward()
        with torch.no_grad():
            mixing -= 1.5 * mixing.grad
            mixing.grad = None
    covariance = (mixing @ mixing.T).detach()
    spread = covariance.diagonal().sqrt()
    lag_one = (covariance / spread[:, None] / spread[None]).diagonal(1)
    assert torch.allclose(lag_one, torch.full((frames - 1,), rho, dtype=torch.float64), rtol=0, atol=0.02)
    assert torch.allclose(spread, torch.full((frames,), S, dtype=torch.float64), rtol=0.02, atol=0)


def test_sample_times_fill_their_range():
    u = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert torch.allclose(sample_times(u), torch.tensor([0.02, 0.5, 0.98], dtype=torch.float64), rtol=0, atol=1e-15)
    shifted = sample_times(u, shift=3.0)
    assert torch.allclose(shifted, torch.tensor([0.02, 0.74, 0.98], dtype=torch.float64), rtol=0, atol=1e-15)
    with pytest.raises(DistillationConfigError, match="low < high"):
        sample_times(u, 0.9, 0.1)


def test_backward_simulation_has_a_gradient_on_the_exit_call_only(affine, randn):
    noise = randn(2, 1, 1, 1, 1, 1)
    student = FewStepStudent(affine(RectifiedFlow(), 0.6, 0.1), timesteps={2: [1.0, 0.5]})
    backward_simulation(student, None, noise, 2, 1).sum().backward()
    reached = 0.5 * (0.6 * noise[0] + 0.1) + 0.5 * noise[1]
    assert float(student.denoiser.gain.grad) == pytest.approx(float(reached), abs=1e-14)
    assert float(student.denoiser.shift.grad) == 1
    first = backward_simulation(student, None, noise, 2, 0)
    assert torch.allclose(first, 0.6 * noise[0] + 0.1, rtol=0, atol=1e-15)
    assert torch.equal(backward_simulation(student, None, noise, 2, 1), student.sample(None, noise, 2))


def test_backward_simulation_checks_its_arguments(affine, randn):
    student = FewStepStudent(affine(RectifiedFlow()))
    with pytest.raises(NoiseError, match="2 steps take noise"):
        backward_simulation(student, None, randn(1, 1, 1, 1, 1, 1), 2, 0)
    with pytest.raises(StepCountError, match="exit_step"):
        backward_simulation(student, None, randn(2, 1, 1, 1, 1, 1), 2, 2)


def train_with_anchor(student, anchor, numbers, randn, steps, start=0):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    condition = numbers(torch.zeros(8))
    for step in range(start, start + steps):
        anchor.loss(student, condition, randn(2, 8, 1, 4, 4, 4, seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        anchor.after_step()


def make_anchor(learnable_gaussian, **options):
    schedule = RectifiedFlow()
    fake = learnable_gaussian(schedule, 0.0, 1.0)
    return VSDAnchor(GaussianDenoiser(M, S, schedule), fake, learning_rate=0.02, **options)


def test_anchor_pulls_a_policy_to_the_teacher(affine, learnable_gaussian, numbers, randn):
    student = FewStepStudent(affine(RectifiedFlow(), 1.2, -0.4), timesteps={1: [1.0], 2: [1.0, 0.5]})
    anchor = make_anchor(learnable_gaussian, fake_updates=3, num_steps=1)
    train_with_anchor(student, anchor, numbers, randn, 150)
    network = student.denoiser
    spread = abs(float(network.gain.detach() + network.slope.detach()))
    assert spread == pytest.approx(S, abs=0.07)
    assert float(network.shift.detach()) == pytest.approx(M, abs=0.07)
    assert anchor.step == 150


def test_anchor_learns_from_what_it_observes_as_from_a_loss_and_asks_no_teacher(
    affine, learnable_gaussian, numbers, randn, monkeypatch
):
    student = FewStepStudent(affine(RectifiedFlow()), timesteps={2: [1.0, 0.5]})
    condition, noise = numbers(torch.zeros(4)), randn(2, 4, 1, 1, 1, 1)
    anchors = [make_anchor(learnable_gaussian, fake_updates=2) for _ in range(2)]
    anchors[0].loss(student, condition, noise)
    monkeypatch.setattr(anchors[1].teacher, "forward", None)
    anchors[1].observe(student, condition, noise)
    before = float(anchors[1].fake_score.mean.detach())
    for anchor in anchors:
        anchor.after_step()
    assert float(anchors[0].fake_score.mean.detach()) == float(anchors[1].fake_score.mean.detach()) != before


def test_an_anchor_whose_gradient_is_not_finite_keeps_its_fake_score(affine, learnable_gaussian, numbers, randn):
    student = FewStepStudent(affine(RectifiedFlow()), timesteps={2: [1.0, 0.5]})
    anchor = make_anchor(learnable_gaussian)
    before = copy.deepcopy(anchor.fake_score.state_dict())
    anchor.observe(student, numbers(torch.zeros(4)), randn(2, 4, 1, 1, 1, 1))
    anchor._samples[0][0][0] = float("nan")
    with pytest.raises(NonFiniteError, match="anchor: gradient norm nan of the fake score at step 0; it is kept"):
        anchor.after_step()
    assert all(torch.equal(value, before[name]) for name, value in anchor.fake_score.state_dict().items())
    assert all(parameter.grad is None for parameter in anchor.fake_score.parameters())


def test_moments_of_a_checkpoint_follow_the_fake_score_to_another_device(
    affine, learnable_gaussian, numbers, randn, monkeypatch
):
    trained = make_anchor(learnable_gaussian)
    train_with_anchor(FewStepStudent(affine(RectifiedFlow()), timesteps={2: [1.0, 0.5]}), trained, numbers, randn, 2)
    resumed = make_anchor(learnable_gaussian)
    resumed.load_state_dict(trained.state_dict())
    # As on the way to a GPU, the parameters stay the same objects.
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    resumed._place(torch.device("meta"))
    optimizer = resumed.optimizer
    assert {p.device.type for p in optimizer.param_groups[0]["params"]} == {"meta"}
    assert len(optimizer.state) == 2
    for parameter, state in optimizer.state.items():
        assert {state[name].device for name in ("exp_avg", "exp_avg_sq")} == {parameter.device}
        assert float(state["step"]) == float(next(iter(trained.optimizer.state.values()))["step"]) > 0


def test_anchor_continues_from_its_state_to_identical_weights(affine, learnable_gaussian, numbers, randn):
    contracts = pytest.importorskip("latent_rewards.contracts")
    from latent_rewards.training.checkpoint import pack_state, unpack_state

    student = FewStepStudent(affine(RectifiedFlow()), timesteps={2: [1.0, 0.5]})
    anchor = make_anchor(learnable_gaussian, fake_updates=2)
    assert isinstance(anchor, contracts.Anchor)
    train_with_anchor(student, anchor, numbers, randn, 3)
    student_again, state = copy.deepcopy(student), unpack_state(*pack_state(anchor.state_dict()))
    train_with_anchor(student, anchor, numbers, randn, 2, start=3)
    resumed = make_anchor(learnable_gaussian, fake_updates=2)
    resumed.load_state_dict(state)
    train_with_anchor(student_again, resumed, numbers, randn, 2, start=3)
    assert torch.equal(student.denoiser.gain, student_again.denoiser.gain)
    assert torch.equal(anchor.fake_score.log_std, resumed.fake_score.log_std)


def test_anchor_serves_any_policy_at_its_last_step(learnable_gaussian, numbers, randn):
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(scalar(1.2))

        def transition(self, latents, step, num_steps, condition):
            last = step + 1 == num_steps
            return (self.scale * latents, latents.new_zeros(())) if last else (0.5 * latents, latents.new_tensor(0.5))

    policy, anchor = Chain(), make_anchor(learnable_gaussian)
    noise = randn(2, 8, 1, 1, 1, 1)
    anchor.loss(policy, numbers(torch.zeros(8)), noise).backward()
    assert policy.scale.grad is not None
    assert torch.allclose(anchor._samples[0][0], 1.2 * (0.5 * noise[0] + 0.5 * noise[1]), rtol=0, atol=1e-14)


def test_anchor_guides_calls_that_refine_by_their_own_scale(affine, learnable_gaussian, numbers, randn, monkeypatch):
    scales, exits = [], []

    def loss(x, teacher, fake_score, condition, t, noise, scale, negative):
        scales.append(scale)
        return x.sum()

    def simulate(student, condition, noise, num_steps, exit_step):
        exits.append(exit_step)
        return backward_simulation(student, condition, noise, num_steps, exit_step)

    monkeypatch.setattr("distillation.vsd.vsd_loss", loss)
    monkeypatch.setattr("distillation.vsd.backward_simulation", simulate)
    student = FewStepStudent(affine(RectifiedFlow()), timesteps={2: [1.0, 0.5]})
    encode = lambda prompts: numbers(torch.zeros(len(prompts)))  # noqa: E731
    anchor = make_anchor(learnable_gaussian, guidance_scale=3.0, refine_guidance_scale=1.5, encode=encode)
    train_with_anchor(student, anchor, numbers, randn, 12)
    assert scales == [1.5 if exit_step else 3.0 for exit_step in exits]
    assert set(exits) == {0, 1}


def test_anchor_guidance_needs_a_negative_and_repeats_it(affine, learnable_gaussian, numbers, randn):
    schedule = RectifiedFlow()
    teacher = learnable_gaussian(schedule, M, S, reach=1.0)
    with pytest.raises(ConditionError, match="guidance 3.0 and 3.0"):
        VSDAnchor(teacher, copy.deepcopy(teacher), guidance_scale=3.0)
    encode = lambda prompts: numbers(torch.zeros(len(prompts)))  # noqa: E731
    anchor = VSDAnchor(teacher, copy.deepcopy(teacher).requires_grad_(False), guidance_scale=3.0, encode=encode)
    assert all(p.requires_grad for p in anchor.fake_score.parameters())
    student = FewStepStudent(affine(schedule))
    anchor.loss(student, numbers(torch.ones(4)), randn(1, 4, 1, 1, 1, 1)).backward()
    # The guided teacher sits at M + 3, the fake score at M + 1: the student is pushed up.
    assert float(student.denoiser.shift.grad) < 0
    assert teacher.mean.grad is None
    # Unguided, the teacher and its copy agree.
    student.zero_grad()
    unguided = VSDAnchor(teacher, copy.deepcopy(teacher), guidance_scale=3.0, guidance_start=1.0, encode=encode)
    unguided.loss(student, numbers(torch.ones(4)), randn(1, 4, 1, 1, 1, 1)).backward()
    assert abs(float(student.denoiser.shift.grad)) < 1e-12
