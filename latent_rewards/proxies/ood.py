"""How far latents lie from those a proxy was trained on.

The distance is Mahalanobis', ``|L^-1 (f - mean)|`` with ``L L' = 0.9 S + 0.1 diag(S)`` for the covariance S of the
features f of training samples. The disagreement is the variance of the ensemble's members. Each becomes a rank, the
share of the n held-out samples at or below it; a sample is as strange as the stranger of the two makes it,

    c = max(rank of the distance, rank of the disagreement),      2 where one lies beyond all held-out samples,

and the score is the share of the held-out samples whose own c is lower: 0.5 is typical, 1 is stranger than all of them.
A score near 1 for many samples says that the proxy is extrapolating. An ensemble of one has the distance only.

The threshold for a false alarm a is split-conformal (:mod:`latent_rewards.proxies.conformal`): on a sample exchangeable
with the held-out ones ``score > threshold`` has at most probability a. Ranks among the held-out samples themselves
count the sample itself, so a new sample's c is never the higher for that, and the bound stays a bound (it is loose by
some 3/n). With two parts two held-out samples can be strangest, so a must be at least 2/(n + 1). Features that were
learnt from the held-out samples too (:mod:`latent_rewards.proxies.refit`) make it an approximation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError
from latent_rewards.proxies.conformal import NUM_LEVELS, RESOLUTION, conformal_quantiles, conformal_rank, level_index

_QUANTILES = 129
_SHRINKAGE = 0.1


class DistanceQuantile(nn.Module):
    """Features ``[B, K]`` -> scores ``[B]`` in [0, 1].

    Args:
        num_features: K.
    """

    mean: Tensor
    whitening: Tensor
    levels: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("whitening", torch.eye(num_features))
        self.register_buffer("levels", torch.linspace(0, 1, _QUANTILES))

    @torch.no_grad()
    def fit(self, training: Tensor, reference: Tensor) -> None:
        """Set mean and covariance from ``training`` ``[n, K]`` and the distances to rank against from ``reference``."""
        features = training.double()
        mean = features.mean(dim=0)
        centred = features - mean
        covariance = centred.T @ centred / len(features)
        diagonal = covariance.diagonal().clone()
        floor = 1e-6 * diagonal.mean() + 1e-12
        shrunk = (1 - _SHRINKAGE) * covariance + torch.diag(_SHRINKAGE * diagonal + floor)
        lower = torch.linalg.cholesky(shrunk)
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        self.mean.copy_(mean)
        self.whitening.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        quantiles = torch.linspace(0, 1, _QUANTILES, dtype=self.levels.dtype, device=self.levels.device)
        self.levels.copy_(torch.quantile(self.distance(reference), quantiles))

    def distance(self, features: Tensor) -> Tensor:
        """Return Mahalanobis distances ``[B]``."""
        return ((features.to(self.mean.dtype) - self.mean) @ self.whitening.T).norm(dim=1)

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Return the fraction of reference samples that are nearer, ``[B]``."""
        return self.rank(self.distance(features))

    @torch.no_grad()
    def rank(self, distance: Tensor) -> Tensor:
        """Return the fraction of reference samples that are nearer than distances ``[B]``."""
        below = torch.searchsorted(self.levels, distance.contiguous(), right=True)
        return (below - 1).clamp(min=0) / (_QUANTILES - 1)


class OodScore(nn.Module):
    """Distances and disagreements ``[B]`` -> scores ``[B]`` in [0, 1]; see the module."""

    distances: Tensor
    disagreements: Tensor
    combined: Tensor
    count: Tensor
    parts: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("distances", "disagreements", "combined"):
            self.register_buffer(name, torch.zeros(NUM_LEVELS))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("parts", torch.ones((), dtype=torch.long))

    @torch.no_grad()
    def fit(self, distance: Tensor, disagreement: Tensor | None) -> None:
        """Rank against the distances and disagreements ``[n]`` of held-out samples; None: there is no ensemble."""
        self.count.fill_(len(distance))
        self.parts.fill_(1 if disagreement is None else 2)
        self.distances.copy_(_ranks(distance))
        if disagreement is not None:
            self.disagreements.copy_(_ranks(disagreement))
        combined = self._combine(distance, distance if disagreement is None else disagreement)
        self.combined.copy_(conformal_quantiles(combined, float(combined.max())))

    def _combine(self, distance: Tensor, disagreement: Tensor) -> Tensor:
        pairs = [(self.distances, distance), (self.disagreements, disagreement)][: int(self.parts)]
        ranks = []
        for levels, values in pairs:
            values = values.to(levels).contiguous()
            below = torch.searchsorted(levels, values, right=True) / NUM_LEVELS
            ranks.append(torch.where(values > levels[-1], 2.0, below))
        return torch.stack(ranks).amax(dim=0)

    @torch.no_grad()
    def forward(self, distance: Tensor, disagreement: Tensor) -> Tensor:
        """Return the share of held-out samples that are less strange, ``[B]``."""
        combined = self._combine(distance, disagreement)
        return torch.searchsorted(self.combined.to(combined), combined) / NUM_LEVELS

    def threshold(self, false_alarm: float) -> float:
        """Return the score above which at most a share ``false_alarm`` of new samples like the held-out ones lies.

        Raises:
            ConfigError: ``false_alarm`` is outside [0.001, 1), or lower than the held-out samples can tell.
        """
        count, parts = int(self.count), int(self.parts)
        if not count:
            raise ConfigError(
                "the proxy has no held-out samples to tell a threshold from; train it, or load a trained one"
            )
        index = level_index(1 - false_alarm, "1 - false_alarm")
        if conformal_rank(index, count) > count + 1 - parts:
            raise ConfigError(
                f"{count} held-out samples cannot tell a false alarm of {false_alarm}, but {parts / (count + 1):.2g} "
                "or more; ask for that, or train on more samples or with a larger holdout_fraction"
            )
        return (index - 0.5) / NUM_LEVELS


def _ranks(values: Tensor) -> Tensor:
    """Return the ``[999]`` values with ``ceil(k n / 999)`` of the ``values`` ``[n]`` at or below them."""
    ranks = -(-torch.arange(1, RESOLUTION, device=values.device) * len(values) // NUM_LEVELS)
    return values.sort().values[ranks - 1]
