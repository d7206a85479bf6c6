"""Floors for means of rewards, enforced by Lagrange multipliers: raise one reward while another keeps its level.

Maximise ``E[objective]`` subject to ``E[reward_i] >= floor_i``: the policy climbs
``objective + sum_i multiplier_i (reward_i - floor_i) / unit_i`` while each multiplier, the price of its floor, rises as
long as the floor is missed and falls back to 0 once it is exceeded (dual ascent; Arrow, Hurwicz and Uzawa 1958). Unlike
a fixed penalty this ends at the floor itself, whatever the units are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from latent_rewards.contracts import ConfigError, DataError, unknown_name
from latent_rewards.dataset import RewardDataset
from latent_rewards.rewards import Constraint, Tchebycheff, WeightedSum, check_numbers, neutral, select_rewards

_ROUNDING = 1e-9
_BEFORE = {"baselines": None, "initial": 0.0}
"""What checkpoints meant that do not have these settings."""


def relative_floors(dataset: RewardDataset, shares: Mapping[str, float]) -> dict[str, float]:
    """Return floors relative to the policy that ``dataset`` was collected from, such as the student before tuning.

    A share of 0.98 puts the floor 2 % below the mean, also where that is negative: ``mean - (1 - share) |mean|``.

    Args:
        dataset: true rewards of the starting policy's samples; NaN enters no mean.
        shares: reward name -> finite share; above 1 asks for more than there was.

    Raises:
        ConfigError: no shares, or one that is not finite.
        DataError: the dataset lacks a reward, or the reward applies to none of its samples.
    """
    means = true_means(dataset, check_numbers(shares, "share"))
    return {name: means[name] - (1 - share) * abs(means[name]) for name, share in shares.items()}


def true_means(dataset: RewardDataset, names: Iterable[str]) -> dict[str, float]:
    """Return the mean of each named reward over a dataset's samples; NaN enters no mean.

    Raises:
        DataError: the dataset lacks a reward, or the reward applies to none of its samples.
    """
    means = {}
    for name in names:
        if name not in dataset.reward_names:
            raise DataError(unknown_name("reward", name, dataset.reward_names))
        means[name] = float(dataset.rewards[name].double().nanmean())
        if not math.isfinite(means[name]):
            raise DataError(f"reward {name!r} applies to no sample of the dataset; give its mean as a number")
    return means


class Lagrangian:
    """An objective whose guarded rewards keep their floors in the mean, at prices that are learnt while training.

    A trainer moves the prices once per update. With ``v = (floor - mean) / unit``,
    ``integral <- max(0, integral + learning_rate v)`` and ``multiplier = max(0, integral + damping v)``, which is PI
    control (Stooke, Achiam and Abbeel 2020, 2007.03964). The mean is the proxy's, plus what it was wrong by at the last
    refresh, on samples it had not learnt from: so it is the true floor that is kept. (What it is wrong by once it has
    learnt from them says nothing of the samples that come: there a policy finds what the proxy does not see.) Without
    an oracle the mean is the proxy's alone. ``smoothing`` makes moving averages of both, over updates and refreshes.

    A few prompts say little of all: a clip "moving fast" has more motion whatever the policy does. With ``baselines``
    the mean is told by how far the policy's scores lie from the reference's on the same prompts and noise, a control
    variate: ``baseline + mean(policy) - mean(reference)``, corrected by what the proxy is wrong by on the policy's
    samples and not on the reference's, those of the trainer's dataset. That takes one rollout of the reference per
    update.

    Logged are ``multiplier/<name>``, as an update used it, and ``violation/<name>``, floor minus mean: positive below
    the floor. All this is part of a checkpoint, and the same in every rank of a launch.

    Args:
        objective: what is raised.
        floors: reward name -> the least its mean should be; see :func:`relative_floors`.
        units: reward name -> what counts as one of it, positive, such as its standard deviation over the student's
            samples; 1 where none is given. A multiplier is the price of one unit.
        baselines: reward name -> true mean of the reference policy, for every floor (see :func:`true_means`); None
            takes the means as they are. The reference is the trainer's: the policy as it was before.
        initial: the price that every floor starts at, not negative. Above 0 it holds a reward before its floor is
            missed: one that is 0 or 1 gives no warning before it falls.
        learning_rate: by how much a multiplier rises per update for one unit of violation, positive. Too much makes
            multiplier and policy swing around each other.
        damping: answers the violation at once and so stills those swings without moving where they end; 0 is plain
            dual ascent.
        smoothing: share of the past in the mean and in its correction, in [0, 1). A few samples say little of all, but
            a mean that lags lets a policy that moves fast pass.
        maximum: multipliers stop there, for floors that cannot be reached; None lets them grow.

    Raises:
        ConfigError: no floors, one that is not finite, a unit of no floor, a floor without its baseline, or a setting
            outside its range.
    """

    def __init__(
        self,
        objective: WeightedSum | Tchebycheff | Constraint,
        floors: Mapping[str, float],
        *,
        units: Mapping[str, float] | None = None,
        baselines: Mapping[str, float] | None = None,
        initial: float = 0.0,
        learning_rate: float = 1.0,
        damping: float = 0.0,
        smoothing: float = 0.0,
        maximum: float | None = None,
    ) -> None:
        if not 0 <= initial < math.inf:
            raise ConfigError(f"initial must be finite and not negative; got {initial}")
        if not 0 < learning_rate < math.inf:
            raise ConfigError(f"learning_rate must be positive and finite; got {learning_rate}")
        if not 0 <= damping < math.inf:
            raise ConfigError(f"damping must be finite and not negative; got {damping}")
        if not 0 <= smoothing < 1:
            raise ConfigError(f"smoothing must lie in [0, 1); got {smoothing}")
        if maximum is not None and not maximum > 0:
            raise ConfigError(f"maximum must be positive, or None for no bound; got {maximum}")
        self.objective, self.floors = objective, check_numbers(floors, "floor")
        self.learning_rate, self.damping, self.maximum = float(learning_rate), float(damping), maximum
        self.smoothing = float(smoothing)
        self.units = {name: float((units or {}).get(name, 1.0)) for name in self.floors}
        for name, unit in {**(units or {}), **self.units}.items():
            if name not in self.floors:
                raise ConfigError(f"units: {unknown_name('floor', name, self.floors)}")
            if not 0 < unit < math.inf:
                raise ConfigError(f"the unit of {name!r} must be positive and finite; got {unit}")
        self.baselines = None if baselines is None else check_numbers(baselines, "baseline")
        if self.baselines is not None and self.baselines.keys() != self.floors.keys():
            raise ConfigError(
                f"baselines are of {', '.join(self.baselines)}, floors of {', '.join(self.floors)}; give each floor one"
            )
        self.initial = self._bounded(float(initial))
        self.multipliers = dict.fromkeys(self.floors, self.initial)
        self._integrals = dict(self.multipliers)
        self._corrections: dict[str, float] = {}
        self._means: dict[str, float] = {}

    @property
    def weights(self) -> dict[str, float]:
        """The objective's weights, and 0 for a reward that is only guarded."""
        return {**dict.fromkeys(self.floors, 0.0), **self.objective.weights}

    @property
    def needs_reference(self) -> bool:
        """Whether :meth:`after_update` is to be told what the reference's samples score."""
        return self.baselines is not None

    def __call__(self, rewards: Mapping[str, Tensor]) -> Tensor:
        """Return ``[B]``; a NaN in a guarded reward counts as the mean of the others.

        Raises:
            DataError: a reward is missing.
        """
        total = self.objective(rewards)
        rows, _ = neutral(select_rewards(rewards, self.floors))
        prices = rows.new_tensor([self.multipliers[name] / self.units[name] for name in self.floors])[:, None]
        floors = rows.new_tensor(list(self.floors.values()))[:, None]
        return total + (prices * (rows - floors)).sum(dim=0)

    def after_update(
        self, means: Mapping[str, float], reference: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Move the multipliers by the violations of an update's samples; return what to log.

        Args:
            means: reward name -> mean of the proxy's scores over all ranks. NaN leaves that multiplier as it is.
            reference: likewise, of the reference's samples of the same prompts and noise; needed with ``baselines``.

        Raises:
            DataError: the mean of a guarded reward is missing, or those of the reference are.
        """
        logs: dict[str, float] = {}
        for name, floor in self.floors.items():
            mean = self._mean(name, means, reference)
            violation = floor - self._smoothed(name, mean) - self._corrections.get(name, 0.0)
            logs |= {f"multiplier/{name}": self.multipliers[name], f"violation/{name}": violation}
            if not math.isnan(violation):
                missed = violation / self.units[name]
                self._integrals[name] = self._bounded(self._integrals[name] + self.learning_rate * missed)
                self.multipliers[name] = self._bounded(self._integrals[name] + self.damping * missed)
        return logs

    def after_refresh(
        self, proxy: Mapping[str, float], true: Mapping[str, float], reference_gap: Mapping[str, float] | None = None
    ) -> None:
        """Take in how far the proxy's means are from the true ones, on the same samples, new to it.

        Args:
            proxy: reward name -> mean score of the policy's samples.
            true: likewise, of the true rewards.
            reference_gap: true mean minus mean score of the reference's samples, which ``baselines`` cancel out of a
                comparison, pessimism included; None is none.
        """
        for name in self.floors:
            gap = true[name] - proxy[name]
            if self.baselines is not None and reference_gap is not None:
                gap -= reference_gap[name]
            if not math.isnan(gap):
                self._corrections[name] = self._average(self._corrections.get(name, gap), gap)

    def shortfall(self, means: Mapping[str, float], start: Mapping[str, float], /) -> float:
        """Return by how many units the worst floor is missed, 0 if none is.

        Args:
            means: reward name -> true mean over some samples; a floor of none of them counts as kept.
            start: likewise of the policy as it was before, on the same prompts and noise: with ``baselines`` the floor
                lies as far from it there as everywhere.
        """
        missed = [0.0]
        for name, floor in self.floors.items():
            if name in means:
                here = floor if self.baselines is None else start[name] + floor - self.baselines[name]
                missed.append((here - means[name]) / self.units[name])
        worst = max(missed)
        return worst if worst > _ROUNDING else 0.0

    def _mean(self, name: str, means: Mapping[str, float], reference: Mapping[str, float] | None) -> float:
        """Return the mean by the proxy, as far as possible without what the prompts and the noise alone make of it."""
        for known in (means, reference) if self.baselines is not None else (means,):
            if known is None:
                raise DataError("baselines were given: after_update needs the means of the reference's samples too")
            if name not in known:
                raise DataError(unknown_name("reward", name, known))
        if self.baselines is None or reference is None:
            return means[name]
        return self.baselines[name] + means[name] - reference[name]

    def _smoothed(self, name: str, mean: float) -> float:
        """Return the moving average with ``mean`` taken in; NaN stays NaN and is not."""
        if math.isnan(mean):
            return mean
        self._means[name] = self._average(self._means.get(name, mean), mean)
        return self._means[name]

    def _average(self, before: float, value: float) -> float:
        return self.smoothing * before + (1 - self.smoothing) * value

    def _bounded(self, value: float) -> float:
        return max(0.0, value if self.maximum is None else min(value, self.maximum))

    def _settings(self) -> dict[str, Any]:
        names = ("floors", "units", "baselines", "initial", "learning_rate", "damping", "smoothing", "maximum")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Return multipliers and corrections, and the settings they belong to."""
        state = {
            "multipliers": self.multipliers,
            "integrals": self._integrals,
            "corrections": self._corrections,
            "means": self._means,
        }
        return {"settings": self._settings(), **{name: dict(values) for name, values in state.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ConfigError: it belongs to other floors or settings; the message names them.
        """
        for name, value in self._settings().items():
            if state["settings"].get(name, _BEFORE.get(name)) != value:
                raise ConfigError(
                    f"the run in output_dir was started with {name}={state['settings'].get(name)!r} of its constraint, "
                    f"this one has {value!r}; use the old value to resume, or another output_dir"
                )
        self.multipliers = dict(state["multipliers"])
        self._integrals, self._corrections = dict(state["integrals"]), dict(state["corrections"])
        self._means = dict(state["means"])

    def __repr__(self) -> str:
        """Return the constructor call."""
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings().items() if name != "floors")
        return f"Lagrangian({self.objective!r}, {self.floors}, {settings})"
