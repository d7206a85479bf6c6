"""The protocols every room is built against; the errors they raise are those of :mod:`latent_rewards.errors`.

Everything here is structural: a class satisfies a protocol by having its methods, without importing this module.
Latents are ``[B, C, F, H, W]`` in the policy's normalised model space, videos ``[B, T, C, H, W]`` float32 in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from latent_rewards.errors import (
    ConfigError as ConfigError,
    DataError as DataError,
    DuplicateMetricError as DuplicateMetricError,
    FingerprintMismatchError as FingerprintMismatchError,
    LatentRewardsError as LatentRewardsError,
    MetricCrashError as MetricCrashError,
    MetricError as MetricError,
    MetricOutputError as MetricOutputError,
    MetricTimeoutError as MetricTimeoutError,
    RankError as RankError,
    UnknownMetricError as UnknownMetricError,
    unknown_name as unknown_name,
)

Prompt = str | dict[str, Any]
"""A text, or a mapping with the key ``"prompt"`` and whatever else the policy understands."""

Oracle = Callable[[Tensor, Sequence[str]], dict[str, Tensor]]
"""Latents ``[B, C, F, H, W]`` and their prompts -> ``{reward name: [B]}``: decoding followed by the true metrics."""

Reward = Callable[[dict[str, Tensor]], Tensor]
"""``{reward name: [B]}`` -> ``[B]``: how several rewards become the one that is optimised."""


@runtime_checkable
class Condition(Protocol):
    """Prompts as a policy wants them: embeddings, masks, images."""

    def __len__(self) -> int:
        """Return the number of samples the condition describes."""
        ...

    def index_select(self, index: Tensor) -> Condition:
        """Return the rows at ``index`` (int64 ``[M]``); repeated indices repeat a prompt, which makes groups."""
        ...

    def to(self, device: torch.device | str) -> Condition:
        """Return the condition on ``device``."""
        ...


@runtime_checkable
class Policy(Protocol):
    """A few-step generator as a Markov chain of Gaussian transitions; also an ``nn.Module``."""

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Encode prompts; the one owner of text (and image) encoding, cached."""
        ...

    def latent_shape(self, condition: Condition) -> tuple[int, int, int, int]:
        """Return ``(C, F, H, W)`` of one sample's latents."""
        ...

    def timesteps(self, num_steps: int) -> Sequence[float]:
        """Return the times in (0, 1] at which ``num_steps`` sampling calls the network; raises for others."""
        ...

    def transition(self, latents: Tensor, step: int, num_steps: int, condition: Condition) -> tuple[Tensor, Tensor]:
        """Return mean ``[B, C, F, H, W]``, carrying the gradient, and std ``[]`` or ``[B, 1, 1, 1, 1]``, 0 last."""
        ...


@runtime_checkable
class Codec(Protocol):
    """Latents in the policy's normalised model space <-> pixels."""

    fingerprint: str

    def decode(self, latents: Tensor) -> Tensor:
        """``[B, C, F, H, W]`` -> videos ``[B, T, 3, H', W']`` in [0, 1], in bounded chunks."""
        ...

    def encode(self, videos: Tensor) -> Tensor:
        """Videos ``[B, T, 3, H', W']`` in [0, 1] -> ``[B, C, F, H, W]``."""
        ...


@runtime_checkable
class Anchor(Protocol):
    """A loss that holds a policy near what it was distilled from; it may learn, so it has state."""

    def loss(self, policy: Policy, condition: Condition, noise: Tensor) -> Tensor:
        """Return a scalar loss for the policy; ``noise`` is a stack ``[num_steps, B, C, F, H, W]``."""
        ...

    def after_step(self) -> None:
        """Update the anchor's own networks after each policy update."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        ...


def prompt_text(prompt: Prompt) -> str:
    """Return the text of a prompt.

    Raises:
        DataError: a mapping without the key ``"prompt"``, or something that is neither text nor mapping.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, dict) and isinstance(prompt.get("prompt"), str):
        return prompt["prompt"]
    raise DataError(f"a prompt is a text or a mapping with the key 'prompt'; got {prompt!r}")


def check_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts as a list.

    Raises:
        DataError: there are none, one is blank, or one is of the wrong type.
    """
    if isinstance(prompts, str):
        raise DataError("prompts is one text; pass a list of texts")
    listed = list(prompts)
    if not listed:
        raise DataError("no prompts: the list (or file) is empty; give at least one prompt")
    for index, prompt in enumerate(listed):
        if not prompt_text(prompt).strip():
            raise DataError(f"prompt {index} is blank; remove it or write its text")
    return listed


def check_latents(latents: Tensor, *, name: str = "latents") -> Tensor:
    """Return ``latents`` if they are ``[N, C, F, H, W]``, floating and finite.

    Raises:
        DataError: the rank, dtype or values are wrong; the message names the first offending sample.
    """
    if not isinstance(latents, Tensor):
        raise DataError(f"{name} must be a tensor [N, C, F, H, W]; got {type(latents).__name__}")
    if latents.ndim != 5:
        raise DataError(f"{name} must have 5 dimensions [N, C, F, H, W]; got shape {tuple(latents.shape)}")
    if not latents.is_floating_point():
        raise DataError(f"{name} must be floating point; got {latents.dtype}")
    # A sum that is finite has finite terms, and takes no memory; one that is not may just be too large.
    if math.isfinite(float(latents.detach().sum())):
        return latents
    finite = torch.isfinite(latents).flatten(1).all(dim=1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise DataError(
            f"{name}[{bad}] holds NaN or infinity ({int((~finite).sum())} such samples); drop or repair them"
        )
    return latents
