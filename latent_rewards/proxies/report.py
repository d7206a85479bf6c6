"""How good a proxy is, on samples it has not seen, beside a ridge regression on the same split."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from latent_rewards.proxies.preference_report import preference_rows


def spearman(predicted: Tensor, target: Tensor) -> float:
    """Return Spearman's rank correlation of two ``[n]`` tensors; NaN if one of them is constant."""
    from scipy.stats import spearmanr

    if len(target) < 2 or not bool((predicted != predicted[0]).any()) or not bool((target != target[0]).any()):
        return math.nan
    return float(spearmanr(predicted.double().cpu().numpy(), target.double().cpu().numpy()).statistic)


def accuracy(predicted: Tensor, target: Tensor) -> dict[str, float]:
    """Return spearman, r2 (at most 1) and mae (in the reward's units) over the samples whose target is not NaN."""
    known = ~target.isnan()
    predicted, target = predicted[known].double(), target[known].double()
    if len(target) < 2:
        return {"spearman": math.nan, "r2": math.nan, "mae": math.nan}
    residual = target - predicted
    spread = (target - target.mean()).square().sum().clamp(min=1e-30)
    return {
        "spearman": spearman(predicted, target),
        "r2": float(1 - residual.square().sum() / spread),
        "mae": float(residual.abs().mean()),
    }


def evaluate(
    names: tuple[str, ...], predicted: Tensor, ridge: Tensor, target: Tensor, coverage: Tensor, num_train: Tensor
) -> dict[str, dict[str, Any]]:
    """Return the report of a proxy.

    Args:
        names: R reward names.
        predicted: ``[n, R]`` predictions for the held-out samples.
        ridge: the baseline's.
        target: their true rewards, NaN where one does not apply.
        coverage: ``[R]``, fraction of held-out samples inside the 90 % interval, cross-fitted.
        num_train: ``[R]``, training samples each reward has.

    Returns:
        ``{reward name: {"spearman", "r2", "mae", "coverage", "num_train", "num_holdout", "ridge": {"spearman", "r2",
        "mae"}}}``.
    """
    return {
        name: {
            **accuracy(predicted[:, i], target[:, i]),
            "coverage": float(coverage[i]),
            "num_train": int(num_train[i]),
            "num_holdout": int((~target[:, i].isnan()).sum()),
            "ridge": accuracy(ridge[:, i], target[:, i]),
        }
        for i, name in enumerate(names)
    }


def format_report(report: dict[str, dict[str, Any]]) -> str:
    """Return a report as a table of text, one line per reward; preferences have a table of their own."""
    preferences = {name: entry for name, entry in report.items() if "log_loss" in entry}
    if preferences:
        scores = {name: entry for name, entry in report.items() if name not in preferences}
        return _table(preference_rows(preferences)) + (f"\n\n{format_report(scores)}" if scores else "")
    header = ("reward", "spearman", "(ridge)", "r2", "(ridge)", "mae", "90% covers", "train", "held out")
    rows: list[tuple[str, ...]] = [header]
    for name, entry in report.items():
        ridge = entry["ridge"]
        numbers = [entry["spearman"], ridge["spearman"], entry["r2"], ridge["r2"], entry["mae"], entry["coverage"]]
        counts = [str(entry["num_train"]), str(entry["num_holdout"])]
        rows.append((name, *(f"{value:.3g}" for value in numbers), *counts))
    return _table(rows)


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
