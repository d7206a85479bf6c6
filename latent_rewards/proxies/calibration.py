"""How uncertain a prediction is, in units that hold on data the proxy has not seen.

With d the standard deviation of the ensemble's members, the standard deviation of reward r is

    std = T_r sqrt(a_r + b_r d^2)

With the "gaussian" objective d^2 is the variance of the members' mixture: their disagreement plus the mean variance
that they predict, so that std follows noise that differs between samples.

a_r (noise the ensemble agrees on) and b_r >= 1 (members that share data agree too much) maximise the Gaussian
likelihood of the held-out errors e; b_r runs over powers of two and a_r = mean(e^2) - b_r mean(d^2), kept positive. T_r
then makes the central 90 % interval ``mean +- 1.645 std`` cover: it is the split-conformal quantile (rank
ceil(0.9 (n + 1))) of ``|e| / sqrt(a_r + b_r d^2)`` over 1.645 (Vovk et al. 2005; Guo et al. 2017 for scaling by one T).
All the quantiles of ``|e| / std`` are kept too (:mod:`latent_rewards.proxies.conformal`): an interval of any level is
``mean +- q(level) std``, whatever the errors' distribution.

A report on the samples that calibrate would flatter: there each half is judged by what the other half calibrated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from latent_rewards.proxies.conformal import conformal_quantiles, normal_quantiles
from latent_rewards.proxies.isotonic import MonotoneMap

LEVEL = 0.9
Z_LEVEL = 1.6448536269514722
"""The standard normal quantile at (1 + LEVEL) / 2."""

_DISAGREEMENT_SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)
_FLOOR = 1e-6


class Calibration(nn.Module):
    """Holds a, b, T and the quantiles of ``|e| / std`` of every reward, in units of standardised rewards.

    Args:
        num_rewards: R.
    """

    residual_variance: Tensor
    disagreement_scale: Tensor
    temperature: Tensor
    ratios: Tensor

    def __init__(self, num_rewards: int) -> None:
        super().__init__()
        self.register_buffer("residual_variance", torch.ones(num_rewards))
        self.register_buffer("disagreement_scale", torch.ones(num_rewards))
        self.register_buffer("temperature", torch.ones(num_rewards))
        self.register_buffer("ratios", normal_quantiles().repeat(num_rewards, 1))

    def forward(self, disagreement: Tensor) -> Tensor:
        """Return the standard deviation ``[B, R]`` for ensemble variances d^2 ``[B, R]``."""
        return self.temperature * (self.residual_variance + self.disagreement_scale * disagreement).sqrt()

    @torch.no_grad()
    def fit(self, errors: Tensor, disagreement: Tensor) -> None:
        """Set a, b, T and ratios from held-out errors ``[n, R]``, NaN where a reward is unknown, and variances."""
        for column in range(errors.shape[1]):
            known = ~errors[:, column].isnan()
            squared, variance = errors[known, column].double() ** 2, disagreement[known, column].double()
            if len(squared) < 2:
                continue
            fits = [_likelihood(squared, variance, scale) for scale in _DISAGREEMENT_SCALES]
            _, noise, scale = min(fits)
            ratios = (squared / (noise + scale * variance)).sqrt().sort().values
            rank = min(len(ratios), math.ceil(LEVEL * (len(ratios) + 1)))
            self.residual_variance[column] = noise
            self.disagreement_scale[column] = scale
            self.temperature[column] = max(float(ratios[rank - 1]) / Z_LEVEL, 1e-3)
            self.ratios[column] = conformal_quantiles(ratios / float(self.temperature[column]), math.inf)


def _likelihood(squared: Tensor, variance: Tensor, scale: float) -> tuple[float, float, float]:
    """Return the negative log-likelihood up to a constant, a, and b."""
    noise = max(float((squared - scale * variance).mean()), 0.05 * float(squared.mean()), _FLOOR)
    total = noise + scale * variance
    return float((squared / total + total.log()).mean()), noise, scale


def calibrate(
    calibration: Calibration,
    monotone: MonotoneMap | None,
    mean: Tensor,
    variance: Tensor,
    target: Tensor,
    halves: Tensor,
) -> None:
    """Fit the mean's map, if there is one, and the standard deviation on held-out samples.

    Args:
        calibration: is fitted to the errors of the calibrated mean.
        monotone: is fitted to the mean; the errors are those of maps fitted to the other half, not its own.
        mean: ensemble means ``[n, R]``, standardised.
        variance: ensemble variances ``[n, R]``.
        target: standardised rewards ``[n, R]``, NaN where one does not apply.
        halves: bool ``[n]``.
    """
    corrected = mean
    if monotone is not None:
        corrected = torch.empty_like(mean)
        for half in (True, False):
            other = MonotoneMap(mean.shape[1]).to(mean)
            other.fit(mean[halves != half], target[halves != half])
            corrected[halves == half] = other(mean[halves == half])
        monotone.fit(mean, target)
    calibration.fit(corrected - target, variance)


def crossfit(
    mean: Tensor, variance: Tensor, target: Tensor, halves: Tensor, *, isotonic: bool = False
) -> tuple[Tensor, Tensor]:
    """Return calibrated means and standard deviations ``[n, R]``, each half's by what the other half calibrated.

    Arguments are those of :func:`calibrate`; ``isotonic`` also maps the mean.
    """
    means, stds = mean.clone(), torch.empty_like(mean)
    for half in (True, False):
        judged = halves == half
        calibration = Calibration(mean.shape[1]).to(mean)
        monotone = MonotoneMap(mean.shape[1]).to(mean) if isotonic else None
        rest = mean[~judged], variance[~judged], target[~judged]
        calibrate(calibration, monotone, *rest, torch.arange(len(rest[0])) % 2 == 0)
        means[judged] = mean[judged] if monotone is None else monotone(mean[judged])
        stds[judged] = calibration(variance[judged])
    return means, stds


def crossfit_coverage(errors: Tensor, disagreement: Tensor) -> Tensor:
    """Return the coverage ``[R]`` of the 90 % interval, each half of the held-out data judged by the other's fit."""
    halves = torch.arange(len(errors)) % 2 == 0
    _, std = crossfit(torch.zeros_like(errors), disagreement, -errors, halves)
    inside = (errors.abs() <= Z_LEVEL * std).to(errors.dtype)
    return torch.where(errors.isnan(), math.nan, inside).nanmean(dim=0)
