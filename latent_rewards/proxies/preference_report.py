"""How good a proxy of preferences is, on pairs whose samples it has not seen, beside a logistic regression."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latent_rewards.proxies.preferences import TIE, outcome_error


def pairwise_accuracy(scores: Tensor, outcome: Tensor) -> float:
    """Return the share of pairs with a winner whose winner has the higher score; ties are left out, equal scores half.

    Args:
        scores: ``[n, 2]``.
        outcome: ``[n]``: 1, 0 or 0.5.

    Returns:
        A number in [0, 1], NaN where no pair has a winner.
    """
    decided = outcome != 0.5
    if not bool(decided.any()):
        return math.nan
    ahead = (scores[decided, 0] - scores[decided, 1]).sign() * (2 * outcome[decided] - 1).to(scores)
    return float(((ahead + 1) / 2).double().mean())


def constant_log_loss(outcome: Tensor, tie_rate: float) -> float:
    """Return the log-loss, nats per pair, of a judge that knows the rate of ties only.

    Either sample wins with ``(1 - tie_rate) / 2``: who stands first carries no information.
    """
    win = math.log((1 - tie_rate) / 2)
    row = torch.tensor([win, math.log(tie_rate) if tie_rate else -math.inf, win], dtype=torch.float64)
    return float(outcome_error(row.expand(len(outcome), 3), outcome))


def evaluate_preferences(
    scores: Tensor,
    log_probabilities: Tensor,
    ridge: tuple[Tensor, Tensor],
    outcome: Tensor,
    tie_rate: float,
    num_train: int,
) -> dict[str, Any]:
    """Return the report's entry of a proxy of preferences.

    Args:
        scores: ``[n, 2]``, of n held-out pairs.
        log_probabilities: ``[n, 3]``, cross-fitted.
        ridge: the same two of the baseline, a penalised logistic regression.
        outcome: ``[n]``.
        tie_rate: of the training pairs.
        num_train: training pairs.

    Returns:
        ``pairwise_accuracy`` (pairs with a winner), ``log_loss`` (nats per pair, with ties), ``tie_rate`` (observed)
        and ``predicted_tie_rate``, ``num_train`` and ``num_holdout`` (pairs), ``ridge`` with the first two,
        ``constant`` with ``log_loss``; ``spearman``, ``r2``, ``mae`` and ``coverage``, which have no meaning without
        true scores, are NaN here and in ``ridge``.
    """
    unknown = {"spearman": math.nan, "r2": math.nan, "mae": math.nan}
    return {
        **unknown,
        "coverage": math.nan,
        "pairwise_accuracy": pairwise_accuracy(scores, outcome),
        "log_loss": float(outcome_error(log_probabilities, outcome)),
        "tie_rate": float((outcome == 0.5).double().mean()),
        "predicted_tie_rate": float(log_probabilities[:, TIE].exp().mean()),
        "num_train": num_train,
        "num_holdout": len(outcome),
        "ridge": {
            **unknown,
            "pairwise_accuracy": pairwise_accuracy(ridge[0], outcome),
            "log_loss": float(outcome_error(ridge[1], outcome)),
        },
        "constant": {"pairwise_accuracy": 0.5, "log_loss": constant_log_loss(outcome, tie_rate)},
    }


def preference_rows(report: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the header and one row of cells per entry, for :func:`latent_rewards.proxies.format_report`."""
    header = ("preference", "pairs right", "(linear)", "log-loss", "(linear)", "(constant)", "ties", "predicted",
              "train", "held out")  # fmt: skip
    rows: list[tuple[str, ...]] = [header]
    for name, entry in report.items():
        ridge = entry["ridge"]
        numbers = [
            entry["pairwise_accuracy"],
            ridge["pairwise_accuracy"],
            entry["log_loss"],
            ridge["log_loss"],
            entry["constant"]["log_loss"],
            entry["tie_rate"],
            entry["predicted_tie_rate"],
        ]
        rows.append((name, *(f"{value:.3g}" for value in numbers), str(entry["num_train"]), str(entry["num_holdout"])))
    return rows
