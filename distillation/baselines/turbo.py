"""T2V-Turbo: consistency distillation with rewards on decoded frames (Li et al. 2024, arXiv 2405.18750, eq. 11).

    L = L_CD - image_weight mean R_image(frames of D(f(x_t, t))) - video_weight mean R_video(D(f(x_t, t)))

The rewards are differentiable and read pixels, so their gradient goes through the decoder: the cost that a reward
learned on latents avoids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from distillation.config import DistillationConfig
from distillation.data import Batch
from distillation.errors import DistillationConfigError
from distillation.stage import Setup, TeacherModel, prepare
from distillation.student import FewStepStudent
from distillation.trainer import DistillationResult, DistillationStage
from latent_rewards.training.loop import Logs

PixelReward = Callable[[Tensor, Sequence[Any]], Tensor]
"""Videos [B, T, 3, H, W] in [0, 1] and their prompts -> [B], differentiable in the videos; higher is better."""


class Decoder(Protocol):
    """Latents -> videos."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return videos [B, T, 3, H, W] in [0, 1] of latents [B, C, F, H', W'], differentiably."""
        ...


@dataclass
class TurboConfig(DistillationConfig):
    """Settings of :class:`TurboTrainer`; ``vsd_steps`` and ``schedule`` are not read.

    Attributes:
        image_weight: of the reward of single frames.
        video_weight: of the reward of whole clips.
        image_frames: frames of each clip the former sees, drawn at random.
        decoded_frames: latent frames that are decoded, from the first; None decodes all. The graph of every decoded
            frame is kept, so this and the next are what decides the memory.
        decoded_samples: samples of a process's share of the batch that are decoded; None decodes all.

    Raises:
        DistillationConfigError: a value is out of range.
    """

    image_weight: float = 1.0
    video_weight: float = 1.0
    image_frames: int = 2
    decoded_frames: int | None = None
    decoded_samples: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("image_weight", "video_weight"):
            if not getattr(self, name) >= 0:
                raise DistillationConfigError(f"{name} must not be negative; got {getattr(self, name)}")
        for name in ("image_frames", "decoded_frames", "decoded_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise DistillationConfigError(f"{name} must be at least 1; got {getattr(self, name)}")

    @property
    def stages(self) -> dict[str, int]:
        """CD alone."""
        return {"cd": self.cd_steps} if self.cd_steps else {}


class TurboTrainer:
    """Trains a few-step student by CD and pixel rewards.

    Args:
        teacher: has ``denoiser`` and ``encode``.
        student: see :class:`~distillation.trainer.DistillationTrainer`.
        prompts_or_latents: prompts, or (latents, prompts); prompts as texts or mappings, which the rewards read.
        decoder: e.g. ``teacher.codec``.
        image_reward: of single frames, which come as clips of one frame; None leaves the term out.
        video_reward: of clips; likewise.
        config: see :class:`TurboConfig`.

    Raises:
        DistillationConfigError: there is no reward, or the prompts are conditions, which a reward cannot read; or see
            :class:`~distillation.trainer.DistillationTrainer`.
    """

    def __init__(
        self,
        teacher: TeacherModel,
        student: FewStepStudent,
        prompts_or_latents: Any,  # noqa: ANN401 - see above
        *,
        decoder: Decoder,
        image_reward: PixelReward | None = None,
        video_reward: PixelReward | None = None,
        config: TurboConfig | None = None,
    ) -> None:
        if image_reward is None and video_reward is None:
            raise DistillationConfigError(
                "T2V-Turbo needs image_reward or video_reward; for CD alone use DistillationTrainer with vsd_steps = 0"
            )
        self.config = config or TurboConfig()
        self.setup = prepare(teacher, student, prompts_or_latents, self.config)
        if self.setup.data.prompts is None:
            raise DistillationConfigError("the rewards read prompts; pass texts or mappings, not a condition")
        self._rewards = _Rewards(self.config, decoder, image_reward, video_reward)

    def train(self) -> DistillationResult:
        """Train, continuing from what ``output_dir`` holds; the history also has "image_reward" and "video_reward"."""
        stage = _TurboStage(self.setup, "cd", self.config.cd_steps, self._rewards)
        return DistillationResult(self.setup.student, {"cd": stage.run()})


@dataclass(frozen=True)
class _Rewards:
    """What the decoded predictions are rewarded for."""

    config: TurboConfig
    decoder: Decoder
    image: PixelReward | None
    video: PixelReward | None

    def terms(self, latents: Tensor, prompts: Sequence[Any], uniform: Tensor) -> dict[str, tuple[float, Tensor]]:
        """Return weight and mean of each reward by name.

        Args:
            latents: predictions [B, C, F, H, W], with their gradient.
            prompts: B of them.
            uniform: numbers in [0, 1) that choose the frames, [B].
        """
        config = self.config
        prompts, uniform = prompts[: config.decoded_samples], uniform[: config.decoded_samples]
        shown = latents[: config.decoded_samples, :, : config.decoded_frames]
        with torch.autocast(latents.device.type, enabled=False):  # decoders keep their own precision
            videos = self.decoder.decode(shown)
        found: dict[str, tuple[float, Tensor]] = {}
        if self.video is not None:
            found["video_reward"] = config.video_weight, self.video(videos, prompts).mean()
        if self.image is not None:
            count = min(config.image_frames, videos.shape[1])
            # Evenly spaced from a random start: each frame is as likely as any other.
            first = (uniform.to(videos.device) * videos.shape[1]).long()
            steps = torch.arange(count, device=videos.device) * videos.shape[1] // count
            chosen = (first[:, None] + steps) % videos.shape[1]
            frames = videos[torch.arange(len(videos), device=videos.device)[:, None], chosen]
            repeated = [prompt for prompt in prompts for _ in range(count)]
            found["image_reward"] = config.image_weight, self.image(frames.flatten(0, 1)[:, None], repeated).mean()
        return found


class _TurboStage(DistillationStage):
    """CD whose prediction is also decoded and rewarded."""

    def __init__(self, setup: Setup, name: str, num_steps: int, rewards: _Rewards) -> None:
        super().__init__(setup, name, num_steps, ("cd",))
        self.rewards = rewards

    def cd_loss(self, step: int, prediction: Tensor, aim: Tensor, batch: Batch, logs: Logs) -> Tensor:
        """Return the CD loss less the weighted rewards of the prediction."""
        loss = super().cd_loss(step, prediction, aim, batch, logs)
        assert batch.prompts is not None  # noqa: S101 - for the type checker; the trainer refuses others
        chosen = self.draw_uniform(step, "frames")
        for name, (weight, reward) in self.rewards.terms(prediction, batch.prompts, chosen).items():
            logs[name] = reward.detach()
            loss = loss - weight * reward
        return loss
