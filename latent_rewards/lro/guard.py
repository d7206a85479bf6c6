"""What keeps an optimised proxy honest: when to refresh it, how far it is from the truth, when to stop and return.

A policy that climbs a frozen proxy leaves the samples the proxy was trained on; its score then rises while the true
metric falls. The guard schedules true queries, records proxy minus true on fresh samples, follows a held-out true
metric, stops when that no longer improves, and puts the best policy back.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from latent_rewards.contracts import DataError

MIN_REFRESH_QUERIES = 8
"""Fewest fresh samples a proxy is updated on."""


@dataclass
class RefreshSchedule:
    """When the proxy is refreshed, and with how many true queries.

    Attributes:
        every: updates between refreshes; none takes place before the first update.
        queries: samples per refresh.
        max_queries: samples in all; None is unlimited. The last refresh takes what is left if that is at least
            :data:`MIN_REFRESH_QUERIES`.
    """

    every: int
    queries: int
    max_queries: int | None = None

    def due(self, step: int, spent: int) -> int:
        """Return how many samples to query before update ``step``, having ``spent`` so many; 0 is no refresh."""
        if step == 0 or step % self.every:
            return 0
        left = self.queries if self.max_queries is None else min(self.queries, self.max_queries - spent)
        return left if left >= MIN_REFRESH_QUERIES else 0


@runtime_checkable
class Floors(Protocol):
    """A reward with floors for means, such as :class:`~latent_rewards.lro.constraints.Lagrangian`."""

    @property
    def floors(self) -> Mapping[str, float]:
        """Reward name -> the least its mean should be."""
        ...

    def shortfall(self, means: Mapping[str, float], start: Mapping[str, float], /) -> float:
        """Return how far the worst floor is missed, 0 if none is."""
        ...


@dataclass
class Guard:
    """Follows the true metrics of one policy.

    Attributes:
        policy: its trainable parameters are what :meth:`rollback` restores.
        schedule: see :class:`RefreshSchedule`.
        patience: holdout evaluations without a new best until :attr:`stopped`, those that miss a floor that the best
            keeps not counted; None never stops.
        min_improvement: by how much an evaluation must beat the best.
        floors: an evaluation that keeps them is better than one that does not, and of two that do not, the one that
            misses less.
        lower_is_better: names of held-out rewards that should fall.
        num_queries: true queries spent on refreshes.
        gaps: one entry per refresh: ``{"step", "proxy": {name: mean}, "true": {name: mean}, "mae": {name: error}}``,
            the error being the proxy's mean absolute one before it learns from these samples.
        holdout: one entry per evaluation: ``{"step", "score", "values": {name: mean}}``.
        best_step: updates done when the best evaluation was made; None before the first.
        stopped: patience ran out.
    """

    policy: nn.Module
    schedule: RefreshSchedule
    patience: int | None = None
    min_improvement: float = 0.0
    floors: Floors | None = None
    lower_is_better: frozenset[str] = frozenset()
    num_queries: int = 0
    gaps: list[dict[str, Any]] = field(default_factory=list)
    holdout: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    stopped: bool = False
    _best_score: float = -math.inf
    _best_shortfall: float = math.inf
    _best_parameters: dict[str, Tensor] = field(default_factory=dict)
    _since_best: int = 0
    _warned: bool = False

    def queries_due(self, step: int) -> int:
        """Return how many true queries to make before update ``step``; warns once when the budget runs out."""
        due = self.schedule.due(step, self.num_queries)
        wanted = step > 0 and step % self.schedule.every == 0
        if wanted and not due and not self._warned:
            self._warned = True
            warnings.warn(
                f"the budget of {self.schedule.max_queries} true queries is spent at update {step}: the proxy is "
                "frozen from here on and can be exploited; raise max_queries or stop training here",
                stacklevel=2,
            )
        return due

    def record_gap(
        self, step: int, proxy: Mapping[str, Tensor], true: Mapping[str, Tensor], *, num_queries: int | None = None
    ) -> dict[str, float]:
        """Record proxy scores and true rewards ``{name: [B]}`` of the same fresh samples; return the values to log.

        They must be samples as the policy draws them: of samples that the proxy chose the gap would be another one. A
        sample whose true reward is NaN enters neither mean. ``num_queries`` counts those that were scored but are not
        given here too; None is B.
        """
        entry: dict[str, Any] = {"step": step, "proxy": {}, "true": {}, "mae": {}}
        logs: dict[str, float] = {}
        for name, scores in proxy.items():
            truth = true[name].to(scores)
            applies = ~torch.isnan(truth)
            entry["proxy"][name] = float(scores[applies].mean())
            entry["true"][name] = float(truth[applies].mean())
            entry["mae"][name] = float((scores - truth)[applies].abs().mean())
            logs[f"true/{name}"] = entry["true"][name]
            logs[f"gap/{name}"] = entry["proxy"][name] - entry["true"][name]
        self.gaps.append(entry)
        self.num_queries += len(next(iter(proxy.values()))) if num_queries is None else num_queries
        return {**logs, "queries": float(self.num_queries)}

    def evaluated(self, step: int) -> bool:
        """Return whether the policy after ``step`` updates has a holdout evaluation already."""
        return any(entry["step"] == step for entry in self.holdout)

    def record_holdout(self, step: int, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Record held-out rewards ``{name: [B]}`` of the policy after ``step`` updates; return the values to log.

        The score is the mean over rewards of their means over samples, NaN excluded, those that should fall negative;
        higher is better. Rewards that have a floor do not enter it if there are others. A new best keeps a copy of the
        policy's trainable parameters.

        Raises:
            DataError: a reward applies to no sample, or is infinite.
        """
        means = {name: float(column.double().nanmean()) for name, column in values.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise DataError(f"holdout reward {name!r} has mean {mean} at step {step}; it needs finite values")
        score, shortfall = self._judged(means)
        self.holdout.append({"step": step, "score": score, "values": means})
        if self._improves(score, shortfall):
            self._best_score, self._best_shortfall = score, shortfall
            self.best_step, self._since_best = step, 0
            self._best_parameters = {name: p.detach().clone() for name, p in self._trainable()}
        else:
            # A price answers a floor that is missed: that is no reason to stop while there is a policy that kept it.
            self._since_best += shortfall == 0 or self._best_shortfall > 0
            self.stopped = self._out_of_patience()
        return {f"holdout/{name}": mean for name, mean in means.items()}

    def _out_of_patience(self) -> bool:
        return self.patience is not None and self._since_best >= self.patience

    def _judged(self, means: Mapping[str, float]) -> tuple[float, float]:
        """Return the score of an evaluation, and by how much it misses the floors."""
        floors = {} if self.floors is None else self.floors.floors
        gains = {name: -mean if name in self.lower_is_better else mean for name, mean in means.items()}
        free = [gain for name, gain in gains.items() if name not in floors] or list(gains.values())
        start = self.holdout[0]["values"] if self.holdout else means
        return sum(free) / len(free), 0.0 if self.floors is None else self.floors.shortfall(means, start)

    def _improves(self, score: float, shortfall: float) -> bool:
        if self.best_step is None or shortfall != self._best_shortfall:
            return shortfall < self._best_shortfall
        return score > self._best_score + self.min_improvement

    @torch.no_grad()
    def rollback(self) -> bool:
        """Put the parameters of the best evaluation back; returns whether there was one."""
        for name, parameter in self._trainable():
            if name in self._best_parameters:
                parameter.copy_(self._best_parameters[name])
        return bool(self._best_parameters)

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.policy.named_parameters() if p.requires_grad]

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the policy and the settings."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; whether to stop is judged by the patience of now."""
        for name in _STATE:
            if name in state:  # checkpoints from before floors were followed have no shortfall
                setattr(self, name, state[name])
        if "_best_shortfall" not in state and self.best_step is not None:
            self._best_shortfall = 0.0
        self.stopped = self._out_of_patience()


_STATE = (
    "num_queries",
    "gaps",
    "holdout",
    "best_step",
    "stopped",
    "_best_score",
    "_best_shortfall",
    "_best_parameters",
    "_since_best",
)
