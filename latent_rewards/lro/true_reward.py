"""What the trainers take in place of a proxy to optimise a true metric itself: the published ways, for comparison.

:class:`TrueReward` decodes and measures every sample of every update. With ``estimator="reinforce"`` that is DDPO
(2305.13301), and with group-normalised advantages, a clipped ratio over several iterations and a KL it is in the style
of Flow-GRPO (2505.05470); both here with a Gaussian head on the last step, which public code drops.
:class:`DecodedReward` backpropagates a differentiable metric through the decoder, as VADER (2407.08737) and DRaFT
(2309.17400) do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latent_rewards.contracts import Codec, ConfigError, DataError, Oracle, unknown_name
from latent_rewards.digests import tensor_digests

_REMEMBERED = 4096  # calls, each of a micro-batch: more than an update's

VideoReward = Callable[..., Tensor]
"""Videos ``[B, T, 3, H, W]`` in [0, 1], and prompts if it takes ``prompts`` or must be given two -> ``[B]``."""


class TrueReward:
    """The true metrics as a proxy that is never wrong; every call queries them.

    Samples that are asked for again, as those of a rollout that several iterations use, are scored once. There is no
    gradient and no uncertainty, so ``pessimism`` changes nothing.

    Args:
        oracle: latents and prompts -> true rewards.
        reward_names: those to optimise; None takes all of a :class:`~latent_rewards.oracle.MetricOracle`.

    Attributes:
        is_true: the trainers warn of no frozen proxy.
        num_queries: samples that were scored, by this process.

    Raises:
        ConfigError: no names, and an oracle that does not know its own; or a name of none of its rewards.
    """

    is_true = True

    def __init__(self, oracle: Oracle, reward_names: Sequence[str] | None = None) -> None:
        known: Mapping[str, str] = getattr(oracle, "fingerprints", {})
        names = tuple(known if reward_names is None else reward_names)
        if not names:
            raise ConfigError("the oracle does not say which rewards it returns; pass reward_names=[...]")
        if unknown := [name for name in names if known and name not in known]:
            raise ConfigError(unknown_name("reward", unknown[0], known))
        self.oracle, self.reward_names = oracle, names
        self.num_queries = 0
        self._known: dict[tuple[str, ...], dict[str, Tensor]] = {}

    @property
    def latent_space(self) -> str | None:
        """The oracle's latent space."""
        return getattr(self.oracle, "latent_space", None)

    def scores(self, latents: Tensor, prompts: Sequence[str], pessimism: float = 0.0) -> dict[str, Tensor]:
        """Return ``{name: [B]}`` without gradient.

        Raises:
            ConfigError: a gradient is asked for.
            DataError: the oracle does not return one of the rewards.
        """
        if latents.requires_grad and torch.is_grad_enabled():
            raise ConfigError(
                "a true metric has no gradient: use ReinforceTrainer(estimator='reinforce'), a proxy, or DecodedReward "
                "for a metric that can be differentiated"
            )
        texts = list(prompts)
        key = (*tensor_digests(latents), *texts)
        if key not in self._known:
            self.num_queries += len(latents)
            self._known[key] = self.oracle(latents, texts)
            while len(self._known) > _REMEMBERED:
                del self._known[next(iter(self._known))]
        rewards = self._known[key]
        for name in self.reward_names:
            if name not in rewards:
                raise DataError(f"the oracle returns {', '.join(sorted(rewards))} and no {name!r}; name one of those")
        return {name: rewards[name].to(latents) for name in self.reward_names}


