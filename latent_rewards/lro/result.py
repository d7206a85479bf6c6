"""What a run of a trainer returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class TrainResult:
    """What a run did.

    Attributes:
        history: what was logged, one dict per update, with ``"step"``.
        best_step: updates done when the holdout was best, which is where the policy is now; None without a holdout.
        num_queries: true queries of the refreshes.
        stopped_early: the holdout stopped the run.
        proxy_curve: ``(step, mean reward)`` the policy was optimised for, per update.
        true_curve: per refresh, on fresh samples as the policy draws them and before the proxy learns from them,
            ``{"step", "proxy": {name: mean}, "true": {name: mean}, "mae": {name: mean absolute error}}``.
        holdout_curve: per evaluation, ``{"step", "score", "values": {name: mean}}``.
    """

    history: list[dict[str, Any]]
    best_step: int | None
    num_queries: int
    stopped_early: bool
    proxy_curve: list[tuple[int, float]]
    true_curve: list[dict[str, Any]]
    holdout_curve: list[dict[str, Any]]
