"""The conv3d trunk: a strided 3-d convolution, then residual blocks of one spatial and one temporal convolution.

The prompt enters each block by feature-wise modulation, ``h * (1 + gamma) + beta`` (Perez et al. 2018). The features
of a frame are the mean and the maximum over its positions, so any latent size is accepted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def make_stem(latent_shape: tuple[int, ...], width: int) -> nn.Conv3d:
    """Return the strided convolution that turns latents of ``(C, F, H, W)`` into ``width`` channels; F is kept.

    The spatial stride is 1, 2 or 4 for frames whose shorter side is below 6, below 32, or larger: on 8 x 8 latents
    stride 2 costs a quarter and keeps every value, since 64 channels hold a 2 x 2 patch of 16.
    """
    channels, _, height, breadth = latent_shape
    shorter = min(height, breadth)
    stride = 1 if shorter < 6 else 2 if shorter < 32 else 4
    kernel, padding = strided_kernel(stride)
    return nn.Conv3d(channels, width, (3, kernel, kernel), stride=(1, stride, stride), padding=(1, padding, padding))


def strided_kernel(stride: int) -> tuple[int, int]:
    """Return kernel and padding over positions of a convolution with a stride of 1, 2 or 4."""
    return (3, 1) if stride == 1 else (2 * stride, stride // 2)


def pool_positions(x: Tensor) -> Tensor:
    """Return the mean and the maximum over the positions of ``[B, K, F, H, W]``, side by side: ``[B, F, 2 K]``."""
    flat = x.flatten(3)
    return torch.cat([flat.mean(dim=3), flat.amax(dim=3)], dim=1).transpose(1, 2)


class ModulatedBlock(nn.Module):
    """``x + temporal(modulate(gelu(spatial(norm(x)))))`` on ``[B, width, F, H, W]``."""

    def __init__(self, width: int, prompt_width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.spatial = nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1))
        self.temporal = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0))
        self.modulation = nn.Linear(prompt_width, 2 * width) if prompt_width else None

    def forward(self, x: Tensor, prompt: Tensor | None) -> Tensor:
        """Apply the block; ``prompt`` is ``[B, prompt_width]``, or None for a trunk without prompts."""
        hidden = functional.gelu(self.spatial(self.norm(x)))
        if self.modulation is not None:
            gamma, beta = self.modulation(prompt)[..., None, None, None].chunk(2, dim=1)
            hidden = hidden * (1 + gamma) + beta
        return x + self.temporal(hidden)


class Conv3dTrunk(nn.Module):
    """Latents ``[B, C, F, H, W]`` -> features ``[B, F, 2 width]``, one vector per frame.

    Args:
        latent_shape: ``(C, F, H, W)``.
        width: channels, a multiple of 8.
        depth: residual blocks.
        prompt_width: size of the prompt vector; 0 for none.
    """

    def __init__(self, latent_shape: tuple[int, ...], width: int, depth: int, prompt_width: int) -> None:
        super().__init__()
        self.stem = make_stem(latent_shape, width)
        self.blocks = nn.ModuleList([ModulatedBlock(width, prompt_width) for _ in range(depth)])
        self.num_features = 2 * width
        self.smallest_side = self.stem.stride[1]

    def forward(self, latents: Tensor, prompt: Tensor | None) -> Tensor:
        """Return the mean and the maximum over positions, ``[B, F, 2 width]``."""
        x = self.stem(latents)
        for block in self.blocks:
            x = block(x, prompt)
        return pool_positions(x)
