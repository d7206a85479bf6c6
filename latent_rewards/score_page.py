"""The page of a scored folder: for each metric a histogram and its best and worst clips, with values and prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev

from latent_rewards.contracts import LatentRewardsError
from latent_rewards.metrics.metric import Metric
from latent_rewards.report import Cell, Report, ShownClip
from latent_rewards.video import most_frames, read_video

MOST_PLAYERS = 72
"""Browsers stop at some 75 players on a page."""

MOST_SHOWN = 3
SHORT_SIDE = 240
FRAMES = 64


def score_page(
    title: str,
    rows: Sequence[Mapping[str, float | str]],
    metrics: Mapping[str, Metric],
    files: Mapping[str, Path],
    prompt: Callable[[str], str | None],
    faults: list[str],
    frames: str = "all",
) -> Report:
    """Return the page; only the clips it shows are read again, one at a time.

    Args:
        title: what was scored.
        rows: ``{"video": name, label: value}`` of each video; a label that is missing failed, NaN does not apply.
        metrics: by label.
        files: by the names of the videos.
        prompt: name of a video -> its prompt, if it has one.
        faults: what failed so far; a clip that can no longer be read is added.
        frames: those that were scored; at most 64 of them are shown.
    """
    values = {label: _ranked(rows, label, metric.higher_is_better) for label, metric in metrics.items()}
    report = Report(f"Scores of {title}").add_text(f"{len(rows)} video(s), {len(metrics)} metric(s).")
    headers = ["metric", "better", "clips scored", "mean", "standard deviation", "lowest", "highest"]
    summary = [_summary(label, metric, [value for value, _ in values[label]]) for label, metric in metrics.items()]
    report.add_table(
        headers, summary, "Clips that a metric does not apply to, or that failed, take no part.", decimals=4
    )
    count = max(1, min(MOST_SHOWN, MOST_PLAYERS // (2 * len(metrics))))
    for label, metric in metrics.items():
        warning = f"\n\nA {' or a '.join(metric.cheats)} clip is as good as any to it." if metric.cheats else ""
        report.add_heading(label).add_text(metric.description + warning)
        ranked = values[label]
        if not ranked:
            report.add_text("No clip has a value.")
            continue
        report.add_histogram(f"Values of {len(ranked)} clip(s)", [value for value, _ in ranked], label, "clips")
        for kind, chosen in (("Best", ranked[:count]), ("Worst", ranked[count:][-count:][::-1])):
            shown = [clip for value, name in chosen if (clip := _clip(name, value, files, prompt, frames, faults))]
            if shown:
                report.add_clips(f"{kind} by {label}", shown)
    if faults:
        report.add_heading("Failed").add_table(["what failed"], [[fault] for fault in faults])
    return report.add_settings({label: metric.options for label, metric in metrics.items()}, "Options")


def _ranked(rows: Sequence[Mapping[str, float | str]], label: str, higher_is_better: bool) -> list[tuple[float, str]]:
    """Return (value, name) of the clips with a value, best first."""
    scored = [(row[label], str(row["video"])) for row in rows if label in row]
    known = [(value, name) for value, name in scored if isinstance(value, float) and math.isfinite(value)]
    return sorted(known, key=lambda pair: (-pair[0] if higher_is_better else pair[0], pair[1]))


def _summary(label: str, metric: Metric, values: list[float]) -> list[Cell]:
    facts = [fmean(values), pstdev(values), min(values), max(values)] if values else [None] * 4
    return [label, "higher" if metric.higher_is_better else "lower", len(values), *facts]


def _clip(
    name: str,
    value: float,
    files: Mapping[str, Path],
    prompt: Callable[[str], str | None],
    frames: str,
    faults: list[str],
) -> ShownClip | None:
    most = most_frames(frames)
    kept = f"first:{FRAMES}" if most is None else f"{frames.partition(':')[0]}:{min(most, FRAMES)}"
    try:
        clip = read_video(files[name], frames=kept, short_side=SHORT_SIDE)
        text = prompt(name) or ""
    except LatentRewardsError as error:
        faults.append(f"{name} cannot be shown: {error}")
        return None
    return ShownClip(clip.frames, max(clip.fps, 1.0), name, f"{value:.4g}", text)
