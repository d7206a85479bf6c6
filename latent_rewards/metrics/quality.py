"""Quality of single frames and of their brightness over time, from pixels alone.

Every metric here can be won by a clip nobody wants: a still or grey one never flickers, a grey one is well exposed, and
noise is the sharpest and most colourful of all. Use them as guards, or in a composite, not as the only reward.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from latent_rewards.contracts import DataError
from latent_rewards.metrics.metric import require
from latent_rewards.metrics.registry import register_metric

LUMA = (0.299, 0.587, 0.114)
"""Weights of R, G and B in luma (ITU-R BT.601)."""


def luma(videos: Tensor) -> Tensor:
    """``[..., C, H, W]`` -> brightness ``[..., H, W]``; a single channel is taken as it is."""
    if videos.shape[-3] == 1:
        return videos.squeeze(-3)
    weights = torch.tensor(LUMA, dtype=videos.dtype, device=videos.device)
    return (videos * weights[:, None, None]).sum(dim=-3)


@register_metric(
    "quality.temporal_flickering",
    version="1",
    value_range=(0, 1),
    minimum_frames=2,
    differentiable=True,
    cheats=("still", "grey"),
)
def temporal_flickering(videos: Tensor) -> Tensor:
    """VBench's temporal flickering: (255 - mean |frame difference|)/255 on the 0 to 255 scale; 1 is a still clip.

    VBench (Huang et al., arXiv 2311.17982) applies it to clips that ought to be static; frames here are not rounded to
    8 bits first.
    """
    return 1 - videos.diff(dim=1).abs().flatten(1).mean(dim=1)


@register_metric("quality.sharpness", version="1", value_range=(0, 1020.0**2), differentiable=True, cheats=("noise",))
def sharpness(videos: Tensor) -> Tensor:
    """Variance of the Laplacian of luma on the 0 to 255 scale, mean over frames (Pech-Pacheco et al. 2000).

    The four-neighbour Laplacian lies in [-1020, 1020], which bounds the variance by 1020 squared; the border is left
    out. Noise scores far above any real clip, and a blank one 0.

    Raises:
        DataError: frames are smaller than 3 x 3.
    """
    if min(videos.shape[-2:]) < 3:
        raise DataError(f"sharpness needs frames of at least 3 x 3 pixels; got {tuple(videos.shape[-2:])}")
    y = 255 * luma(videos)
    around = y[..., :-2, 1:-1] + y[..., 2:, 1:-1] + y[..., 1:-1, :-2] + y[..., 1:-1, 2:]
    laplacian = around - 4 * y[..., 1:-1, 1:-1]
    return laplacian.flatten(2).var(dim=2, correction=0).mean(dim=1)


@register_metric("quality.colourfulness", version="1", value_range=(0, 1.3 * 255 * 2**0.5), cheats=("noise",))
def colourfulness(videos: Tensor) -> Tensor:
    """Hasler and Suesstrunk's (2003) M3, mean over frames: 0 is grey, 33 moderately and 82 highly colourful.

    With the opponent axes rg = R - G and yb = (R + G)/2 - B on the 0 to 255 scale, M3 is
    sqrt(var rg + var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2). A single channel has no colour and scores 0.
    """
    if videos.shape[2] == 1:
        return videos.new_zeros(len(videos))
    red, green, blue = (255 * videos).unbind(dim=2)
    axes = torch.stack([red - green, (red + green) / 2 - blue], dim=2).flatten(3)
    spread = axes.var(dim=3, correction=0).sum(dim=2).sqrt()
    offset = axes.mean(dim=3).norm(dim=2)
    return (spread + 0.3 * offset).mean(dim=1)


@register_metric("quality.exposure", version="1", value_range=(0, 1), differentiable=True, cheats=("grey",))
def exposure(videos: Tensor, *, spread: float = 0.2) -> Tensor:
    """Well-exposedness (Mertens et al. 2007), mean over pixels and frames: 1 is mid-grey, 0 black or blown out.

    A pixel's value is the product over its channels of exp(-(c - 0.5)^2 / (2 spread^2)).
    """
    return torch.exp(-((videos - 0.5) ** 2).sum(dim=2) / (2 * spread**2)).flatten(1).mean(dim=1)


@register_metric(
    "quality.blur",
    version="1",
    value_range=(0, 1),
    higher_is_better=False,
    requires=("skimage",),
    cheats=("noise",),
)
def blur(videos: Tensor, *, window: int = 11) -> Tensor:
    """Crete et al.'s (2007) blur effect of luma, mean over frames: 0 is sharp, 1 is blurred; scikit-image's.

    It compares a frame's variations with those of a copy smoothed over ``window`` pixels, so it does not depend on
    contrast. A frame without any variation is taken as fully blurred.

    Raises:
        DataError: frames are smaller than 3 x 3.
    """
    if min(videos.shape[-2:]) < 3:
        raise DataError(f"blur needs frames of at least 3 x 3 pixels; got {tuple(videos.shape[-2:])}")
    measure = require("skimage.measure")
    y = luma(videos).detach().cpu().double().numpy()
    values = [[measure.blur_effect(frame, h_size=window) if np.ptp(frame) > 0 else 1.0 for frame in clip] for clip in y]
    return torch.tensor(values).mean(dim=1).clamp(0, 1).float()


@register_metric(
    "quality.frame_ssim",
    version="1",
    value_range=(-1, 1),
    minimum_frames=2,
    requires=("skimage",),
    cheats=("still", "grey"),
)
def frame_ssim(videos: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of the luma of neighbouring frames, mean; 1 is a still clip.

    scikit-image's, with its 7 x 7 uniform window.

    Raises:
        DataError: frames are smaller than 7 x 7.
    """
    if min(videos.shape[-2:]) < 7:
        raise DataError(f"frame_ssim needs frames of at least 7 x 7 pixels; got {tuple(videos.shape[-2:])}")
    similarity = require("skimage.metrics").structural_similarity
    y = luma(videos).detach().cpu().double().numpy()
    values = [[similarity(a, b, data_range=1.0) for a, b in zip(clip[:-1], clip[1:], strict=True)] for clip in y]
    return torch.tensor(values).mean(dim=1).clamp(-1, 1).float()
