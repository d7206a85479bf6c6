"""CD decoupled into images and motion, after AnimateLCM (Wang et al. 2024, arXiv 2402.00769).

Single frames are distilled first, with all weights; clips after them, with only those weights that mix frames, so that
what the images taught is kept. AnimateLCM's network has motion layers for that. In a transformer with joint attention
over space and time, as Wan's, the self-attention is what mixes frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from distillation.config import DistillationConfig
from distillation.data import Batch
from distillation.errors import DistillationConfigError
from distillation.stage import TeacherModel, prepare
from distillation.student import FewStepStudent
from distillation.terms import TemporalTerms
from distillation.trainer import DistillationResult, DistillationStage


@dataclass
class DecoupledConfig(DistillationConfig):
    """Settings of :class:`DecoupledTrainer`; ``vsd_steps`` and ``schedule`` are not read, ``cd_steps`` are of clips.

    Attributes:
        image_steps: student updates on single frames.
        temporal_parameters: parts of the names of the parameters that mix frames.

    Raises:
        DistillationConfigError: a value is out of range.
    """

    image_steps: int = 500
    temporal_parameters: list[str] = field(default_factory=lambda: [".attn1."])

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if self.image_steps < 1:
            raise DistillationConfigError(f"image_steps must be at least 1; got {self.image_steps}")

    @property
    def stages(self) -> dict[str, int]:
        """Images, then clips."""
        return {"image_cd": self.image_steps, "clip_cd": self.cd_steps} if self.cd_steps else {}


class DecoupledTrainer:
    """Trains a few-step student on frames, then on clips.

    Args:
        teacher: has ``denoiser`` and ``encode``; it must take latents of one frame.
        student: see :class:`~distillation.trainer.DistillationTrainer`.
        prompts_or_latents: prompts, or (latents, prompts).
        config: see :class:`DecoupledConfig`.

    Raises:
        DistillationConfigError: no parameter of the student is called like ``temporal_parameters``, or none of those is
            trained, or ``adapter_rank`` is set; or see :class:`~distillation.trainer.DistillationTrainer`.
    """

    def __init__(
        self,
        teacher: TeacherModel,
        student: FewStepStudent,
        prompts_or_latents: Any,  # noqa: ANN401 - see above
        config: DecoupledConfig | None = None,
    ) -> None:
        self.config = config or DecoupledConfig()
        if self.config.adapter_rank is not None:
            raise DistillationConfigError(
                f"adapter_rank = {self.config.adapter_rank}: the stages divide the network's weights; set it to None"
            )
        self.setup = prepare(teacher, student, prompts_or_latents, self.config)
        self._check_temporal_parameters()
        # Needed in the second stage, and refused before the first.
        TemporalTerms(self.config, self.setup.roles.teacher)

    def _check_temporal_parameters(self) -> None:
        denoiser, parts = self.setup.student.denoiser, self.config.temporal_parameters
        named = dict(denoiser.named_parameters())
        mixing = [name for name in named if any(part in name for part in parts)]
        if not mixing:
            raise DistillationConfigError(
                f"no parameter of the student has one of {parts} in its name; it has "
                f"{', '.join([*named][:6])} ...: set temporal_parameters to those that mix frames"
            )
        asking = [name for name, parameter in named.items() if parameter.requires_grad]
        if asking and not set(asking) & set(mixing):
            raise DistillationConfigError(
                f"the parameters with one of {parts} in their names are frozen, and others are not: clips have "
                "nothing to train; call requires_grad_(True) on those that mix frames"
            )

    def train(self) -> DistillationResult:
        """Run both stages, continuing from what ``output_dir`` holds of them."""
        channels, _, height, width = self.setup.latent_shape
        config = replace(self.config, temporal_weight=0.0, feature_weight=0.0, correspondence_weight=0.0)
        images = replace(self.setup, config=config, latent_shape=(channels, 1, height, width))
        stages = self.config.stages
        history = {"image_cd": _ImageStage(images, "image_cd", stages["image_cd"], ("cd",)).run()}
        with _only(self.setup.student, self.config.temporal_parameters):
            history["clip_cd"] = DistillationStage(self.setup, "clip_cd", stages["clip_cd"], ("cd",)).run()
        return DistillationResult(self.setup.student, history)


class _ImageStage(DistillationStage):
    """CD of single frames."""

    def draw_batch(self, step: int, role: str) -> Batch:
        """Return rows of the data and one frame of each; where the VAE is causal the first, the only image."""
        batch = super().draw_batch(step, role)
        if batch.latents is None:
            return batch
        latents = batch.latents
        frame = torch.zeros(len(latents), dtype=torch.long)
        if not self.config.causal_first_frame:
            frame = (self.draw_uniform(step, f"{role}/frame") * latents.shape[2]).long()
        chosen: Tensor = latents[torch.arange(len(latents)), :, frame.to(latents.device)]
        return replace(batch, latents=chosen[:, :, None])


@contextmanager
def _only(student: nn.Module, parts: list[str]) -> Iterator[None]:
    """Train nothing in the block but the parameters with one of ``parts`` in their names."""
    trained = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    try:
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(trained[name] and any(part in name for part in parts))
        yield
    finally:
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(trained[name])
