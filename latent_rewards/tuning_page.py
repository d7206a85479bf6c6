"""What a latent reward optimisation run did, as charts of a report page, and the page of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_rewards.report import Report

SEVERAL_REWARDS = (
    ("multiplier/", "prices of the floors", "multiplier", "What one unit of a guarded reward was worth."),
    ("violation/", "violations of the floors", "floor minus mean", "Above 0 the floor was missed."),
    ("conflict", "conflict of the rewards", "smallest cosine", "Of any two rewards' gradients; -1 is against."),
)
"""Prefix of what is logged, title, axis and caption of its chart."""


def add_tuning(report: Report, name: str, result: Mapping[str, Any]) -> None:
    """Draw proxy, true and held-out metrics against updates, the first two against KL, and what several rewards do.

    Args:
        report: the page.
        name: of the trainer.
        result: what its ``TrainResult`` held.
    """
    history = result["history"]
    series: dict[str, Any] = {}
    against_kl: dict[str, Any] = {}
    kl = {entry["step"]: entry.get("kl", math.nan) for entry in history}
    for metric in result["true_curve"][0]["true"] if result["true_curve"] else []:
        steps = [point["step"] for point in result["true_curve"]]
        for kind in ("proxy", "true"):
            values = [point[kind][metric] for point in result["true_curve"]]
            series[f"{kind} {metric}"] = (steps, values)
            reached = sorted((kl.get(step, math.nan), value) for step, value in zip(steps, values, strict=True))
            against_kl[f"{kind} {metric}"] = tuple(zip(*reached, strict=True))
    for metric in result["holdout_curve"][0]["values"] if result["holdout_curve"] else []:
        points = [(point["step"], point["values"][metric]) for point in result["holdout_curve"]]
        series[f"held-out {metric}"] = tuple(zip(*points, strict=True))
    steps = [entry["step"] for entry in history]
    series["reward (pessimistic proxy)"] = (steps, smooth([entry["reward"] for entry in history]))
    best = f" The student of update {result['best_step']} was kept." if result["best_step"] is not None else ""
    report.add_curves(
        f"LRO, {name}: metrics while tuning",
        series,
        "updates",
        "metric",
        f"Proxy and true values on the same fresh samples, before each refresh; {result['num_queries']} true queries "
        f"in all refreshes.{best}",
    )
    if against_kl:
        report.add_curves(f"LRO, {name}: against KL", against_kl, "KL, nats per latent dimension", "metric")
    for logged, title, label, caption in SEVERAL_REWARDS:
        kept = [key for key in dict.fromkeys(key for entry in history for key in entry) if key.startswith(logged)]
        lines = {key: [(entry["step"], entry[key]) for entry in history if key in entry] for key in kept}
        curves = {key: ([step for step, _ in line], [value for _, value in line]) for key, line in lines.items()}
        if curves:
            report.add_curves(f"LRO, {name}: {title}", curves, "updates", label, caption)


def tuning_page(
    path: Path | str, title: str, name: str, result: Mapping[str, Any], settings: Mapping[str, Any]
) -> Path:
    """Write the page of one run and return its path.

    Args:
        path: of the page.
        title: its heading.
        name: of the trainer.
        result: what its ``TrainResult`` held.
        settings: of the run.
    """
    report = Report(title)
    add_tuning(report, name, result)
    return report.add_settings(settings).save(path)


def smooth(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Return an exponential moving average that starts at the first value."""
    smoothed: list[float] = []
    for value in values:
        smoothed.append(value if not smoothed else decay * smoothed[-1] + (1 - decay) * value)
    return smoothed
