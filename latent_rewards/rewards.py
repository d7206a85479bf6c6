"""How several rewards become the one that is optimised: callables ``{reward name: [B]} -> [B]``.

A NaN means that a metric does not apply to a sample. It never enters an average: the sample takes no side on that
reward (it counts as the mean of those the reward applies to), and a sample to which no reward applies is NaN as a
whole, which the advantages exclude.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from latent_rewards.contracts import ConfigError, DataError, unknown_name


def check_numbers(values: Mapping[str, float], what: str) -> dict[str, float]:
    """Return one finite number per reward as floats.

    Raises:
        ConfigError: there is none, or one is not finite; ``what`` is what the message calls them.
    """
    if not values:
        raise ConfigError(f"the {what}s are empty; name at least one reward, such as {{'legibility': 1.0}}")
    for name, value in values.items():
        if not math.isfinite(value):
            raise ConfigError(f"the {what} of {name!r} must be finite; got {value}")
    return {name: float(value) for name, value in values.items()}


def select_rewards(rewards: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """Return the named rewards as rows ``[R, B]``.

    Raises:
        DataError: one is missing.
    """
    for name in names:
        if name not in rewards:
            raise DataError(unknown_name("reward", name, rewards))
    return torch.stack([rewards[name] for name in names])


def neutral(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``rows`` ``[R, B]`` with NaN replaced by the row's mean, and which samples have any reward ``[B]``."""
    valid = ~torch.isnan(rows)
    mean = rows.detach().nanmean(dim=1, keepdim=True).nan_to_num(nan=0.0)
    return torch.where(valid, rows, mean), valid.any(dim=0)


def exclude(total: Tensor, applies: Tensor) -> Tensor:
    """Return ``total`` with NaN where nothing applies."""
    return torch.where(applies, total, torch.full_like(total, math.nan))


