"""What a stage adds to VSD and CD: the temporal terms of its settings, and DMD2's discriminator with its two losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distillation.adversarial import AdversarialHead, approximate_r1, discriminator_loss, generator_loss
from distillation.config import DistillationConfig
from distillation.correspondence import correspondence_loss
from distillation.features import BlockFeatures
from distillation.schedule import add_noise, working_dtype
from distillation.temporal import feature_similarity_loss, temporal_consistency_loss, temporal_vsd_loss
from distillation.vsd import vsd_target
from latent_rewards.training.loop import Logs

_NEARLY_CLEAN = 0.02  # VSD's smallest time: where a network reads latents that are not noised


class TemporalTerms:
    """The weighted temporal terms of the settings; those of weight 0 are not computed.

    Args:
        config: ``temporal_weight``, ``feature_weight``, ``feature_block``, ``correspondence_weight`` and
            ``causal_first_frame`` are read.
        teacher: its block gives the features; frozen.

    Raises:
        DistillationConfigError: ``feature_weight`` is positive and the teacher has no such block.
    """

    def __init__(self, config: DistillationConfig, teacher: nn.Module) -> None:
        self.config = config
        self._features = BlockFeatures(teacher, config.feature_block) if config.feature_weight else None

    def of_vsd(
        self,
        x: Tensor,
        gradient: Tensor,
        difference: Tensor,
        condition: Any,  # noqa: ANN401 - any Condition
        logs: Logs,
    ) -> Tensor:
        """Return the terms of VSD, a scalar, and log their sum of each kind.

        Args:
            x: the student's samples [B, C, F, H, W], with their gradient.
            gradient: g, which moves x backwards; see :func:`~distillation.vsd.vsd_gradient`.
            difference: the same before its normaliser: x less it is what the samples should have been.
            condition: of length B, or None.
            logs: receives "temporal_loss", "feature_loss" and "correspondence_loss".
        """
        terms = {}
        if self.config.temporal_weight:
            terms["temporal"] = temporal_vsd_loss(x, gradient, mask_first=self.config.causal_first_frame)
        return self._weighted({**terms, **self._motion(x, vsd_target(x, difference), condition)}, x, logs)

    def of_cd(
        self,
        prediction: Tensor,
        aim: Tensor,
        condition: Any,  # noqa: ANN401 - any Condition
        logs: Logs,
    ) -> Tensor:
        """Return the terms of CD, a scalar, and log them; see :meth:`of_vsd`.

        Args:
            prediction: f_theta(x_t, t), [B, C, F, H, W].
            aim: f_ema(x_s, s), likewise.
            condition: of length B, or None.
            logs: see :meth:`of_vsd`; what VSD put there is added to.
        """
        terms = {}
        if self.config.temporal_weight:
            terms["temporal"] = temporal_consistency_loss(prediction, aim, mask_first=self.config.causal_first_frame)
        return self._weighted({**terms, **self._motion(prediction, aim, condition)}, prediction, logs)

    def _motion(self, prediction: Tensor, target: Tensor, condition: Any) -> dict[str, Tensor]:  # noqa: ANN401
        masked = self.config.causal_first_frame
        terms = {}
        if self._features is not None:
            block = self._features

            def features(latents: Tensor) -> Tensor:
                return block(latents, latents.new_full((len(latents),), _NEARLY_CLEAN), condition)

            terms["feature"] = feature_similarity_loss(prediction, target, features, mask_first=masked)
        if self.config.correspondence_weight:
            terms["correspondence"] = correspondence_loss(prediction, target, mask_first=masked)
        return terms

    def _weighted(self, terms: dict[str, Tensor], like: Tensor, logs: Logs) -> Tensor:
        total = like.new_zeros((), dtype=working_dtype(like))
        for name, term in terms.items():
            logs[f"{name}_loss"] = logs.get(f"{name}_loss", 0.0) + term.detach()
            total = total + getattr(self.config, f"{name}_weight") * term
        return total


class Discriminator:
    """DMD2's discriminator: a head on a block of the fake score, which is trained with it.

    Args:
        fake_score: a denoiser of a diffusers transformer.
        block: see :class:`~distillation.features.BlockFeatures`.
        seed: of the head's first weights.
        r1_weight: of the approximate R1 penalty in the discriminator's loss; 0 is none.
        r1_sigma: standard deviation of its perturbation.

    Raises:
        DistillationConfigError: the fake score has no such block.
    """

    def __init__(
        self, fake_score: nn.Module, block: int, *, seed: int, r1_weight: float = 0.0, r1_sigma: float = 0.01
    ) -> None:
        self.fake_score, self.features = fake_score, BlockFeatures(fake_score, block)
        self.r1_weight, self.r1_sigma = r1_weight, r1_sigma
        parameter = next(fake_score.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = AdversarialHead(self.features.dim)
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        self.head = head.to(device=parameter.device, dtype=wide)

    def loss(
        self,
        real: Tensor,
        samples: Tensor,
        condition: Any,  # noqa: ANN401 - any Condition
        t: Tensor,
        real_noise: Tensor,
        noise: Tensor,
        perturbation: Tensor | None = None,
    ) -> Tensor:
        """Return the discriminator's loss, for the head and the fake score.

        Its R1 penalty is at what the discriminator reads of the data, x_t, so it weighs alike at all t.

        Args:
            real: data [B, C, F, H, W].
            samples: the student's, detached, likewise.
            condition: of length B, of both.
            t: [B].
            real_noise: standard normal, like ``real``.
            noise: likewise, of the samples.
            perturbation: likewise, of the penalty; without one there is none.
        """
        x_t = self._noised(real, t, real_noise)
        real_logits = self._logits(x_t, condition, t)
        loss = discriminator_loss(real_logits, self._logits(self._noised(samples.detach(), t, noise), condition, t))
        if perturbation is None:
            return loss
        perturbed = self._logits(x_t + self.r1_sigma * perturbation, condition, t)
        return loss + self.r1_weight * approximate_r1(real_logits, perturbed, self.r1_sigma)

    def students_loss(
        self,
        x: Tensor,
        condition: Any,  # noqa: ANN401 - any Condition
        t: Tensor,
        noise: Tensor,
    ) -> Tensor:
        """Return the loss of the student's samples x.

        Its backward pass leaves gradients in the head and the fake score too, which are the caller's to clear: freezing
        them for the forward pass alone would confuse activation checkpointing.
        """
        return generator_loss(self._logits(self._noised(x, t, noise), condition, t))

    def _noised(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        schedule: Any = self.fake_score.schedule
        return add_noise(schedule, latents, noise, t)

    def _logits(self, x_t: Tensor, condition: Any, t: Tensor) -> Tensor:  # noqa: ANN401
        logits: Tensor = self.head(self.features(x_t, t, condition))
        return logits
