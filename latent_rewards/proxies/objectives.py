"""What a proxy of scores minimises: pure functions of its outputs and the standardised rewards.

All are computed in float32, or in float64 where the arguments are; an unknown (NaN) reward has no weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from latent_rewards.contracts import ConfigError

SCORE_OBJECTIVES = ("mse", "huber", "gaussian")
"""Objectives of rewards that are numbers."""

PREFERENCE_OBJECTIVES = ("bradley_terry", "thurstone")
"""Objectives of pairs; see :mod:`latent_rewards.proxies.preferences`."""

MAX_LOG_VARIANCE = 9.0
"""A predicted log-variance is clamped to this magnitude: e^-4.5, a hundredth of the reward's own, bounds the std."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Outputs ``[B, K]`` of a network and targets ``[B, R]`` -> scalar."""


def masked_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error over the entries of ``target`` that are not NaN; 0 if there are none."""
    residual, known = _residual(predicted, target)
    return _mean(residual.square(), known)


def huber_error(predicted: Tensor, target: Tensor, delta: float) -> Tensor:
    """Return the mean Huber loss (Huber 1964) over the known entries: e^2 / 2, beyond ``delta`` linear in e.

    Args:
        predicted: any shape.
        target: of the same shape, NaN where unknown.
        delta: positive, in the units of ``target``.
    """
    residual, known = _residual(predicted, target)
    return _mean(functional.huber_loss(residual, torch.zeros_like(residual), reduction="none", delta=delta), known)


def gaussian_error(mean: Tensor, log_variance: Tensor, target: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of Normal(mean, exp(log_variance)), nats, over the known entries.

    The loss of a network that predicts its own noise (Nix & Weigend 1994; Lakshminarayanan et al. 2017, eq. 1).

    Args:
        mean: any shape.
        log_variance: of the same shape.
        target: of the same shape, NaN where unknown.
    """
    residual, known = _residual(mean, target)
    log_variance = _precise(log_variance)
    nll = 0.5 * (residual.square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi))
    return _mean(nll, known)


def check_objective(objective: str, preferences: bool) -> None:
    """Raise ConfigError unless ``objective`` fits data that are preferences, or scores."""
    fitting = PREFERENCE_OBJECTIVES if preferences else SCORE_OBJECTIVES
    if objective not in fitting:
        data = "Preferences" if preferences else "rewards that are numbers"
        raise ConfigError(f"objective {objective!r} cannot be fitted to {data}; choose one of {', '.join(fitting)}")


def split_outputs(outputs: Tensor, num_rewards: int) -> tuple[Tensor, Tensor | None]:
    """Return ``[..., R]`` means and ``[..., R]`` clamped log-variances, None for a network that predicts none."""
    if outputs.shape[-1] == num_rewards:
        return outputs, None
    mean, raw = outputs.split(num_rewards, dim=-1)
    return mean, raw.clamp(-MAX_LOG_VARIANCE, MAX_LOG_VARIANCE)


def num_outputs(objective: str, num_rewards: int) -> int:
    """Return K: two outputs per reward where the objective needs a variance, else one."""
    return num_rewards * (2 if objective in ("gaussian", "thurstone") else 1)


def regression_loss(objective: str, huber_delta: float) -> Loss:
    """Return the loss of an objective of :data:`SCORE_OBJECTIVES`."""
    if objective == "huber":
        return partial(huber_error, delta=huber_delta)
    return _gaussian_outputs if objective == "gaussian" else masked_error


def _gaussian_outputs(outputs: Tensor, target: Tensor) -> Tensor:
    mean, log_variance = split_outputs(outputs, target.shape[-1])
    assert log_variance is not None  # noqa: S101 - for the type checker: the head has two outputs per reward
    return gaussian_error(mean, log_variance, target)


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _residual(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    known = ~target.isnan()
    return _precise(predicted) - _precise(target.nan_to_num(0.0)), known


def _mean(values: Tensor, known: Tensor) -> Tensor:
    return (values * known).sum() / known.sum().clamp(min=1)
