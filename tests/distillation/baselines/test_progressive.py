import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distillation.baselines.progressive import ProgressiveConfig, ProgressiveTrainer
from distillation.denoiser import Denoiser, GaussianDenoiser, Prediction
from distillation.errors import DistillationConfigError
from distillation.sampler import sample_teacher
from distillation.schedule import RectifiedFlow, VariancePreserving, expand
from distillation.student import FewStepStudent

M, S = 0.3, 0.7
SHAPE = (1, 2, 2, 2)


class Lines(Denoiser):
    """x0 = (gain + gain_slope t) x_t + shift + shift_slope t: any affine map at t = 1 and any other at t = 1/2."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule
        names = ("gain", "gain_slope", "shift", "shift_slope")
        self.values = nn.ParameterDict({name: torch.tensor(0.1, dtype=torch.float64) for name in names})

    def forward(self, x_t, t, condition=None):
        time, values = expand(t, x_t), self.values
        x0 = (values["gain"] + values["gain_slope"] * time) * x_t + values["shift"] + values["shift_slope"] * time
        return Prediction(x_t, t, self.schedule, x0=x0)


def settings(**changes):
    base = {
        "first_steps": 1,
        "round_updates": 300,
        "batch_size": 16,
        "step_counts": [1],
        "guidance_scale": 1.0,
        "learning_rate": 0.05,
        "learning_rate_floor": 0.0,
        "ema_decay": 0.5,
        "progress": False,
        "device": "cpu",
    }
    return ProgressiveConfig(**(base | changes))


def ddim_gain(num_steps, schedule, s=S):
    """FORMULAS: the product over steps of (alpha' alpha s^2 + sigma' sigma) / v."""
    gain = 1.0
    for step in range(num_steps):
        (a, b), (c, d) = (tuple(map(float, schedule(1 - k / num_steps))) for k in (step, step + 1))
        gain *= (c * a * s * s + d * b) / (a * a * s * s + b * b)
    return gain


def test_the_gain_of_ddim_is_that_of_the_sampler(randn):
    assert ddim_gain(4, RectifiedFlow()) == pytest.approx(0.4969, abs=5e-5)
    teacher, noise = GaussianDenoiser(0.0, S, RectifiedFlow()), randn(2, *SHAPE)
    torch.testing.assert_close(sample_teacher(teacher, None, noise, num_steps=4), 0.49691 * noise, rtol=1e-4, atol=0)


@pytest.fixture
def run(randn):
    def run(config, schedule=None, teacher=None, prompts=None):
        schedule = schedule or RectifiedFlow()
        teacher = teacher or SimpleNamespace(denoiser=GaussianDenoiser(M, S, schedule), encode=None)
        student = FewStepStudent(Lines(schedule), latent_shape=SHAPE)
        return ProgressiveTrainer(teacher, student, (M + S * randn(64, *SHAPE), prompts), config).train()

    return run


def reached(student, num_steps):
    """What the student makes of the noise -1, 0 and 1."""
    noise = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).view(3, 1, 1, 1, 1).expand(3, *SHAPE)
    with torch.no_grad():
        return student.sample(None, noise[None].repeat(num_steps, 1, 1, 1, 1, 1), num_steps)[:, 0, 0, 0, 0]


def by_ddim(schedule, num_steps, mean=M):
    """The same of the teacher: its mean moves with alpha, and what is left of the noise is the gain."""
    gain, alpha = ddim_gain(num_steps, schedule), float(schedule(1.0)[0])
    return mean + gain * (torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) - alpha * mean)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), RectifiedFlow(shift=3.0), VariancePreserving()])
def test_one_step_learns_what_two_steps_of_the_teacher_do(run, schedule):
    student = run(settings(), schedule).students[1]
    torch.testing.assert_close(reached(student, 1), by_ddim(schedule, 2), rtol=0, atol=2e-3)


def test_rounds_go_on_from_one_another_until_one_step_is_worth_four(run):
    result = run(settings(first_steps=2, step_counts=[1, 2], round_updates=600))
    assert list(result.history) == ["progressive_2", "progressive_1"]
    assert sorted(result.students) == [1, 2]
    two, one = result.students[2], result.students[1]
    assert (two.grids, two.eta, one.grids) == ({2: (1.0, 0.5)}, 0.0, {1: (1.0,)})
    for student, count in ((two, 2), (one, 1)):
        torch.testing.assert_close(reached(student, count), by_ddim(RectifiedFlow(), 4), rtol=0, atol=5e-3)
    assert float((reached(two, 2) - by_ddim(RectifiedFlow(), 2)).abs().max()) > 0.1
    assert not torch.equal(two.denoiser.values["gain"], one.denoiser.values["gain"])


def test_guidance_is_distilled_by_the_first_round_alone(learnable_gaussian, numbers, run):
    teacher = SimpleNamespace(
        denoiser=learnable_gaussian(RectifiedFlow(), M, S, reach=1.0),
        encode=lambda prompts: numbers(torch.tensor([float(bool(text)) for text in prompts])),
    )
    config = settings(first_steps=2, guidance_scale=3.0, round_updates=600)
    student = run(config, teacher=teacher, prompts=["one"] * 64).students[1]
    # The mean is M + 1 for the prompt and M for the empty one: guided once it is M + 3, guided again M + 9.
    torch.testing.assert_close(reached(student, 1), by_ddim(RectifiedFlow(), 4, mean=M + 3), rtol=0, atol=0.02)


def test_a_killed_run_continues_to_identical_weights(run, tmp_path, monkeypatch):
    from distillation.baselines import progressive as module

    changes = {"first_steps": 4, "round_updates": 3, "checkpoint_every": 2}
    original = module._Round.step

    def interrupted(self, step):
        if (self.name, step) == ("progressive_2", 2):
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(module._Round, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(settings(**changes, output_dir=str(tmp_path)))
    monkeypatch.setattr(module._Round, "step", original)
    resumed, straight = run(settings(**changes, output_dir=str(tmp_path))), run(settings(**changes))
    assert resumed.history == straight.history
    for name, value in straight.students[1].state_dict().items():
        assert torch.equal(resumed.students[1].state_dict()[name], value)


def test_rounds_and_their_updates():
    config = settings(first_steps=16, step_counts=[4, 1], round_updates=5, last_updates=9)
    wanted = {"progressive_16": 5, "progressive_8": 5, "progressive_4": 5, "progressive_2": 9, "progressive_1": 9}
    assert config.stages == wanted
    assert settings(first_steps=8, step_counts=[2]).rounds == [8, 4, 2]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"first_steps": 12}, "power of two, e.g. 16; got 12"),
        ({"first_steps": 0}, "power of two"),
        ({"round_updates": 0}, "round_updates must be at least 1; got 0"),
        ({"first_steps": 8, "step_counts": [3, 1]}, "step_counts holds 3, but the rounds are of 8, 4, 2, 1 steps"),
        ({"first_steps": 2, "step_counts": [4, 1]}, "step_counts holds 4"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
    ],
)
def test_settings_that_cannot_be_meant(changes, told):
    with pytest.raises(DistillationConfigError, match=told):
        settings(**changes)


def test_it_needs_data_and_networks_of_its_own(affine, randn):
    teacher = SimpleNamespace(denoiser=GaussianDenoiser(M, S, RectifiedFlow()), encode=None)
    student = FewStepStudent(affine(RectifiedFlow()), latent_shape=SHAPE)
    with pytest.raises(DistillationConfigError, match="needs data"):
        ProgressiveTrainer(teacher, student, None, settings())
    with pytest.raises(DistillationConfigError, match="adapter_rank = 4"):
        ProgressiveTrainer(teacher, copy.deepcopy(student), (randn(2, *SHAPE), None), settings(adapter_rank=4))
