"""Heads: trunk features and a prompt vector -> rewards, and the network that joins the three."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from latent_rewards.proxies.trunks import Conv3dTrunk


class BilinearHead(nn.Module):
    """Features ``[B, K]`` and a prompt ``[B, P]`` -> standardised rewards ``[B, R]``.

    The elementwise product of a projection of the features with a projection of the prompt lets the head ask whether
    the latents show what the prompt names, which a sum of the two cannot express.
    """

    def __init__(self, num_features: int, prompt_width: int, width: int, num_rewards: int) -> None:
        super().__init__()
        self.features = nn.Linear(num_features, width)
        self.prompt = nn.Linear(prompt_width, width) if prompt_width else None
        self.hidden = nn.Linear(2 * width if prompt_width else width, width)
        self.output = nn.Linear(width, num_rewards)

    def forward(self, features: Tensor, prompt: Tensor | None) -> Tensor:
        """Return ``[B, R]``."""
        hidden = self.features(features)
        if self.prompt is not None:
            hidden = torch.cat([hidden, hidden * self.prompt(prompt)], dim=1)
        return self.output(functional.gelu(self.hidden(functional.gelu(hidden))))


class ConvMember(nn.Module):
    """One network of an ensemble: prompt embedding, conv3d trunk, bilinear head.

    The embedding of the prompt features is linear. With a nonlinear one the network learns prompts by heart: on
    "is the digit the one that the prompt names" the held-out rank correlation fell from 0.50 to 0.32.

    Args:
        latent_shape: ``(C, F, H, W)``.
        prompt_dim: number of prompt features; 0 for none.
        num_rewards: R.
        width: channels and hidden units.
        depth: residual blocks.
    """

    def __init__(
        self, latent_shape: tuple[int, ...], prompt_dim: int, num_rewards: int, *, width: int, depth: int
    ) -> None:
        super().__init__()
        prompt_width = width if prompt_dim else 0
        self.embedding = nn.Linear(prompt_dim, width, bias=False) if prompt_dim else None
        self.trunk = Conv3dTrunk(latent_shape, width, depth, prompt_width)
        self.head = BilinearHead(self.trunk.num_features, prompt_width, width, num_rewards)

    def features(self, latents: Tensor, prompt_features: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the trunk's features ``[B, K]`` and the embedded prompt ``[B, width]``, if any."""
        prompt = self.embedding(prompt_features) if self.embedding is not None else None
        return self.trunk(latents, prompt), prompt

    def forward(self, latents: Tensor, prompt_features: Tensor | None) -> Tensor:
        """Return standardised rewards ``[B, R]`` of normalised latents ``[B, C, F, H, W]``."""
        return self.head(*self.features(latents, prompt_features))
