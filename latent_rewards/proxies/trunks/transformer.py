"""The transformer trunk: factorised space-time attention on patches of latents.

A block attends over the positions of each frame, then over the frames of each position, then applies an MLP: the
"factorised self-attention" of ViViT (Arnab et al. 2021). The prompt modulates what the spatial attention and the MLP
read, ``norm(x) * (1 + gamma) + beta``. Positions are sinusoids computed for whatever grid comes in, so any latent size
is accepted. Branches start at zero: a new trunk is its patch embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from latent_rewards.proxies.trunks.conv3d import make_stem, pool_positions

_LONGEST_WAVE = 1000.0


def grid_code(grid: tuple[int, int, int], width: int) -> Tensor:
    """Return float32 ``[F, H, W, width]``: sines and cosines of frame (half of the width), row and column (a quarter).

    Args:
        grid: ``(F, H, W)``.
        width: a multiple of 8.
    """
    sizes = (width // 2, width // 4, width // 4)
    parts = []
    for axis, (length, size) in enumerate(zip(grid, sizes, strict=True)):
        frequencies = _LONGEST_WAVE ** -(torch.arange(size // 2) / max(1, size // 2))
        angles = torch.arange(length)[:, None] * frequencies
        shape = [1, 1, 1, size]
        shape[axis] = length
        parts.append(torch.cat([angles.sin(), angles.cos()], dim=1).view(shape).expand(*grid, size))
    return torch.cat(parts, dim=3)


class Attention(nn.Module):
    """Self-attention over the second dimension of ``[N, S, width]``; its output starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // (16 if width % 16 == 0 else 8)
        self.projections = nn.Linear(width, 3 * width)
        self.output = _zeros(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, S, width]``."""
        q, k, v = self.projections(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.output(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SpaceTimeBlock(nn.Module):
    """Spatial attention, temporal attention and an MLP, each added to ``[B, F, S, width]``."""

    def __init__(self, width: int, prompt_width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.spatial = Attention(width)
        self.temporal = Attention(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = _zeros(4 * width, width)
        self.modulation = nn.Linear(prompt_width, 4 * width) if prompt_width else None

    def forward(self, x: Tensor, prompt: Tensor | None) -> Tensor:
        """Apply the block; ``prompt`` is ``[B, prompt_width]``, or None for a trunk without prompts."""
        batch, frames = x.shape[:2]
        spatial, deep = self.norms[0](x), None
        if self.modulation is not None:
            gamma, beta, *deep = self.modulation(prompt)[:, None, None].chunk(4, dim=3)
            spatial = spatial * (1 + gamma) + beta
        x = x + self.spatial(spatial.flatten(0, 1)).unflatten(0, (batch, frames))
        across = self.norms[1](x).transpose(1, 2).flatten(0, 1)
        x = x + self.temporal(across).unflatten(0, (batch, -1)).transpose(1, 2)
        hidden = self.norms[2](x)
        if deep is not None:
            hidden = hidden * (1 + deep[0]) + deep[1]
        return x + self.contract(functional.gelu(self.expand(hidden)))


class TransformerTrunk(nn.Module):
    """Latents ``[B, C, F, H, W]`` -> features ``[B, F, 2 width]``, one vector per frame.

    Patches are embedded with the strided convolution of the conv3d trunk.

    Args:
        latent_shape: ``(C, F, H, W)``; it chooses the stride, other sizes are read with the same one.
        width: of the tokens, a multiple of 8.
        depth: blocks.
        prompt_width: size of the prompt vector; 0 for none.
    """

    def __init__(self, latent_shape: tuple[int, ...], width: int, depth: int, prompt_width: int) -> None:
        super().__init__()
        self.stem = make_stem(latent_shape, width)
        self.blocks = nn.ModuleList([SpaceTimeBlock(width, prompt_width) for _ in range(depth)])
        self.num_features = 2 * width
        self.smallest_side = self.stem.stride[1]

    def forward(self, latents: Tensor, prompt: Tensor | None) -> Tensor:
        """Return the mean and the maximum over positions, ``[B, F, 2 width]``."""
        patches = self.stem(latents).permute(0, 2, 3, 4, 1)
        grid = (patches.shape[1], patches.shape[2], patches.shape[3])
        x = (patches + grid_code(grid, patches.shape[4]).to(patches)).flatten(2, 3)
        for block in self.blocks:
            x = block(x, prompt)
        return pool_positions(x.unflatten(2, grid[1:]).permute(0, 4, 1, 2, 3))


def _zeros(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
