"""Temporal terms in latent space: match a target's motion, never shrink it.

Minimising the difference of neighbouring frames itself rewards a still video. Every term here vanishes when the student
moves like its target. For consistency distillation the target is the EMA network's prediction (as in DCM, arXiv
2506.03123); for VSD it is :func:`distillation.vsd.vsd_target`, the samples one step against the score difference. Soft
matching is in :mod:`distillation.correspondence`. In causal VAEs (Wan, CogVideoX, HunyuanVideo) latent frame 0 holds
one pixel frame and the others four, so the pair (0, 1) is masked there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from distillation.errors import NoiseError
from distillation.schedule import working_dtype
from distillation.vsd import vsd_target

Features = Callable[[Tensor], Tensor]


def neighbouring_frames(values: Tensor, *, mask_first: bool = False, dim: int = 2) -> tuple[Tensor, Tensor]:
    """Return the frames i and the frames i + 1, for every pair of neighbours.

    Args:
        values: [B, C, F, H, W], or any tensor with frames along ``dim``.
        mask_first: leave out the pair of frames 0 and 1 (causal VAEs).
        dim: the dimension of the frames.

    Returns:
        Two views like ``values`` with F - 1 frames, or F - 2 with the first pair masked.

    Raises:
        NoiseError: no pair is left.
    """
    needed, frames = (3 if mask_first else 2), values.shape[dim]
    if frames < needed:
        raise NoiseError(
            f"a temporal term takes F >= {needed} latent frames; got {frames} in {list(values.shape)}: use more "
            "frames, or temporal_weight = 0"
        )
    start = 1 if mask_first else 0
    return values.narrow(dim, start, frames - 1 - start), values.narrow(dim, start + 1, frames - 1 - start)


def frame_differences(latents: Tensor, *, mask_first: bool = False) -> Tensor:
    """Return the differences of neighbouring latent frames.

    Args:
        latents: [B, C, F, H, W].
        mask_first: leave out the difference of frames 0 and 1 (causal VAEs).

    Returns:
        [B, C, F - 1, H, W], or F - 2 with the first one masked.

    Raises:
        NoiseError: the latents have another rank, or no difference is left.
    """
    check_rank(latents)
    earlier, later = neighbouring_frames(latents, mask_first=mask_first)
    return later - earlier


def check_rank(latents: Tensor) -> None:
    """Check that latents are [B, C, F, H, W].

    Raises:
        NoiseError: they are not.
    """
    if latents.ndim != 5:
        raise NoiseError(f"a temporal term takes latents [B, C, F, H, W]; got {list(latents.shape)}")


def temporal_consistency_loss(prediction: Tensor, target: Tensor, *, mask_first: bool = False) -> Tensor:
    """Return the mean squared error of the frame differences; the target gets no gradient.

    Args:
        prediction: f_theta(x_t, t), [B, C, F, H, W].
        target: f_ema(x_s, s), likewise.
        mask_first: see :func:`frame_differences`.
    """
    moved = frame_differences(prediction, mask_first=mask_first)
    return torch.mean((moved - frame_differences(target.detach(), mask_first=mask_first)) ** 2)


def temporal_vsd_loss(x: Tensor, gradient: Tensor, *, mask_first: bool = False) -> Tensor:
    """Return ``0.5 mean |dx - stopgrad(dx - dg)|^2``; its gradient is zero where the frame difference of g is.

    Args:
        x: the student's latents [B, C, F, H, W], carrying the gradient.
        gradient: g of :func:`distillation.vsd.vsd_gradient`, likewise.
        mask_first: see :func:`frame_differences`.
    """
    return 0.5 * temporal_consistency_loss(x, vsd_target(x, gradient), mask_first=mask_first)


def frame_similarities(features: Tensor, *, mask_first: bool = False) -> Tensor:
    """Return the cosines of each token's features in neighbouring frames, in [-1, 1].

    Args:
        features: [B, F, N, D], N tokens per frame; see :class:`distillation.features.BlockFeatures`.
        mask_first: leave out the pair of frames 0 and 1 (causal VAEs).

    Returns:
        [B, F - 1, N], or F - 2 with the first pair masked; float32 or float64.

    Raises:
        NoiseError: the features have another rank, or no pair is left.
    """
    if features.ndim != 4:
        raise NoiseError(f"features are [B, F, N, D], tokens of each frame; got {list(features.shape)}")
    earlier, later = neighbouring_frames(features.to(working_dtype(features)), mask_first=mask_first, dim=1)
    return functional.cosine_similarity(earlier, later, dim=-1)


def feature_similarity_loss(
    prediction: Tensor, target: Tensor, features: Features, *, mask_first: bool = False
) -> Tensor:
    """Return the mean squared error of the frame similarities; zero where features change as much as the target's.

    The similarity itself is neither raised nor lowered: a still video has the cosine 1 everywhere, which costs what the
    target's motion takes away from 1.

    Args:
        prediction: latents that carry the gradient [B, C, F, H, W]: f_theta(x_t, t) in CD, x in VSD.
        target: likewise, without gradient: f_ema(x_s, s) in CD, :func:`~distillation.vsd.vsd_target` in VSD.
        features: latents -> [B, F, N, D], differentiable; an early block of the frozen teacher
            (:class:`distillation.features.BlockFeatures`), or any other function.
        mask_first: see :func:`frame_similarities`.

    Raises:
        NoiseError: the features have another rank, or no pair is left.
    """
    with torch.no_grad():
        wanted = frame_similarities(features(target), mask_first=mask_first)
    return torch.mean((frame_similarities(features(prediction), mask_first=mask_first) - wanted) ** 2)
