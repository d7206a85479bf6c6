"""The page of a proxy: its report, and what it said of held-out samples drawn against the truth."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from latent_rewards.contracts import ConfigError
from latent_rewards.report import Report

if TYPE_CHECKING:
    from latent_rewards.proxies import RewardProxy
    from latent_rewards.proxies.heldout import HeldOut

MOST_POINTS = 2000
"""Points of a scatter plot; of more samples every n-th is drawn."""

_FALSE_ALARM = 0.05


def proxy_page(proxy: RewardProxy, title: str) -> Report:
    """Return the page.

    Args:
        proxy: one with a report; the plots of held-out samples need its ``heldout``.
        title: what the proxy is called.
    """
    from latent_rewards.proxies.refit import LEARNT_HELDOUT, learnt_heldout
    from latent_rewards.proxies.report import HONESTY_COLUMNS, honesty_rows

    report = Report(f"Proxy {title}").add_text(
        f"{proxy!r}. All numbers are of held-out samples, whose prompts took no part in training where prompts repeat; "
        "what calibrates a sample was fitted to the other half of them."
    )
    if learnt_heldout(proxy):
        report.add_text(LEARNT_HELDOUT)
    for name, entry in proxy.report.items():
        report.add_heading(name).add_text(f"{entry['num_train']} training and {entry['num_holdout']} held-out labels.")
        rows = [[kind, *values] for kind, values in honesty_rows(entry)]
        report.add_table(["predictor", *HONESTY_COLUMNS.values()], rows, _caption(entry), decimals=3)
        if proxy.heldout is not None:
            _add_heldout(report, proxy.heldout, proxy.reward_names.index(name))
        if curve := entry.get("learning_curve"):
            _add_learning_curve(report, curve)
    if proxy.heldout is None:
        report.add_text("The proxy was stored without its held-out predictions, so there is nothing more to draw.")
    else:
        _add_ood(report, proxy, proxy.heldout)
    fingerprints = {"latent space": proxy.latent_space, **proxy.metric_fingerprints}
    return report.add_settings(fingerprints, "Fingerprints").add_settings(dataclasses.asdict(proxy.config))


def _caption(entry: dict[str, Any]) -> str:
    caption = (
        "Pairs right: share of pairs of samples ordered as the metric orders them. Width: of the 90 % interval, in the "
        "reward's units."
    )
    if interval := entry.get("coverage_interval"):
        caption += (
            f" With prompts resampled, the proxy's coverage lies in {interval[0]:.3f} to {interval[1]:.3f} (95 %)."
        )
    return caption


def _add_heldout(report: Report, heldout: HeldOut, column: int) -> None:
    from latent_rewards.proxies.honesty import reliability

    known = ~heldout.truth[:, column].isnan()
    if not bool(known.any()):
        return
    predicted, truth = heldout.predicted[known, column], heldout.truth[known, column]
    every = -(-len(truth) // MOST_POINTS)
    shown = f" Every {every}th sample is drawn." if every > 1 else ""
    report.add_scatter(
        "Predicted against true",
        truth[::every],
        predicted[::every],
        "true reward",
        "predicted reward",
        f"On the line a prediction is right.{shown}",
    )
    levels, covered = reliability(heldout, column)
    report.add_curves(
        "Reliability",
        {"observed": (levels, covered), "ideal": (levels, levels)},
        "level of the predicted Gaussian's central interval",
        "share of samples inside",
        "Below the line the proxy is too sure of itself, above it too careful.",
    )


def _add_learning_curve(report: Report, curve: dict[str, Any]) -> None:
    from latent_rewards.proxies.report import curve_text

    sizes, twice = curve["num_train"], curve["twice"]
    series: dict[str, Any] = {}
    for key, label in (("spearman", "Spearman"), ("r2", "R2")):
        if None not in curve[key]:
            series[label] = (sizes, curve[key])
            series[f"{label}, expected"] = ([sizes[-1], twice["num_train"]], [curve[key][-1], twice[key]])
    if series:
        caption = f"{curve_text(curve)}. The expectation is a power law through the errors."
        report.add_curves("Learning curve", series, "training labels", "held-out score", caption)


def _add_ood(report: Report, proxy: RewardProxy, heldout: HeldOut) -> None:
    try:
        threshold = f"A score above {proxy.ood_threshold(_FALSE_ALARM):.3f} is out of distribution at a false alarm of "
        threshold += f"{_FALSE_ALARM:.0%}."
    except ConfigError as error:
        threshold = f"No threshold at a false alarm of {_FALSE_ALARM:.0%}: {error}."
    report.add_heading("Out-of-distribution score").add_histogram(
        "Score of held-out samples",
        heldout.ood.tolist(),
        "share of the other half that is less strange",
        "samples",
        f"Even where the two halves are alike. {threshold}",
    )
