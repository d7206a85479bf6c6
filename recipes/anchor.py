"""The VSD anchor that holds a student during reward optimisation, warmed up on the student's samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import distillation as ds
from distillation.families import Teacher
from distillation.vsd import VSDAnchor
from latent_rewards.training.activations import checkpoint_activations
from latent_rewards.training.randomness import sample_noise
from latent_rewards.training.ranks import current_ranks
from latent_rewards.training.settings import SettingsError


@dataclass
class AnchorConfig:
    """How the anchor learns.

    Attributes:
        learning_rate: of its fake score.
        fake_updates: fake score updates per policy update.
        warmup: fake score updates before the first policy update, since it starts as a copy of the teacher.
    """

    learning_rate: float = 2e-4
    fake_updates: int = 1
    warmup: int = 50

    def __post_init__(self) -> None:
        """Check types and ranges.

        Raises:
            SettingsError: a value is no number, or out of range.
        """
        if not isinstance(self.learning_rate, int | float) or not 0 < self.learning_rate < math.inf:
            raise SettingsError(f"learning_rate must be a positive number; got {self.learning_rate!r}")
        for name, least in (("fake_updates", 1), ("warmup", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise SettingsError(f"{name} must be a whole number, at least {least}; got {value!r}")


def warm_anchor(
    teacher: Teacher,
    student: ds.FewStepStudent,
    prompts: Sequence[str],
    config: AnchorConfig,
    distilled: ds.DistillationConfig,
    *,
    num_steps: int,
    batch_size: int,
    seed: int,
    device: torch.device | str,
) -> VSDAnchor:
    """Return a VSD anchor whose fake score has seen the student's samples; the ranks of a launch share the work.

    Args:
        teacher: what the student was distilled from.
        student: is sampled, not changed.
        prompts: of the samples, one after the other and again.
        config: see :class:`AnchorConfig`.
        distilled: whose guidance, shift of times and activation checkpoints the anchor takes.
        num_steps: sampling steps.
        batch_size: samples per warm-up update; more where that gives each rank as many, and at least one.
        seed: root of all randomness.
        device: torch device of all networks.
    """
    anchor = VSDAnchor(
        teacher.denoiser,
        copy.deepcopy(teacher.denoiser),
        guidance_scale=distilled.guidance_scale,
        refine_guidance_scale=distilled.refine_guidance_scale,
        guidance_start=distilled.guidance_start,
        time_shift=distilled.time_shift,
        encode=teacher.encode,
        learning_rate=config.learning_rate,
        fake_updates=config.fake_updates,
        seed=seed,
    )
    if distilled.gradient_checkpointing:
        checkpoint_activations(anchor.fake_score)
    ranks = current_ranks()
    batch_size = -(-batch_size // ranks.count) * ranks.count  # gradients are averaged, so no share is smaller or empty
    share = ranks.part(batch_size)
    for step in range(config.warmup):
        texts = [prompts[(step * batch_size + row) % len(prompts)] for row in share]
        stack = [
            sample_noise(seed, f"warmup/{k}", step, share, teacher.latent_shape, device=device)
            for k in range(num_steps)
        ]
        anchor.observe(student, student.encode(texts).to(device), torch.stack(stack))
        anchor.after_step()
    return anchor