class WeightedSum:
    """The sum of ``weight * reward``; rewards without a weight are ignored.

    ``normalize="zscore"`` first subtracts each reward's mean over the batch and divides by its standard deviation, so
    that weights compare rewards of different ranges. Both statistics are constants to the gradient: a batch's z-scores
    sum to zero whatever the latents are. A reward that is constant over the batch contributes zero.

    ``normalize="rank"`` replaces each reward by its rank over the batch, from -1/2 (lowest) to 1/2 (highest), ties
    averaged: only the order counts, so no outlier and no scale does. Ranks are steps, whose slope is 0; a gradient
    estimator is given one constant slope per reward instead, that of the line through ranks and values (values fitted
    on ranks). The gradient then is the reward's own, in units of its spread over the batch.

    Args:
        weights: reward name -> weight; negative for a reward that should fall.
        normalize: None, ``"zscore"`` or ``"rank"``.

    Raises:
        ConfigError: no weights, one that is not finite, or an unknown ``normalize``.
    """

    def __init__(self, weights: Mapping[str, float], normalize: Literal["zscore", "rank"] | None = None) -> None:
        if normalize not in (None, "zscore", "rank"):
            raise ConfigError(f"normalize must be None, 'zscore' or 'rank'; got {normalize!r}")
        self.weights = check_numbers(weights, "weight")
        self.normalize = normalize

    def __call__(self, rewards: Mapping[str, Tensor]) -> Tensor:
        """Return ``[B]``; NaN where every reward is NaN.

        Raises:
            DataError: a weighted reward is missing.
        """
        rows, applies = self._terms(rewards)
        return exclude(rows.sum(dim=0), applies)

    def terms(self, rewards: Mapping[str, Tensor]) -> Tensor:
        """Return the terms of the sum ``[R, B]``, in the order of the weights; NaN where every reward is NaN.

        Raises:
            DataError: a weighted reward is missing.
        """
        rows, applies = self._terms(rewards)
        return exclude(rows, applies.expand_as(rows))

    def _terms(self, rewards: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        rows = select_rewards(rewards, self.weights)
        if self.normalize == "zscore":
            rows = _zscore(rows)
        elif self.normalize == "rank":
            rows = torch.stack([_centred_ranks(row) for row in rows])
        rows, applies = neutral(rows)
        weights = torch.tensor(list(self.weights.values()), dtype=rows.dtype, device=rows.device)
        return weights[:, None] * rows, applies

    def __repr__(self) -> str:
        """Return the constructor call."""
        return f"WeightedSum({self.weights}, normalize={self.normalize!r})"


def combined(
    names: Sequence[str], weights: Sequence[tuple[str, float]] | None, falling: Collection[str] = ()
) -> WeightedSum | None:
    """Return the weighted sum of several rewards in standard deviations, or None for a proxy that has one.

    Args:
        names: of the proxy's rewards.
        weights: of those that count; None is 1 for each, and -1 for those that should fall.
        falling: names of the latter.

    Raises:
        ConfigError: a weight names no reward of the proxy.
    """
    for name, _ in weights or ():
        if name not in names:
            raise ConfigError(unknown_name("reward", name, names))
    if len(names) == 1 and not weights and not falling:
        return None
    chosen = dict(weights) if weights else {name: -1.0 if name in falling else 1.0 for name in names}
    return WeightedSum(chosen, normalize="zscore" if len(names) > 1 else None)


def _zscore(rows: Tensor) -> Tensor:
    with torch.no_grad():
        valid = ~torch.isnan(rows)
        count = valid.sum(dim=1, keepdim=True)
        mean = rows.nanmean(dim=1, keepdim=True)
        squared = torch.where(valid, (rows - mean) ** 2, torch.zeros_like(rows))
        std = (squared.sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        scale = torch.where(std > 0, 1 / std, torch.zeros_like(std))
    return (rows - mean) * scale


def _centred_ranks(row: Tensor) -> Tensor:
    """Return the ranks of ``row`` ``[B]`` in [-1/2, 1/2], NaN where it is NaN; they carry a straight-through slope."""
    known = ~torch.isnan(row)
    with torch.no_grad():
        _, place, ties = row[known].unique(return_inverse=True, return_counts=True)
        ranks = (ties.cumsum(0) - 0.5 * (ties - 1))[place].to(row.dtype)
        centred = (ranks - 0.5 * (len(ranks) + 1)) / max(1, len(ranks) - 1)
        spread = (centred * row[known]).sum()
        slope = torch.where(spread > 0, centred.square().sum() / spread, torch.zeros_like(spread))
    result = torch.full_like(row, math.nan)
    result[known] = centred + slope * (row[known] - row[known].detach())
    return result


class Tchebycheff:
    """The worst weighted shortfall from a target: ``-max_i weight_i (target_i - reward_i)`` (Bowman 1976).

    Unlike a weighted sum it reaches the concave parts of a Pareto front, and a gain in one reward never pays for a loss
    in the worst one.

    Args:
        weights: reward name -> positive weight.
        targets: reward name -> the value aimed at, one for each weight.

    Raises:
        ConfigError: a weight that is not positive and finite, or targets for other names.
    """

    def __init__(self, weights: Mapping[str, float], targets: Mapping[str, float]) -> None:
        self.weights = check_numbers(weights, "weight")
        for name, weight in self.weights.items():
            if weight <= 0:
                raise ConfigError(f"the weight of {name!r} must be positive; got {weight}")
        if set(targets) != set(self.weights):
            raise ConfigError(f"targets must name {sorted(self.weights)}; they name {sorted(targets)}")
        self.targets = {name: check_numbers(targets, "target")[name] for name in self.weights}

    def __call__(self, rewards: Mapping[str, Tensor]) -> Tensor:
        """Return ``[B]``, at most 0 once no target is exceeded; NaN where every reward is NaN.

        Raises:
            DataError: a weighted reward is missing.
        """
        rows, applies = neutral(select_rewards(rewards, self.weights))
        weights = rows.new_tensor(list(self.weights.values()))[:, None]
        targets = rows.new_tensor(list(self.targets.values()))[:, None]
        return exclude(-(weights * (targets - rows)).amax(dim=0), applies)


class Constraint:
    """An objective minus ``penalty`` times how far each guarded reward lies below its floor.

    Args:
        objective: a Reward, such as :class:`WeightedSum`.
        floors: reward name -> the value it should not fall below (motion is a natural one).
        penalty: price of one unit below a floor, positive.

    Raises:
        ConfigError: no floors, one that is not finite, or a penalty that is not positive.
    """

    def __init__(self, objective: WeightedSum, floors: Mapping[str, float], penalty: float = 10.0) -> None:
        if not penalty > 0:
            raise ConfigError(f"penalty must be positive; got {penalty}")
        self.objective, self.floors, self.penalty = objective, check_numbers(floors, "floor"), penalty

    @property
    def weights(self) -> dict[str, float]:
        """The objective's weights, and 0 for a reward that is only guarded."""
        return {**dict.fromkeys(self.floors, 0.0), **self.objective.weights}

    def __call__(self, rewards: Mapping[str, Tensor]) -> Tensor:
        """Return ``[B]``; a NaN in a guarded reward is no shortfall.

        Raises:
            DataError: a reward is missing.
        """
        rows = select_rewards(rewards, self.floors)
        floors = rows.new_tensor(list(self.floors.values()))[:, None]
        shortfall = torch.where(torch.isnan(rows), torch.zeros_like(rows), (floors - rows).clamp(min=0))
        return self.objective(rewards) - self.penalty * shortfall.sum(dim=0)
