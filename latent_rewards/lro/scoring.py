"""From latents to the one reward that is optimised: pessimistic proxy scores, capped, then combined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError, Reward


class Proxy(Protocol):
    """What the trainers ask of a reward proxy; ``RewardProxy`` has it."""

    @property
    def reward_names(self) -> tuple[str, ...]:
        """The rewards it predicts."""
        ...

    def scores(self, latents: Tensor, prompts: Sequence[str], *, pessimism: float = 0.0) -> dict[str, Tensor]:
        """Return ``{name: [B]}``: mean minus ``pessimism`` standard deviations, differentiable in the latents."""
        ...


@contextmanager
def frozen(module: object) -> Iterator[None]:
    """Keep a module's parameters out of graphs built in the block: a backward pass then leaves no gradient on them."""
    parameters = [p for p in module.parameters() if p.requires_grad] if isinstance(module, nn.Module) else []
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class ProxyReward:
    """Scores latents with a proxy and combines the scores.

    A reward that should fall (negative weight) is scored ``pessimism`` standard deviations *above* its mean and its cap
    bounds it from below: in both cases what the policy may gain from an uncertain or unbelievable score is limited.

    Args:
        proxy: see :class:`Proxy`.
        reward: combines ``{name: [B]}``; None takes the only reward there is.
        pessimism: standard deviations.
        cap: clamp of every score; None does not clamp.
        micro_batch: samples per proxy call.

    Raises:
        ConfigError: no ``reward`` for a proxy of several.
    """

    def __init__(
        self, proxy: Proxy, reward: Reward | None, *, pessimism: float, cap: float | None, micro_batch: int
    ) -> None:
        names = tuple(proxy.reward_names)
        if reward is None and len(names) != 1:
            example = ", ".join(f"{name!r}: 1.0" for name in names)
            raise ConfigError(
                f"the proxy has {len(names)} rewards; say how to combine them: WeightedSum({{{example}}})"
            )
        self.proxy, self.pessimism, self.cap, self.micro_batch = proxy, pessimism, cap, micro_batch
        self.reward: Reward = reward if reward is not None else (lambda values: values[names[0]])
        self.falling = {name for name, weight in getattr(reward, "weights", {}).items() if weight < 0}

    def by_name(self, latents: Tensor, prompts: Sequence[str], pessimism: float = 0.0) -> dict[str, Tensor]:
        """Return the proxy's scores ``{name: [N]}`` at ``pessimism``, without cap."""
        parts = []
        with frozen(self.proxy):
            for start in range(0, len(latents), self.micro_batch):
                stop = start + self.micro_batch
                parts.append(self.proxy.scores(latents[start:stop], prompts[start:stop], pessimism=pessimism))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def __call__(self, latents: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the reward ``[N]`` and the pessimistic, capped scores ``{name: [N]}`` it was made of."""
        scores = self.by_name(latents, prompts, self.pessimism)
        if self.falling and self.pessimism:
            optimistic = self.by_name(latents, prompts, -self.pessimism)
            scores = {name: (optimistic if name in self.falling else scores)[name] for name in scores}
        if self.cap is not None:
            scores = {
                name: value.clamp(min=self.cap) if name in self.falling else value.clamp(max=self.cap)
                for name, value in scores.items()
            }
        return self.reward(scores), scores
