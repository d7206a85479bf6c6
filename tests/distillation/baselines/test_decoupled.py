from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distillation.baselines import decoupled as module
from distillation.baselines.decoupled import DecoupledConfig, DecoupledTrainer
from distillation.denoiser import Denoiser, GaussianDenoiser, Prediction
from distillation.errors import DistillationConfigError, NoiseError
from distillation.schedule import RectifiedFlow
from distillation.student import FewStepStudent

SHAPE = (1, 4, 2, 2)


class FramesAndMotion(Denoiser):
    """x0 = gain x_t + shift, and from the frames' mean an own share: the only part that mixes frames."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule
        self.frames = nn.ParameterDict({name: torch.tensor(0.1, dtype=torch.float64) for name in ("gain", "shift")})
        self.motion = nn.ParameterDict({"share": torch.tensor(0.1, dtype=torch.float64)})
        self.seen = []

    def forward(self, x_t, t, condition=None):
        self.seen.append((x_t.shape[2], torch.is_grad_enabled()))
        x0 = self.frames["gain"] * x_t + self.frames["shift"] + self.motion["share"] * x_t.mean(dim=2, keepdim=True)
        return Prediction(x_t, t, self.schedule, x0=x0)


def settings(**changes):
    base = {
        "image_steps": 3,
        "cd_steps": 3,
        "batch_size": 4,
        "guidance_scale": 1.0,
        "learning_rate": 0.01,
        "num_timesteps": 10,
        "ema_decay": 0.5,
        "temporal_weight": 0.5,
        "temporal_parameters": ["motion."],
        "progress": False,
        "device": "cpu",
    }
    return DecoupledConfig(**(base | changes))


def build():
    schedule = RectifiedFlow()
    teacher = SimpleNamespace(denoiser=GaussianDenoiser(0.3, 0.7, schedule), encode=None)
    return teacher, FewStepStudent(FramesAndMotion(schedule), latent_shape=SHAPE)


@pytest.mark.parametrize("with_data", [True, False])
def test_frames_first_and_then_clips_with_what_mixes_frames_alone(randn, monkeypatch, with_data):
    between = {}
    original = module.DistillationStage.run

    def recorded(self):
        history = original(self)
        between[self.name] = {name: value.detach().clone() for name, value in self.student.named_parameters()}
        return history

    monkeypatch.setattr(module.DistillationStage, "run", recorded)
    teacher, student = build()
    start = {name: value.detach().clone() for name, value in student.named_parameters()}
    data = (randn(8, *SHAPE), None) if with_data else None
    result = DecoupledTrainer(teacher, student, data, settings()).train()
    assert {name: len(entries) for name, entries in result.history.items()} == {"image_cd": 3, "clip_cd": 3}
    assert "temporal_loss" not in result.history["image_cd"][0] and "temporal_loss" in result.history["clip_cd"][0]
    assert all(not torch.equal(start[name], value) for name, value in between["image_cd"].items())
    for name, value in between["clip_cd"].items():
        assert torch.equal(value, between["image_cd"][name]) is ("motion" not in name), name
    assert all(parameter.requires_grad for parameter in student.parameters())
    lengths = [length for length, with_gradient in student.denoiser.seen if with_gradient]
    assert lengths == [1] * 3 + [4] * 3


@pytest.mark.parametrize("causal", [True, False])
def test_an_image_is_the_first_frame_of_a_causal_latent_and_any_of_another(randn, monkeypatch, causal):
    data, seen = randn(8, *SHAPE), []
    original = module._ImageStage.draw_batch

    def recorded(self, step, role):
        batch = original(self, step, role)
        seen.append(batch.latents)
        return batch

    monkeypatch.setattr(module._ImageStage, "draw_batch", recorded)
    teacher, student = build()
    config = settings(image_steps=20, causal_first_frame=causal, temporal_weight=0.0)
    DecoupledTrainer(teacher, student, (data, None), config).train()
    rows = torch.cat(seen)
    assert rows.shape == (80, 1, 1, 2, 2)
    frames = {
        int(frame)
        for row in rows
        for frame in (data[:, :, :, None] == row[:, :, None]).all(dim=(1, 3, 4, 5)).nonzero()[:, 1]
    }
    assert frames == ({0} if causal else {0, 1, 2, 3})


def test_what_cannot_be_divided_is_refused():
    teacher, student = build()
    with pytest.raises(
        DistillationConfigError,
        match=r"one of \['.attn1.'\] in its name; it has frames.gain, frames.shift, motion.share",
    ):
        DecoupledTrainer(teacher, student, None, settings(temporal_parameters=[".attn1."]))
    with pytest.raises(DistillationConfigError, match="adapter_rank = 2"):
        DecoupledTrainer(teacher, student, None, settings(adapter_rank=2))
    with pytest.raises(DistillationConfigError, match="image_steps must be at least 1"):
        settings(image_steps=0)
    with pytest.raises(DistillationConfigError, match="nothing to train"):
        settings(cd_steps=0)


def test_what_only_the_clips_need_is_checked_before_the_images(randn):
    teacher, student = build()
    with pytest.raises(NoiseError, match="F >= 2 latent frames; got 1"):
        DecoupledTrainer(teacher, student, (randn(8, 1, 1, 2, 2), None), settings())
    with pytest.raises(DistillationConfigError, match="blocks"):
        DecoupledTrainer(teacher, student, None, settings(feature_weight=1.0))
    student.denoiser.motion.requires_grad_(False)
    with pytest.raises(DistillationConfigError, match=r"'motion.'\] in their names are frozen, and others are not"):
        DecoupledTrainer(teacher, student, None, settings())
    student.denoiser.requires_grad_(False)
    DecoupledTrainer(teacher, student, None, settings(image_steps=1, cd_steps=1)).train()
