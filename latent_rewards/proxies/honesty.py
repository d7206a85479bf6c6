"""How honest a proxy is: does it order pairs rightly, and do its intervals hold what they promise?"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from latent_rewards.proxies.calibration import Z_LEVEL
from latent_rewards.proxies.heldout import HeldOut
from latent_rewards.training.randomness import generator

CALIBRATION_LEVELS = tuple(round(0.1 * step, 1) for step in range(1, 10))
"""Levels of the central intervals whose coverage makes the calibration error."""

_REPLICATES = 2000
_CONFIDENCE = 0.95
_LARGE = 256


def count_pairs(predicted: Tensor, target: Tensor) -> tuple[float, float]:
    """Return how many pairs of samples are ordered rightly, and how many have different targets.

    Args:
        predicted: ``[n]``; a pair of equal predictions counts one half.
        target: ``[n]``, finite.
    """
    count = len(target)
    if count > _LARGE:
        return _count_by_tau(predicted, target)
    later = torch.ones(count, count, dtype=torch.bool).triu(1)
    truth = (target[:, None] - target[None]).sign()[later]
    said = (predicted[:, None] - predicted[None]).sign()[later]
    return float(((truth * said)[truth != 0] + 1).sum() / 2), float((truth != 0).sum())


def _count_by_tau(predicted: Tensor, target: Tensor) -> tuple[float, float]:
    """Return the same from Kendall's tau-b, ``(C - D) / sqrt(untied targets * untied predictions)``: O(n log n)."""
    from scipy.stats import kendalltau

    def untied(values: Tensor) -> float:
        sizes = values.unique(return_counts=True)[1].double()
        return float((len(values) ** 2 - sizes.square().sum()) / 2)

    pairs, distinct = untied(target), untied(predicted)
    tau = float(kendalltau(predicted.numpy(), target.numpy()).statistic) if pairs and distinct else 0.0
    return (pairs + tau * math.sqrt(pairs * distinct)) / 2, pairs


def pairwise_accuracy(predicted: Tensor, target: Tensor, prompts: Tensor | None = None) -> float:
    """Return the share in [0, 1] of pairs of samples with different targets that are ordered rightly.

    Args:
        predicted: ``[n]``; a pair of equal predictions counts one half, so a constant scores 0.5.
        target: ``[n]``, NaN where unknown.
        prompts: int64 ``[n]``: only pairs within a prompt; None: all pairs.

    Returns:
        NaN if there is no such pair.
    """
    known = ~target.isnan()
    predicted, target = predicted[known].double().cpu(), target[known].double().cpu()
    right, pairs = 0.0, 0.0
    if prompts is None:
        right, pairs = count_pairs(predicted, target)
    else:
        sizes = prompts[known].unique(return_counts=True)[1].tolist()
        order = prompts[known].argsort(stable=True)
        for rows in order.split(sizes):
            if len(rows) > 1:
                more, count = count_pairs(predicted[rows], target[rows])
                right, pairs = right + more, pairs + count
    return right / pairs if pairs else math.nan


def interval_coverage(error: Tensor, std: Tensor, level: float) -> float:
    """Return the share of errors ``[n]`` inside the central interval of the predicted Gaussians; NaN if n is 0."""
    width = float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
    return float((error.abs() <= width * std).double().mean())


def calibration_error(error: Tensor, std: Tensor) -> float:
    """Return the mean over the levels .1, ..., .9 of ``|coverage of the central interval - level|``.

    Args:
        error: ``[n]``, prediction minus truth.
        std: ``[n]``, predicted standard deviations (Kuleshov et al. 2018, with the absolute value).
    """
    gaps = [abs(interval_coverage(error, std, level) - level) for level in CALIBRATION_LEVELS]
    return sum(gaps) / len(gaps)


def clustered_interval(inside: Tensor, clusters: Tensor, seed: int) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a share, clusters drawn with replacement (Efron 1979).

    Args:
        inside: bool ``[n]``.
        clusters: int64 ``[n]``; samples of one cluster are drawn together.
        seed: of the draws.
    """
    ids = clusters.unique(return_inverse=True)[1]
    number = int(ids.max()) + 1
    hits = torch.zeros(number, dtype=torch.float64).index_add_(0, ids, inside.double())
    sizes = torch.zeros(number, dtype=torch.float64).index_add_(0, ids, torch.ones(len(ids), dtype=torch.float64))
    source = generator(seed, "proxy/report/bootstrap", 0)
    shares = []
    for _ in range(_REPLICATES):
        drawn = torch.randint(number, (number,), generator=source)
        shares.append(hits[drawn].sum() / sizes[drawn].sum())
    tails = torch.tensor([(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.stack(shares), tails).tolist()
    return low, high


def honesty(heldout: HeldOut, column: int, seed: int) -> dict[str, Any]:
    """Return what a report says of one reward beyond accuracy.

    Returns:
        ``{"pairwise_accuracy", "pairwise_accuracy_within_prompt" (None where prompts do not repeat),
        "calibration_error", "coverage" of the 90 % interval, "coverage_interval": [low, high] (prompts resampled),
        "interval_width" (mean width of the 90 % interval, in the reward's units)}``; None: not known.
    """
    truth, predicted, std = heldout.truth[:, column], heldout.predicted[:, column], heldout.std[:, column]
    known = ~truth.isnan()
    error, std, prompts = (predicted - truth)[known].double(), std[known].double(), heldout.prompts[known]
    if not len(error):
        names = ("calibration_error", "coverage", "coverage_interval", "interval_width")
        return dict.fromkeys(("pairwise_accuracy", "pairwise_accuracy_within_prompt", *names))
    inside = error.abs() <= Z_LEVEL * std
    return {
        "pairwise_accuracy": _number(pairwise_accuracy(predicted, truth)),
        "pairwise_accuracy_within_prompt": _number(pairwise_accuracy(predicted, truth, heldout.prompts)),
        "calibration_error": calibration_error(error, std),
        "coverage": float(inside.double().mean()),
        "coverage_interval": list(clustered_interval(inside, prompts, seed)),
        "interval_width": float(2 * Z_LEVEL * std.mean()),
    }


def reliability(heldout: HeldOut, column: int) -> tuple[list[float], list[float]]:
    """Return the levels .1, ..., .9 and the coverage of each level's interval on held-out samples of one reward."""
    known = ~heldout.truth[:, column].isnan()
    error = (heldout.predicted - heldout.truth)[known, column].double()
    std = heldout.std[known, column].double()
    return list(CALIBRATION_LEVELS), [interval_coverage(error, std, level) for level in CALIBRATION_LEVELS]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
