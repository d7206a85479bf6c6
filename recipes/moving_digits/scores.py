"""The statistics of the digits benchmark, as pure functions of numbers: closeness, coverage, Fréchet, bootstrap.

Weights count how often a clip is drawn in a bootstrap resample; all ones is the sample itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import wasserstein_distance
from torch import Tensor

from latent_rewards.contracts import DataError
from latent_rewards.training.randomness import generator

Weights = NDArray[np.float64]


class UndefinedError(DataError):
    """A statistic has no value for these samples."""


@dataclass(frozen=True)
class Interval:
    """A difference and its percentile bootstrap interval; NaN where no resample has a value."""

    difference: float
    low: float
    high: float


def closeness(
    values: ArrayLike,
    real: ArrayLike,
    noise: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    real_weights: ArrayLike | None = None,
) -> float:
    """Return ``100 (1 - W1(values, real) / W1(noise, real))`` clipped to 0-100; NaN values do not take part.

    Raises:
        UndefinedError: no value is left, or noise is distributed like real.
        DataError: a value is infinite.
    """
    real_kept, noise_kept = _kept(real, real_weights, "real"), _kept(noise, None, "noise")
    scale = wasserstein_distance(noise_kept[0], real_kept[0], noise_kept[1], real_kept[1])
    if scale == 0:
        raise UndefinedError(
            "noise and real values have the same distribution: closeness has no zero; drop this metric"
        )
    kept = _kept(values, weights, "sample")
    distance = wasserstein_distance(kept[0], real_kept[0], kept[1], real_kept[1])
    return float(np.clip(100 * (1 - distance / scale), 0, 100))


def within_neighbourhood(
    real: Tensor,
    samples: Tensor,
    real_groups: Tensor | None = None,
    sample_groups: Tensor | None = None,
    *,
    neighbours: int = 5,
) -> Tensor:
    """Return bool ``[R, N]``: is sample n nearer to real point r than r's k-th nearest real neighbour of its group?

    The share of real points that some sample is that near to is their coverage (Naeem et al. 2020, eq. 6).

    Args:
        real: points ``[R, D]``.
        samples: points ``[N, D]``.
        real_groups: int64 ``[R]``; a sample counts for real points of its own group only. Default: one group.
        sample_groups: int64 ``[N]``.
        neighbours: k, not counting the point itself.

    Raises:
        DataError: a group has fewer than k + 1 real points.
    """
    real, samples = real.double(), samples.double()
    real_groups = torch.zeros(len(real), dtype=torch.int64) if real_groups is None else real_groups
    sample_groups = torch.zeros(len(samples), dtype=torch.int64) if sample_groups is None else sample_groups
    inside = torch.zeros(len(real), len(samples), dtype=torch.bool)
    for group in real_groups.unique():
        rows, columns = (real_groups == group).nonzero()[:, 0], (sample_groups == group).nonzero()[:, 0]
        if len(rows) <= neighbours:
            raise DataError(f"group {int(group)} has {len(rows)} real points; k = {neighbours} needs {neighbours + 1}")
        points = real[rows]
        radius = torch.cdist(points, points).kthvalue(neighbours + 1, dim=1).values
        inside[rows[:, None], columns[None]] = torch.cdist(points, samples[columns]) < radius[:, None]
    return inside


def frechet_distance(
    features: Tensor, real: Tensor, *, weights: ArrayLike | None = None, real_weights: ArrayLike | None = None
) -> float:
    """Return ``|m - m'|^2 + tr(S + S' - 2 (S S')^1/2)`` of the Gaussians fitted to ``[N, D]`` and ``[R, D]``.

    The trace of the root is the sum of the roots of the eigenvalues of ``S^1/2 S' S^1/2``, which is symmetric: no
    complex part can appear and singular covariances do no harm.
    """
    mean, covariance = _moments(features, weights)
    real_mean, real_covariance = _moments(real, real_weights)
    values, vectors = torch.linalg.eigh(real_covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ covariance @ root).clamp_min(0).sqrt().sum()
    distance = (mean - real_mean).square().sum() + covariance.trace() + real_covariance.trace() - 2 * shared
    return max(distance.item(), 0.0)


def resample_weights(count: int, *, resamples: int, seed: int = 0) -> Weights:
    """Return float64 ``[resamples, count]``: how often each of ``count`` groups is drawn in each resample."""
    draws = torch.randint(count, (resamples, count), generator=generator(seed, "bootstrap", 0))
    return (
        torch.zeros(resamples, count, dtype=torch.float64)
        .scatter_add_(1, draws, torch.ones(draws.shape).double())
        .numpy()
    )


def interval(difference: float, resampled: ArrayLike, *, level: float = 0.95) -> Interval:
    """Return ``difference`` with the central ``level`` of its resampled values that are not NaN."""
    values = np.asarray(resampled, dtype=np.float64)
    kept = values[~np.isnan(values)]
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2]) if len(kept) else (np.nan, np.nan)
    return Interval(float(difference), float(low), float(high))


def weighted_mean(values: ArrayLike, weights: ArrayLike) -> float:
    """Return the weighted mean of the values that are not NaN; NaN when none has weight."""
    values, weights = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    kept = ~np.isnan(values) & (weights > 0)
    return float(np.average(values[kept], weights=weights[kept])) if kept.any() else float("nan")


def _kept(values: ArrayLike, weights: ArrayLike | None, name: str) -> tuple[Weights, Weights]:
    values = np.asarray(values, dtype=np.float64)
    chosen = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    kept = ~np.isnan(values) & (chosen > 0)
    if not kept.any():
        raise UndefinedError(f"{name} values must not be all NaN; none of {len(values)} can be used")
    if infinite := int(np.isinf(values[kept]).sum()):
        raise DataError(f"{name} values must be finite or NaN; {infinite} of {len(values)} are infinite")
    return values[kept], chosen[kept]


def _moments(features: Tensor, weights: ArrayLike | None) -> tuple[Tensor, Tensor]:
    points = features.double()
    counts = torch.ones(len(points)).double() if weights is None else torch.from_numpy(np.asarray(weights)).double()
    mean = counts @ points / counts.sum()
    centred = points - mean
    return mean, (centred * counts[:, None]).T @ centred / (counts.sum() - 1)
