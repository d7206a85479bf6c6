"""How far latents lie from those a proxy was trained on.

The distance is Mahalanobis', ``|L^-1 (f - mean)|`` with ``L L' = 0.9 S + 0.1 diag(S)`` for the covariance S of the
features f of training samples. The score is the fraction of held-out training-like samples that are nearer: 0.5 is
typical, 1 is farther than all of them. A score near 1 for many samples says that the proxy is extrapolating.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
        below = torch.searchsorted(self.levels, self.distance(features).contiguous(), right=True)
        return (below - 1).clamp(min=0) / (_QUANTILES - 1)
