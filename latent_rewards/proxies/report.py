"""How good a proxy is, on samples it has not seen, beside a ridge regression on the same split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from latent_rewards.proxies.heldout import HeldOut
from latent_rewards.proxies.honesty import honesty
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


def extend_report(
    report: dict[str, dict[str, Any]], proxy: HeldOut, baselines: Mapping[str, HeldOut], seed: int
) -> dict[str, dict[str, Any]]:
    """Add to each entry of :func:`evaluate` what :func:`latent_rewards.proxies.honesty.honesty` says.

    Args:
        report: is changed, and returned.
        proxy: the proxy's held-out predictions, rewards in the report's order.
        baselines: ``{"ridge": ..., "constant": ...}``; each gets an entry with accuracy (None where it is not
            defined, as a constant's rank correlation) and honesty of its own.
        seed: of the bootstrap.
    """
    for column, entry in enumerate(report.values()):
        entry |= honesty(proxy, column, seed)
        for name, heldout in baselines.items():
            scores = accuracy(heldout.predicted[:, column], heldout.truth[:, column])
            known = {key: None if math.isnan(value) else value for key, value in scores.items()}
            entry[name] = {**known, **honesty(heldout, column, seed)}
    return report


HONESTY_COLUMNS = {
    "spearman": "Spearman",
    "r2": "R2",
    "mae": "MAE",
    "pairwise_accuracy": "pairs right",
    "pairwise_accuracy_within_prompt": "within a prompt",
    "calibration_error": "calibration error",
    "coverage": "90 % covers",
    "interval_width": "its width",
}
"""Keys of a report's entry that its baselines have too, and what a table calls them."""


def honesty_rows(entry: Mapping[str, Any]) -> list[tuple[str, list[float | None]]]:
    """Return the values of :data:`HONESTY_COLUMNS` for the proxy and each baseline of a report's entry."""
    named = {"proxy": entry, **{name: entry[name] for name in ("ridge", "constant") if name in entry}}
    return [(name, [values.get(key) for key in HONESTY_COLUMNS]) for name, values in named.items()]


def format_report(report: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a report as text: accuracy, one line per reward; then, where known, honesty and learning curves.

    Preferences have a table of their own.
    """
    preferences = {name: entry for name, entry in report.items() if "log_loss" in entry}
    if preferences:
        scores = {name: entry for name, entry in report.items() if name not in preferences}
        return _aligned(preference_rows(preferences)) + (f"\n\n{format_report(scores)}" if scores else "")
    rows = [["reward", "spearman", "(ridge)", "r2", "(ridge)", "mae", "90% covers", "train", "held out"]]
    honest = [["reward", "predictor", *HONESTY_COLUMNS.values()]]
    curves = []
    for name, entry in report.items():
        ridge = entry["ridge"]
        numbers = [entry["spearman"], ridge["spearman"], entry["r2"], ridge["r2"], entry["mae"], entry["coverage"]]
        rows.append([name, *map(_show, numbers), str(entry["num_train"]), str(entry["num_holdout"])])
        if "calibration_error" in entry:
            honest += [[name, kind, *map(_show, values)] for kind, values in honesty_rows(entry)]
        if "learning_curve" in entry:
            curves.append(f"{name}: {curve_text(entry['learning_curve'])}")
    parts = [_aligned(rows), _aligned(honest) if len(honest) > 1 else "", "\n".join(curves)]
    return "\n\n".join(part for part in parts if part)


def curve_text(curve: Mapping[str, Any]) -> str:
    """Return a learning curve as a sentence."""
    points = zip(curve["num_train"], curve["spearman"], curve["mae"], strict=True)
    seen = ", ".join(f"{size} labels: {_show(rank)} (MAE {_show(mae)})" for size, rank, mae in points)
    twice = curve["twice"]
    return (
        f"Spearman with {seen}; expected with {twice['num_train']} labels: {_show(twice['spearman'])} "
        f"(MAE {_show(twice['mae'])})"
    )


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
