"""One gradient per reward, combined so that progress on one is not paid for by another.

The weights of the combination come from torchjd (Quinton and Rey 2024, 2406.16232; optional extra ``multi``), which
needs the inner products of the gradients only:

======= ============================================================================================================
upgrad  each gradient is projected onto the cone of directions that harm no reward, then summed (2406.16232)
pcgrad  each gradient loses what it has against each other one, then summed (Yu et al. 2020, 2001.06782)
mgda    the shortest convex combination; it is 0 only where no direction improves all (Désidéri 2012)
======= ============================================================================================================

Where no two gradients oppose each other, the first two are the gradient of the sum.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError, Reward
from latent_rewards.lro.estimators import RewardFunction
from latent_rewards.rewards import WeightedSum
from latent_rewards.training.randomness import derive_seed
from latent_rewards.training.ranks import Ranks


class GradientAggregation:
    """Turns one loss per reward into the loss whose gradient is torchjd's combination of theirs.

    Args:
        name: "upgrad", "mgda" or "pcgrad".
        reward: whose weighted terms are taken apart.
        parameters: what is trained.
        seed: of the order in which "pcgrad" goes through the rewards.

    Raises:
        ConfigError: torchjd is not installed, or ``reward`` is no WeightedSum of at least two.
    """

    def __init__(self, name: str, reward: Reward | None, parameters: Sequence[nn.Parameter], seed: int) -> None:
        if not isinstance(reward, WeightedSum) or len(reward.weights) < 2:
            raise ConfigError(
                f"gradient_aggregation={name!r} needs reward=WeightedSum(weights) of at least two rewards, whose "
                f"gradients it combines; got {reward!r}"
            )
        self.names = tuple(reward.weights)
        self.parameters, self.seed = list(parameters), seed
        self._weighting = _weighting(name, len(self.names))

    def __call__(
        self,
        step: int,
        estimate: Callable[[RewardFunction], Tensor],
        terms: RewardFunction,
        ranks: Ranks,
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss and what to log: ``conflict``, the smallest cosine between two rewards' gradients.

        Args:
            step: of the update.
            estimate: a gradient estimator, from a reward function to a loss; called once per reward.
            terms: the weighted terms of the reward ``[R, N]`` of latents ``[N, ...]``; called once.
            ranks: over which gradients are averaged before they are compared.
        """
        seen: list[Tensor] = []

        def term(row: int) -> RewardFunction:
            def reward(latents: Tensor) -> Tensor:
                if not seen:
                    seen.append(terms(latents))
                return seen[0][row]  # every call has the same latents

            return reward

        losses = torch.stack([estimate(term(row)) for row in range(len(self.names))])
        gramian = self._gramian(losses, ranks)
        if not bool(torch.isfinite(gramian).all()):
            return losses.sum(), {}  # the loop refuses its gradient and says so
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "lro/gradients", step))
            weights = self._weighting(gramian).to(losses)
        return (weights * losses).sum(), {"conflict": smallest_cosine(gramian)}

    def _gramian(self, losses: Tensor, ranks: Ranks) -> Tensor:
        """Return the inner products ``[R, R]`` of the losses' gradients, float64 on the CPU."""
        rows = []
        for loss in losses:
            found = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
            row = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]
            ranks.average(row)
            rows.append(row)
        products = [[sum(_inner(a, b) for a, b in zip(one, other, strict=True)) for other in rows] for one in rows]
        return torch.tensor(products, dtype=torch.float64)


def smallest_cosine(gramian: Tensor) -> float:
    """Return the smallest cosine between two of the vectors with inner products ``[R, R]``; 0 for a zero vector."""
    lengths = gramian.diagonal().sqrt()
    scale = lengths[:, None] * lengths
    cosines = torch.where(scale > 0, gramian / scale, torch.zeros_like(gramian))
    above = torch.ones_like(gramian, dtype=torch.bool).triu(diagonal=1)
    return float(cosines[above].min())


def _inner(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum(dtype=torch.float64))


def _weighting(name: str, count: int) -> Callable[[Tensor], Tensor]:
    try:
        torchjd: Any = importlib.import_module("torchjd.aggregation")
        if name == "upgrad":
            return torchjd.UPGradWeighting(torch.ones(count, dtype=torch.float64))
        return {"mgda": torchjd.MGDAWeighting, "pcgrad": torchjd.PCGradWeighting}[name]()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"gradient_aggregation={name!r} needs torchjd with its solver ({error}); "
            "pip install 'latent-rewards[multi]'"
        ) from error
