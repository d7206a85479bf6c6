"""Heads: trunk features and a prompt vector -> rewards, and the network that joins the three."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from latent_rewards.proxies.text import PromptFeatures, real_tokens
from latent_rewards.proxies.trunks import Conv3dTrunk


class BilinearHead(nn.Module):
    """Features ``[B, F, K]`` of F frames and a prompt ``[B, P]`` -> outputs ``[B, O]``.

    The outputs are standardised rewards, followed by their log-variances where the objective asks for them.

    Each frame is judged by itself and the judgements are averaged: most video metrics are means over frames, and F
    views of one label teach more than their mean does.
    The elementwise product of a projection of the features with a projection of the prompt lets the head ask whether
    the latents show what the prompt names, which a sum of the two cannot express.
    """

    def __init__(self, num_features: int, prompt_width: int, width: int, num_outputs: int) -> None:
        super().__init__()
        self.features = nn.Linear(num_features, width)
        self.prompt = nn.Linear(prompt_width, width) if prompt_width else None
        self.hidden = nn.Linear(2 * width if prompt_width else width, width)
        self.output = nn.Linear(width, num_outputs)

    def forward(self, features: Tensor, prompt: Tensor | None) -> Tensor:
        """Return ``[B, O]``."""
        hidden = self.features(features)
        if self.prompt is not None:
            hidden = torch.cat([hidden, hidden * self.prompt(prompt)[:, None]], dim=2)
        return self.output(functional.gelu(self.hidden(functional.gelu(hidden)))).mean(dim=1)


class TokenAttention(nn.Module):
    """Tokens ``[B, L, D]``, zero where padded -> ``[B, width]``: each head averages a projection with its own weights.

    It finds the word a metric asks for; the mean over tokens drowns it in the others.
    """

    def __init__(self, prompt_dim: int, width: int, heads: int = 4) -> None:
        super().__init__()
        self.scores = nn.Linear(prompt_dim, heads)
        self.values = nn.Linear(prompt_dim, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the heads' averages side by side; zero for a prompt of padding only."""
        real = real_tokens(tokens)[..., None]
        scores = self.scores(tokens).masked_fill(~real, float("-inf"))
        weights = torch.where(real.any(dim=1, keepdim=True), scores, 0.0).softmax(dim=1)
        values = self.values(tokens).unflatten(2, (weights.shape[2], -1))
        return torch.einsum("blh,blhd->bhd", weights, values).flatten(1)


class ConvMember(nn.Module):
    """One network of an ensemble: prompt embedding, conv3d trunk, bilinear head.

    The embedding of the prompt features is linear. With a nonlinear one the network learns prompts by heart: on
    "is the digit the one that the prompt names" the held-out rank correlation fell from 0.50 to 0.32.

    Args:
        latent_shape: ``(C, F, H, W)``.
        prompts: how prompts are read.
        num_outputs: O, see :func:`latent_rewards.proxies.objectives.num_outputs`.
        width: channels and hidden units.
        depth: residual blocks.
    """

    def __init__(
        self, latent_shape: tuple[int, ...], prompts: PromptFeatures, num_outputs: int, *, width: int, depth: int
    ) -> None:
        super().__init__()
        prompt_width = width if prompts.dim else 0
        self.embedding: nn.Module | None = None
        if prompts.kind == "tokens":
            self.embedding = TokenAttention(prompts.dim, width)
        elif prompts.dim:
            self.embedding = nn.Linear(prompts.dim, width, bias=False)
        self.trunk = Conv3dTrunk(latent_shape, width, depth, prompt_width)
        self.head = BilinearHead(self.trunk.num_features, prompt_width, width, num_outputs)

    def features(self, latents: Tensor, prompt_features: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the trunk's features ``[B, F, K]`` and the embedded prompt ``[B, width]``, if any."""
        prompt = self.embedding(prompt_features) if self.embedding is not None else None
        return self.trunk(latents, prompt), prompt

    def forward(self, latents: Tensor, prompt_features: Tensor | None) -> Tensor:
        """Return outputs ``[B, O]`` of normalised latents ``[B, C, F, H, W]``."""
        return self.head(*self.features(latents, prompt_features))
