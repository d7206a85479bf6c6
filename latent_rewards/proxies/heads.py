"""Heads: trunk features and a prompt vector -> rewards, and the network that joins the three."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from latent_rewards.proxies.noise import TimeEmbedding
from latent_rewards.proxies.text import PromptFeatures, real_tokens
from latent_rewards.proxies.trunks import Builder, Conv3dTrunk


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


class NetworkMember(nn.Module):
    """One network of an ensemble: prompt embedding, time embedding if there is a time, trunk, bilinear head.

    The embedding of the prompt features is linear. With a nonlinear one the network learns prompts by heart: on
    "is the digit the one that the prompt names" the held-out rank correlation fell from 0.50 to 0.32.

    Args:
        latent_shape: ``(C, F, H, W)``.
        prompts: how prompts are read.
        num_outputs: O, see :func:`latent_rewards.proxies.objectives.num_outputs`.
        width: channels and hidden units.
        depth: blocks.
        make_trunk: see :data:`latent_rewards.proxies.trunks.Builder`.
        timed: latents come with a time, which joins the prompt in the vector that modulates trunk and head.
    """

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        prompts: PromptFeatures,
        num_outputs: int,
        *,
        width: int,
        depth: int,
        make_trunk: Builder = Conv3dTrunk,
        timed: bool = False,
    ) -> None:
        super().__init__()
        prompt_width = width if prompts.dim else 0
        self.embedding: nn.Module | None = None
        if prompts.kind == "tokens":
            self.embedding = TokenAttention(prompts.dim, width)
        elif prompts.dim:
            self.embedding = nn.Linear(prompts.dim, width, bias=False)
        self.time = TimeEmbedding(width) if timed else None
        condition_width = prompt_width + (width if timed else 0)
        self.trunk = make_trunk(latent_shape, width, depth, condition_width)
        num_features = cast(int, self.trunk.num_features)
        self.head = BilinearHead(num_features, condition_width, width, num_outputs)

    @property
    def num_features(self) -> int:
        """K of :meth:`judge`."""
        return cast(int, self.trunk.num_features)

    @property
    def smallest_side(self) -> int:
        """Height and width of the smallest latents the trunk can read."""
        return cast(int, getattr(self.trunk, "smallest_side", 1))

    def judge(self, latents: Tensor, prompt_features: Tensor | None, t: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return outputs ``[B, O]`` and the trunk's features ``[B, F, K]``.

        Args:
            latents: what the trunk reads, e.g. normalised latents ``[B, C, F, H, W]``.
            prompt_features: ``[B, D]`` or ``[B, L, D]``, if there are any.
            t: ``[B]``, for a timed member.
        """
        condition = self.embedding(prompt_features) if self.embedding is not None else None
        if self.time is not None:
            time = self.time(t)
            condition = time if condition is None else torch.cat([condition, time], dim=1)
        features = self.trunk(latents, condition)
        return self.head(features, condition), features

    def forward(self, latents: Tensor, prompt_features: Tensor | None, t: Tensor | None = None) -> Tensor:
        """Return the outputs of :meth:`judge`."""
        return self.judge(latents, prompt_features, t)[0]


class SeparateMember(nn.Module):
    """Networks that read the same, one for each reward, as one member of an ensemble.

    Args:
        networks: R of them, each with the outputs of one reward.
    """

    def __init__(self, networks: Sequence[NetworkMember]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    @property
    def num_features(self) -> int:
        """K of :meth:`judge`."""
        return sum(cast(NetworkMember, network).num_features for network in self.networks)

    @property
    def smallest_side(self) -> int:
        """Height and width of the smallest latents the trunks can read."""
        return cast(NetworkMember, self.networks[0]).smallest_side

    def judge(self, *inputs: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - what NetworkMember.judge takes
        """Return outputs ``[B, O]`` and the features ``[B, F, K]`` of all trunks.

        A reward's outputs are its mean and, if the objective asks for it, its log-variance: all means come first.
        """
        outputs, features = zip(
            *(cast(NetworkMember, network).judge(*inputs) for network in self.networks), strict=True
        )
        return torch.stack(outputs, dim=2).flatten(1), torch.cat(features, dim=2)

    def forward(self, *inputs: Any) -> Tensor:  # noqa: ANN401
        """Return the outputs of :meth:`judge`."""
        return self.judge(*inputs)[0]
