"""Temporal terms in latent space: match a target's frame differences, never shrink them.

Minimising the difference of neighbouring frames itself rewards a still video. Both terms here vanish when the student
moves like its target: for consistency distillation the target is the EMA network (as in DCM, arXiv 2506.03123), for
VSD it is the difference of the score difference. In causal VAEs (Wan, CogVideoX, HunyuanVideo) latent frame 0 holds one
pixel frame and the others four, so the difference 0 -> 1 is masked there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distillation.errors import NoiseError


def frame_differences(latents: Tensor, *, mask_first: bool = False) -> Tensor:
    """Return the differences of neighbouring latent frames.

    Args:
        latents: [B, C, F, H, W].
        mask_first: leave out the difference of frames 0 and 1 (causal VAEs).

    Returns:
        [B, C, F - 1, H, W], or F - 2 with the first one masked.

    Raises:
        NoiseError: no difference is left.
    """
    needed = 3 if mask_first else 2
    if latents.ndim != 5 or latents.shape[2] < needed:
        raise NoiseError(
            f"a temporal term takes latents [B, C, F, H, W] with F >= {needed}; got {list(latents.shape)}: "
            "use more frames, or temporal_weight = 0"
        )
    differences = latents.diff(dim=2)
    return differences[:, :, 1:] if mask_first else differences


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
    moved = frame_differences(x, mask_first=mask_first)
    target = (moved - frame_differences(gradient, mask_first=mask_first)).detach()
    return 0.5 * torch.mean((moved - target) ** 2)
