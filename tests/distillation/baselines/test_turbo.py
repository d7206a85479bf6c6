from types import SimpleNamespace

import pytest
import torch

from distillation.baselines.turbo import TurboConfig, TurboTrainer, _Rewards
from distillation.denoiser import GaussianDenoiser
from distillation.errors import DistillationConfigError
from distillation.schedule import RectifiedFlow
from distillation.student import FewStepStudent
from distillation.trainer import DistillationTrainer
from latent_rewards.training.loop import TrainingLoop

M, S = 0.3, 0.7
SHAPE = (3, 4, 2, 2)
PROMPTS = ["one", "two", "three"]


class Frames:
    """Latent channels are colours and latent frames are frames."""

    def decode(self, latents):
        return latents.transpose(1, 2)


def settings(**changes):
    base = {
        "cd_steps": 3,
        "batch_size": 2,
        "guidance_scale": 1.0,
        "learning_rate": 0.01,
        "num_timesteps": 10,
        "ema_decay": 0.0,
        "progress": False,
        "device": "cpu",
    }
    return TurboConfig(**(base | changes))


@pytest.fixture
def world(learnable_gaussian, numbers):
    def build():
        encode = lambda prompts: numbers(torch.zeros(len(prompts)))  # noqa: E731
        teacher = SimpleNamespace(denoiser=GaussianDenoiser(M, S, RectifiedFlow()), encode=encode)
        return teacher, FewStepStudent(learnable_gaussian(RectifiedFlow(), M, S), latent_shape=SHAPE)

    return build


def mean_of_pixels(videos, prompts):
    return videos.mean(dim=(1, 2, 3, 4))


def test_rewards_see_what_they_should(randn):
    seen = []

    def image(videos, prompts):
        seen.append((videos, list(prompts)))
        return mean_of_pixels(videos, prompts)

    latents = randn(3, *SHAPE)
    rewards = _Rewards(settings(image_frames=2, image_weight=0.5), Frames(), image, mean_of_pixels)
    found = rewards.terms(latents, PROMPTS, torch.tensor([0.0, 0.3, 0.99]))
    assert found["video_reward"][0] == 1.0 and found["image_reward"][0] == 0.5
    torch.testing.assert_close(found["video_reward"][1], latents.mean(), rtol=1e-12, atol=0)
    frames, prompts = seen[0]
    assert prompts == ["one", "one", "two", "two", "three", "three"]
    wanted = [(0, 0), (0, 2), (1, 1), (1, 3), (2, 3), (2, 1)]
    assert torch.equal(frames, torch.stack([latents[row, :, frame] for row, frame in wanted])[:, None])
    few = _Rewards(settings(decoded_frames=1), Frames(), None, mean_of_pixels).terms(latents, PROMPTS, torch.zeros(3))
    torch.testing.assert_close(few["video_reward"][1], latents[:, :, 0].mean(), rtol=1e-12, atol=0)
    assert list(few) == ["video_reward"]
    seen.clear()
    one = _Rewards(settings(decoded_samples=1, image_frames=4), Frames(), image, mean_of_pixels)
    found = one.terms(latents, PROMPTS, torch.zeros(3))
    torch.testing.assert_close(found["video_reward"][1], latents[0].mean(), rtol=1e-12, atol=0)
    assert seen[0][1] == ["one"] * 4


def test_the_loss_is_that_of_cd_less_the_weighted_rewards(world, randn, monkeypatch):
    data, losses = (M + S * randn(6, *SHAPE), PROMPTS * 2), []
    original = TrainingLoop.update

    def recorded(self, name, loss):
        losses.append(float(loss.detach()))
        return original(self, name, loss)

    monkeypatch.setattr(TrainingLoop, "update", recorded)
    teacher, student = world()
    config = settings(cd_steps=1, image_weight=0.25, video_weight=2.0, image_frames=1)
    options = {"decoder": Frames(), "image_reward": mean_of_pixels, "video_reward": mean_of_pixels, "config": config}
    entry = TurboTrainer(teacher, student, data, **options).train().history["cd"][0]
    parts = entry["cd_loss"] - 0.25 * entry["image_reward"] - 2.0 * entry["video_reward"]
    assert losses == [pytest.approx(parts, rel=1e-12)]
    assert entry["image_reward"] != entry["video_reward"]
    teacher, student = world()
    alone = DistillationTrainer(teacher, student, data, settings(vsd_steps=0, cd_steps=1)).train().history["cd"][0]
    assert entry["cd_loss"] == alone["cd_loss"]


def test_a_reward_moves_the_student_towards_it(world):
    def mean(weight):
        teacher, student = world()
        config = settings(cd_steps=40, video_weight=weight)
        TurboTrainer(teacher, student, PROMPTS, decoder=Frames(), video_reward=mean_of_pixels, config=config).train()
        return float(student.denoiser.mean.detach())

    assert mean(0.0) == pytest.approx(M, abs=0.02)
    assert mean(1.0) > M + 0.1


def test_what_is_decoded_is_decoded_in_the_decoders_precision(world):
    seen = []

    class Watched(Frames):
        def decode(self, latents):
            seen.append((torch.is_autocast_enabled("cpu"), latents.dtype))
            return super().decode(latents)

    def reward(videos, prompts):
        assert torch.is_autocast_enabled("cpu"), "the settings ask for bf16"
        return mean_of_pixels(videos, prompts)

    teacher, student = world()
    config = settings(cd_steps=1, mixed_precision="bf16")
    TurboTrainer(teacher, student, PROMPTS, decoder=Watched(), video_reward=reward, config=config).train()
    assert [enabled for enabled, _ in seen] == [False] and seen[0][1] in (torch.float32, torch.float64)


def test_what_it_cannot_do_without(world, numbers):
    teacher, student = world()
    with pytest.raises(DistillationConfigError, match="image_reward or video_reward"):
        TurboTrainer(teacher, student, PROMPTS, decoder=Frames(), config=settings())
    condition = numbers(torch.zeros(2))
    with pytest.raises(DistillationConfigError, match="read prompts"):
        TurboTrainer(teacher, student, condition, decoder=Frames(), video_reward=mean_of_pixels, config=settings())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image_weight": -1.0}, "image_weight must not be negative; got -1.0"),
        ({"image_frames": 0}, "image_frames must be at least 1; got 0"),
        ({"decoded_frames": 0}, "decoded_frames must be at least 1; got 0"),
        ({"decoded_samples": 0}, "decoded_samples must be at least 1; got 0"),
        ({"cd_steps": 0}, "nothing to train"),
    ],
)
def test_settings_that_cannot_be_meant(changes, told):
    with pytest.raises(DistillationConfigError, match=told):
        settings(**changes)
