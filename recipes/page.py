"""The report of a DOLLAR run: clips side by side, curves, the table, settings and versions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_rewards.report import Report
from latent_rewards.tuning_page import add_tuning, smooth
from recipes.prompted import Benchmark

PACKAGES = ("latent-rewards", "torch", "diffusers", "transformers", "accelerate", "scikit-learn")
REPORT = "report.html"
CEILINGS = ("real clips", "VAE reconstruction")


INTRODUCTION = """A teacher that needs 50 steps was distilled into a student of 1 to 4 steps by variational score \
distillation (VSD), consistency distillation (CD), or both. A small proxy then learned to predict a black-box metric \
from latents, and the student was tuned on the proxy (LRO), which was refreshed with true scores as the student \
changed."""


def write_report(
    folder: Path,
    settings: Mapping[str, Any],
    benchmark: Benchmark,
    proxy_report: Mapping[str, Any],
    distillation: Mapping[str, Sequence[Mapping[str, Any]]],
    tuning: Mapping[str, Mapping[str, Any]],
    *,
    lower_is_better: Collection[str] = (),
) -> Path:
    """Write the page into ``folder`` and return its path.

    Args:
        folder: of the run.
        settings: section name -> dataclass.
        benchmark: the evaluated rows.
        proxy_report: ``proxy.report``.
        distillation: stage -> logged updates.
        tuning: trainer -> what its ``TrainResult`` held.
        lower_is_better: metrics of which less is better.
    """
    falling = {"Fréchet", *lower_is_better}
    report = Report(f"DOLLAR: {settings['run'].name}").add_text(INTRODUCTION)
    report.add_videos("Side by side", benchmark.videos(), benchmark.shown_prompts, fps=settings["run"].fps)
    headers, rows = benchmark.table()
    compared = [header for header in headers[1:] if header not in ("evaluations", "s / video", "speed-up")]
    report.add_table(
        headers,
        rows,
        "All methods on the same prompts and noise. Evaluations: network calls per video (a guided teacher makes two a "
        "step); seconds include decoding.",
        best={header: "min" if header in falling else "max" for header in compared},
        unranked=CEILINGS,
    )
    for name, result in tuning.items():
        add_tuning(report, name, result)
    _add_proxy(report, proxy_report)
    for stage, history in distillation.items():
        _add_losses(report, stage, history)
    report.add_settings({name: dataclasses.asdict(section) for name, section in settings.items()})
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    report.add_settings({**versions, "python": platform.python_version(), "machine": platform.machine()}, "Versions")
    return report.save(folder / REPORT)


def _add_proxy(report: Report, proxy_report: Mapping[str, Any]) -> None:
    headers = ["reward", "Spearman", "ridge's", "R²", "ridge's", "MAE", "90 % coverage", "training", "held out"]
    rows = [
        [
            name,
            values["spearman"],
            values["ridge"]["spearman"],
            values["r2"],
            values["ridge"]["r2"],
            values["mae"],
            values["coverage"],
            values["num_train"],
            values["num_holdout"],
        ]
        for name, values in proxy_report.items()
    ]
    report.add_table(headers, rows, "The proxy on samples it had not been trained on, before tuning.", decimals=3)


def _add_losses(report: Report, stage: str, history: Sequence[Mapping[str, Any]]) -> None:
    names = [name for name in ("vsd_loss", "cd_loss", "fake_loss") if any(name in entry for entry in history)]
    series = {}
    for name in names:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        series[name] = ([step for step, _ in points], smooth([value for _, value in points]))
    if series:
        report.add_curves(f"Distillation, {stage}: losses", series, "updates", "loss (moving average)")
