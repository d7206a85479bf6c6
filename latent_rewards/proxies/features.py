"""Plain features of latents: what the ridge regression and the out-of-distribution score look at."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from latent_rewards.proxies.text import mean_token

MAX_LINEAR_FEATURES = 2**15
"""Latents with more values than this are average-pooled over positions before a ridge regression sees them."""


def linear_features(latents: Tensor, prompt_features: Tensor | None) -> Tensor:
    """Return ``[B, D]``: the flattened (if large, pooled) latents ``[B, C, F, H, W]`` beside the prompt features.

    Prompt features of several tokens ``[B, L, P]`` are averaged.
    """
    if prompt_features is not None and prompt_features.ndim == 3:
        prompt_features = mean_token(prompt_features)
    _, channels, frames, height, width = latents.shape
    excess = channels * frames * height * width / MAX_LINEAR_FEATURES
    if excess > 1:
        rows, columns = (max(1, int(side / excess**0.5)) for side in (height, width))
        latents = functional.adaptive_avg_pool3d(latents, (frames, rows, columns))
    flat = latents.flatten(1)
    return flat if prompt_features is None else torch.cat([flat, prompt_features.to(flat.dtype)], dim=1)


def latent_statistics(latents: Tensor) -> Tensor:
    """Return ``[B, 3 C]``: each channel's mean, standard deviation, and RMS difference of neighbouring frames."""
    mean = latents.mean(dim=(2, 3, 4))
    # Tensor.std adds up one number at a time.
    spread = _root_mean_square(latents - mean[..., None, None, None])
    change = torch.zeros_like(spread) if latents.shape[2] < 2 else _root_mean_square(latents.diff(dim=2))
    return torch.cat([mean, spread, change], dim=1)


def _root_mean_square(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    return torch.linalg.vector_norm(flat, dim=2) / flat.shape[2] ** 0.5
