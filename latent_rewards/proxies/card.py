"""The model card of a stored proxy: what it predicts, how well, from what, and what it must not be used for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from latent_rewards.contracts import ConfigError
from latent_rewards.proxies.refit import LEARNT_HELDOUT, learnt_heldout
from latent_rewards.proxies.report import HONESTY_COLUMNS, curve_text, honesty_rows

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from latent_rewards.proxies.proxy import RewardProxy

FALSE_ALARM = 0.05
"""The share of in-distribution samples for which the card states the out-of-distribution threshold."""

_METRICS = ("spearman", "r2", "mae", "pairwise_accuracy", "coverage", "calibration_error")

_WARNING = """\
- Not on latents of another codec or scale: the fingerprint below is checked, and a mismatch is an error.
- Not as the only measure of a policy that was optimised against it. A policy finds where a proxy is wrong; refresh it
  with true scores (`proxy.update`), watch the out-of-distribution score, and report the true metric.
- Not far from its training data: above the threshold below the prediction is an extrapolation.
- Not for judging people, or any decision that its metric itself would not be used for."""


_USAGE = """\
```python
import latent_rewards as lr

proxy = lr.RewardProxy.from_pretrained("<folder or organisation/name>")
prediction = proxy.predict(latents, prompts)
low, high = prediction.interval(0.9)
```"""


def model_card(proxy: RewardProxy) -> str:
    """Return ``README.md``: YAML front matter with tags and metrics, and the card's text in Markdown."""
    from huggingface_hub import ModelCard, ModelCardData

    tags = ["latent-rewards", "reward-model", "reward-proxy", "video-generation", proxy.config.trunk]
    name = f"Reward proxy: {', '.join(proxy.reward_names)}"
    results = _results(proxy)
    data = ModelCardData(
        library_name="latent-rewards",
        tags=tags,
        model_name=name if results else None,
        eval_results=results or None,
    )
    parts = [
        f"# {name}",
        f"`{proxy!r}` predicts, from latents of shape `{proxy.latent_shape}` without decoding them, what the metrics "
        "say of the videos. It gives a mean, a calibrated standard deviation and an out-of-distribution score, and is "
        "differentiable in the latents.",
        _USAGE,
        *_report(proxy),
        "## Intended range",
        *_range(proxy),
        "## What not to use it for",
        _WARNING,
        "## Fingerprints",
        _fingerprints(proxy),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _results(proxy: RewardProxy) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="reward-prediction",
            dataset_type="held-out",
            dataset_config=name,
            dataset_name=f"held-out samples of {name}",
            metric_type=metric,
            metric_value=round(float(value), 6),
        )
        for name, entry in proxy.report.items()
        for metric in _METRICS
        if (value := entry.get(metric)) is not None and math.isfinite(value)
    ]


def _report(proxy: RewardProxy) -> list[str]:
    if not proxy.report:
        return ["## Report", "None: this proxy was not made by `train_proxy`."]
    parts = [
        "## Report",
        "On samples it had not been trained on, calibrated by the other half of them, beside a ridge regression and a "
        "constant. Pairs right: the share of pairs of samples that are ordered as the metric orders them; calibration "
        "error: of the Gaussian's central intervals at levels .1 to .9.",
    ]
    if learnt_heldout(proxy):
        parts.append(LEARNT_HELDOUT)
    rows = []
    for name, entry in proxy.report.items():
        rows += [[f"`{name}`", kind, *map(_number, values)] for kind, values in honesty_rows(entry)]
    parts.append(_table(["reward", "predictor", *HONESTY_COLUMNS.values()], rows))
    for name, entry in proxy.report.items():
        if "log_loss" in entry:
            parts.append(
                f"`{name}`: {entry['num_train']} training and {entry['num_holdout']} held-out pairs; log-loss "
                f"{_number(entry['log_loss'])} nats a pair, a constant's {_number(entry['constant']['log_loss'])}."
            )
            continue
        low, high = entry.get("coverage_interval") or (None, None)
        parts.append(
            f"`{name}`: {entry['num_train']} training and {entry['num_holdout']} held-out labels; prompts resampled, "
            f"the 90 % interval covers between {_number(low)} and {_number(high)}."
        )
        if "learning_curve" in entry:
            parts.append(f"`{name}`: {curve_text(entry['learning_curve'])}.")
    return parts


def _range(proxy: RewardProxy) -> list[str]:
    moments = zip(proxy.reward_names, proxy.reward_mean.tolist(), proxy.reward_std.tolist(), strict=True)
    rows = [[f"`{name}`", _number(mean), _number(std)] for name, mean, std in moments]
    try:
        threshold = (
            f"`predict(...).ood` above {proxy.ood_threshold(FALSE_ALARM):.4f} is out of distribution, at a false alarm "
            f"of {FALSE_ALARM:.0%} (`proxy.ood_threshold`)."
        )
    except ConfigError as error:
        threshold = f"No out-of-distribution threshold at a false alarm of {FALSE_ALARM:.0%}: {error}."
    prompts = proxy.prompt_features.kind
    return [
        _table(["reward", "mean in training", "standard deviation"], rows),
        f"Latents `{proxy.latent_shape}` (channels, frames, height, width); prompts: {prompts}"
        + (", read by the encoder it was fitted with." if proxy.prompt_features.encoded else "."),
        threshold,
    ]


def _fingerprints(proxy: RewardProxy) -> str:
    rows = [["latent space", f"`{proxy.latent_space}`" if proxy.latent_space else "not known"]]
    for name in proxy.reward_names:
        known = proxy.metric_fingerprints.get(name)
        rows.append([f"metric of `{name}`", f"`{known}`" if known else "not known"])
    return _table(["what", "fingerprint"], rows)


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