class DecodedReward:
    """Differentiable metrics on decoded frames, as a proxy: its gradient goes through the decoder.

    Samples are decoded ``chunk_size`` at a time and again in the backward pass (activation checkpointing), so that the
    graph of so many is held at a time; without it the graphs of all are.

    Args:
        codec: its ``decode`` must carry a gradient.
        rewards: reward name -> function of videos, or of videos and prompts; see :data:`VideoReward`.
        latent_frames: only the first so many latent frames are decoded and judged, which saves memory and is biased;
            None decodes all.
        checkpointed: see above.
        chunk_size: see above.

    Attributes:
        is_true: the trainers warn of no frozen proxy.
        num_queries: samples that were decoded for a score, by this process.

    Raises:
        ConfigError: no reward, one that cannot be called so, or fewer than one latent frame or sample at a time.
    """

    is_true = True

    def __init__(
        self,
        codec: Codec,
        rewards: Mapping[str, VideoReward],
        *,
        latent_frames: int | None = None,
        checkpointed: bool = True,
        chunk_size: int = 1,
    ) -> None:
        if not rewards:
            raise ConfigError("rewards is empty; pass {name: function of videos and prompts}")
        self._calls = {name: _caller(name, reward) for name, reward in rewards.items()}
        if chunk_size < 1:
            raise ConfigError(f"chunk_size must be at least 1; got {chunk_size}")
        if latent_frames is not None and latent_frames < 1:
            raise ConfigError(f"latent_frames must be at least 1, or None for all; got {latent_frames}")
        self.codec, self.rewards, self.latent_frames = codec, dict(rewards), latent_frames
        self.checkpointed, self.chunk_size, self.num_queries = checkpointed, chunk_size, 0
        self.reward_names = tuple(self.rewards)

    @property
    def latent_space(self) -> str:
        """The codec's fingerprint."""
        return self.codec.fingerprint

    def scores(self, latents: Tensor, prompts: Sequence[str], pessimism: float = 0.0) -> dict[str, Tensor]:
        """Return ``{name: [B]}``, differentiable in the latents.

        Raises:
            DataError: a gradient is asked for, and the codec or a reward has none; or a reward does not return ``[B]``.
        """
        self.num_queries += len(latents)
        size = self.chunk_size
        chunks = [slice(start, start + size) for start in range(0, len(latents), size)]
        scores = torch.cat([self._score(latents[chunk], list(prompts[chunk])) for chunk in chunks], dim=1)
        if latents.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
            raise DataError(
                f"no gradient reaches the latents from {', '.join(self.reward_names)}: the codec's decode must not run "
                "under no_grad, and the rewards must be differentiable"
            )
        return dict(zip(self.reward_names, scores, strict=True))

    def _score(self, latents: Tensor, prompts: list[str]) -> Tensor:
        """Return the rewards ``[R, B]`` of a chunk."""

        def score(part: Tensor) -> Tensor:
            videos = self.codec.decode(part)
            return torch.stack([self._reward(name, videos, prompts).to(part) for name in self.rewards])

        kept = latents[:, :, : self.latent_frames]
        if not (self.checkpointed and torch.is_grad_enabled() and kept.requires_grad):
            return score(kept)
        scores: Tensor = checkpoint(score, kept, use_reentrant=False)
        return scores

    def _reward(self, name: str, videos: Tensor, prompts: list[str]) -> Tensor:
        values = self._calls[name](videos, prompts)
        if not isinstance(values, Tensor) or values.shape != videos.shape[:1]:
            got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise DataError(
                f"reward {name!r} must return a tensor with one number per video, [{len(videos)}]; got {got}"
            )
        return values


def _caller(name: str, reward: VideoReward) -> Callable[[Tensor, list[str]], Any]:
    """Return what calls a reward with videos and prompts, in the way it takes them.

    Raises:
        ConfigError: it takes neither videos nor videos and prompts.
    """
    if not callable(reward):
        raise ConfigError(f"reward {name!r} must be a function of videos and prompts; got a {type(reward).__name__}")
    try:
        signature = inspect.signature(reward.forward if isinstance(reward, nn.Module) else reward)
    except ValueError:  # of some functions written in C
        return reward
    second = next(iter([*signature.parameters.values()][1:]), None)
    if "prompts" in signature.parameters and signature.parameters["prompts"].kind is inspect.Parameter.KEYWORD_ONLY:
        return lambda videos, prompts: reward(videos, prompts=prompts)
    with suppress(TypeError):
        signature.bind(0, 1)
        if second is None or second.default is second.empty or second.name == "prompts":
            return reward
    with suppress(TypeError):
        signature.bind(0)
        return lambda videos, _: reward(videos)
    raise ConfigError(f"reward {name!r} must take videos, or videos and prompts; it takes {signature}")
