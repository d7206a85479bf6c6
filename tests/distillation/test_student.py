import copy
import math

import pytest
import torch
from torch import nn

from distillation.denoiser import GaussianDenoiser
from distillation.errors import (
    ConditionError,
    DistillationConfigError,
    MissingPartError,
    NoiseError,
    StepCountError,
    TimestepsError,
)
from distillation.sampler import sample_teacher
from distillation.schedule import RectifiedFlow, VariancePreserving
from distillation.student import FewStepStudent

SCHEDULES = [RectifiedFlow(), RectifiedFlow(shift=3.0), VariancePreserving()]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_four_steps_with_fresh_noise_follow_the_formula(schedule, affine, randn):
    student = FewStepStudent(affine(schedule, 0.6, 0.2, 0.1))
    noise = randn(4, 3, 1, 2, 1, 1)
    x = noise[0]
    for k, t in enumerate([1.0, 0.75, 0.5, 0.25]):
        x0 = (0.6 + 0.1 * t) * x + 0.2
        alpha, sigma = schedule([0.75, 0.5, 0.25, 0.0][k])
        x = alpha * x0 + sigma * noise[(k + 1) % 4]
    assert torch.allclose(student.sample(None, noise), x, rtol=0, atol=1e-13)
    assert student.denoiser.times == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_deterministic_student_is_the_teachers_sampler(schedule, randn):
    teacher = GaussianDenoiser(0.3, 0.7, schedule)
    student, noise = FewStepStudent(teacher, eta=0.0), randn(4, 3, 1, 2, 1, 1)
    assert torch.allclose(
        student.sample(None, noise), sample_teacher(teacher, None, noise[0], num_steps=4), rtol=0, atol=1e-13
    )


def test_one_step_of_the_teacher_itself_is_the_mean(randn):
    # Row 4, N = 1: nothing is accelerated by copying the teacher.
    student = FewStepStudent(GaussianDenoiser(0.3, 0.7, RectifiedFlow()))
    samples = student.sample(None, randn(1, 5, 1, 1, 1, 1), num_steps=1)
    assert torch.allclose(samples, torch.full_like(samples, 0.3), rtol=0, atol=1e-14)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_transition_std_is_what_the_family_says_and_zero_at_the_end(eta, affine, randn):
    student, x = FewStepStudent(affine(RectifiedFlow()), eta=eta), randn(3, 1, 2, 1, 1)
    for step, sigma_next in enumerate([0.75, 0.5, 0.25, 0.0]):
        mean, std = student.transition(x, step, 4, None)
        assert mean.shape == x.shape
        assert std.shape == ()
        assert float(std) == pytest.approx(sigma_next * math.sin(eta * math.pi / 2), abs=1e-15)
    assert torch.equal(mean, student.predict(x, 3, 4, None).x0)


def test_sampling_is_differentiable_through_every_step(affine, randn):
    student = FewStepStudent(affine(RectifiedFlow(), 0.6), timesteps={2: [1.0, 0.5]})
    noise = randn(2, 1, 1, 1, 1, 1)
    student.sample(None, noise, 2).sum().backward()
    # x = a (0.5 a z + 0.5 e): derivative a z + 0.5 e.
    expected = 0.6 * noise[0] + 0.5 * noise[1]
    assert float(student.denoiser.gain.grad) == pytest.approx(float(expected), abs=1e-14)


def test_wrong_requests_name_what_is_wrong(affine, numbers, randn):
    student = FewStepStudent(affine(RectifiedFlow()), timesteps={1: [1.0], 4: [1.0, 0.75, 0.5, 0.25]})
    with pytest.raises(StepCountError, match="samples in 1, 4 steps; got 3"):
        student.sample(None, randn(3, 1, 1, 1, 1, 1), 3)
    with pytest.raises(NoiseError, match=r"4 steps take noise \[4, B.*got \[1, 2, 1, 1, 1, 1\]"):
        student.sample(None, randn(1, 2, 1, 1, 1, 1), 4)
    with pytest.raises(NoiseError, match=r"got \[4, 1, 1, 1, 1\]"):
        student.sample(None, randn(4, 1, 1, 1, 1), 4)
    with pytest.raises(ConditionError, match="describes 3 samples, the noise 2"):
        student.sample(numbers(torch.zeros(3)), randn(1, 2, 1, 1, 1, 1), 1)
    for step in (-1, 4):
        with pytest.raises(StepCountError, match=f"got {step}"):
            student.transition(randn(1, 1, 1, 1, 1), step, 4, None)


def test_wrong_settings_are_errors(affine):
    with pytest.raises(DistillationConfigError, match=r"got 1\.5"):
        FewStepStudent(affine(RectifiedFlow()), eta=1.5)
    with pytest.raises(TimestepsError):
        FewStepStudent(affine(RectifiedFlow()), timesteps={5: [1, 0.8, 0.6, 0.4, 0.2]})


def test_policy_parts_are_there_or_missing_by_name(affine, numbers):
    bare = FewStepStudent(affine(RectifiedFlow()))
    with pytest.raises(MissingPartError, match="encode"):
        bare.encode(["a"])
    with pytest.raises(MissingPartError, match="latent_shape"):
        bare.latent_shape(None)
    student = FewStepStudent(
        affine(RectifiedFlow()), encode=lambda prompts: numbers(torch.zeros(len(prompts))), latent_shape=[2, 3, 4, 5]
    )
    assert len(student.encode(["a", "b"])) == 2
    assert student.latent_shape() == (2, 3, 4, 5)
    assert FewStepStudent(affine(RectifiedFlow()), latent_shape=lambda c: (len(c), 1, 1, 1)).latent_shape("ab")[0] == 2
    assert student.timesteps(2) == (1.0, 0.5)
    assert student.step_counts == (1, 2, 4)


def test_policy_satisfies_the_seam(affine):
    contracts = pytest.importorskip("latent_rewards.contracts")
    assert isinstance(FewStepStudent(affine(RectifiedFlow())), contracts.Policy)


def test_copies_share_the_encoder_and_own_their_weights(affine):
    class Encoder(nn.Linear):
        def __call__(self, prompts):
            return None

    encoder = Encoder(2, 2)
    student = FewStepStudent(affine(RectifiedFlow()), eta=0.5, encode=encoder, exporter="family").eval()
    copied = copy.deepcopy(student)
    assert sum(p.numel() for p in student.parameters()) == 3
    assert copied._parts["encode"] is encoder
    assert (copied.exporter, copied.eta, copied.training) == ("family", 0.5, False)
    with torch.no_grad():
        copied.denoiser.gain.add_(1)
    assert float(student.denoiser.gain.detach()) == 0.5


def test_float32_latents_stay_float32():
    student = FewStepStudent(GaussianDenoiser(0.3, 0.7, RectifiedFlow(shift=3.0)))
    assert student.sample(None, torch.randn(4, 1, 1, 1, 1, 1, generator=torch.Generator())).dtype == torch.float32
