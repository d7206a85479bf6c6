"""Ridge regression in closed form: the linear proxy, and the baseline every report carries.

``w = argmin |y - X w - b|^2 + alpha |w|^2`` with an unpenalised intercept, as scikit-learn's ``Ridge``: with X and y
centred, ``w = (X'X + alpha I)^-1 X'y`` or, for more features than samples, the equal ``X' (X X' + alpha I)^-1 y``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latent_rewards.proxies.features import linear_features

RELATIVE_ALPHAS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidate penalties, in units of the mean squared norm of the centred features."""


class RidgeSystem:
    """The normal equations of one data set, solved for several penalties.

    Args:
        features: ``[n, D]``.
        targets: ``[n, R]``, finite.
    """

    def __init__(self, features: Tensor, targets: Tensor) -> None:
        features, targets = features.double(), targets.double()
        self._feature_mean, self._target_mean = features.mean(dim=0), targets.mean(dim=0)
        self._features, self._targets = features - self._feature_mean, targets - self._target_mean
        count, dim = features.shape
        self._dual = dim > count
        self._gram = self._features @ self._features.T if self._dual else self._features.T @ self._features
        self.scale = float(self._gram.diagonal().sum()) / count

    def solve(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Return float64 weights ``[D, R]`` and intercepts ``[R]`` for a positive penalty."""
        shifted = self._gram + alpha * torch.eye(len(self._gram), dtype=torch.float64, device=self._gram.device)
        right = self._targets if self._dual else self._features.T @ self._targets
        solution = torch.cholesky_solve(right, torch.linalg.cholesky(shifted))
        weight = self._features.T @ solution if self._dual else solution
        return weight, self._target_mean - self._feature_mean @ weight


def choose_alpha(features: Tensor, targets: Tensor, validation: Tensor) -> float:
    """Return the candidate penalty with the least squared error on the rows ``validation`` (bool ``[n]``) marks."""
    system = RidgeSystem(features[~validation], targets[~validation])
    candidates = [max(relative * system.scale, 1e-12) for relative in RELATIVE_ALPHAS]
    errors = []
    for alpha in candidates:
        weight, intercept = system.solve(alpha)
        residual = features[validation].double() @ weight + intercept - targets[validation].double()
        errors.append(float(residual.square().mean()))
    return candidates[min(range(len(errors)), key=errors.__getitem__)]


def fit_ridge(features: Tensor, rewards: Tensor, alpha: float | None, validation: Tensor) -> tuple[Tensor, Tensor]:
    """Fit every reward on the samples it has.

    Args:
        features: ``[n, D]``.
        rewards: ``[n, R]``, NaN where a reward does not apply.
        alpha: penalty; None chooses one per reward with the rows of ``validation`` and then uses all rows.
        validation: bool ``[n]``.

    Returns:
        float64 weights ``[D, R]`` and intercepts ``[R]``.
    """
    known, validation = ~rewards.isnan(), validation.to(features.device)
    weight = torch.zeros(features.shape[1], rewards.shape[1], dtype=torch.float64, device=features.device)
    intercept = weight.new_zeros(rewards.shape[1])
    for pattern in known.T.unique(dim=0):
        columns = (known.T == pattern).all(dim=1).nonzero()[:, 0]
        x, y, held = features[pattern], rewards[pattern][:, columns], validation[pattern]
        penalty = alpha if alpha is not None else choose_alpha(x, y, held) if 0 < held.sum() < len(held) - 1 else 1.0
        weight[:, columns], intercept[columns] = RidgeSystem(x, y).solve(penalty)
    return weight, intercept


class LinearMember(nn.Module):
    """A ridge regression as a module: latents ``[B, C, F, H, W]`` and prompt features -> ``[B, R]``.

    Args:
        num_features: D, see :func:`latent_rewards.proxies.features.linear_features`.
        num_rewards: R.
    """

    weight: Tensor
    intercept: Tensor

    def __init__(self, num_features: int, num_rewards: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_features, num_rewards, dtype=torch.float64))
        self.register_buffer("intercept", torch.zeros(num_rewards, dtype=torch.float64))

    def forward(self, latents: Tensor, prompt_features: Tensor | None) -> Tensor:
        """Return the predictions ``[B, R]``."""
        return linear_features(latents, prompt_features) @ self.weight + self.intercept
