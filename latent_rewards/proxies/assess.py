"""The report of a fitted proxy: what it says of held-out samples, beside a ridge regression and a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latent_rewards.proxies.ensemble import Reader
from latent_rewards.proxies.heldout import HeldOut, crossfit_ood, heldout_prompts, judge
from latent_rewards.proxies.learning_curve import learning_curves
from latent_rewards.proxies.proxy import RewardProxy
from latent_rewards.proxies.report import accuracy, evaluate, extend_report
from latent_rewards.proxies.samples import Samples


def assess(
    proxy: RewardProxy, reader: Reader, samples: Samples, training: Tensor, heldout: Tensor, ridge: Tensor | None
) -> None:
    """Set ``proxy.heldout`` and ``proxy.report``, of a proxy of noisy latents at its lowest level.

    Args:
        proxy: fitted and settled.
        reader: reads the samples for it.
        samples: all samples.
        training: int64 ``[n]``.
        heldout: int64 ``[m]``.
        ridge: a ridge regression's standardised predictions ``[m, R]``; None: the proxy is one.
    """
    prompts = heldout_prompts(samples, heldout)
    reader = _at_lowest(proxy, reader)
    mine = _judge(proxy, reader, heldout, prompts, reader.ensemble(heldout))
    zero = torch.zeros_like(mine.predicted)
    baselines = {"ridge": mine if ridge is None else _judge(proxy, reader, heldout, prompts, (ridge, zero))}
    baselines["constant"] = _judge(proxy, reader, heldout, prompts, (zero, zero))
    proxy.heldout = HeldOut(mine.predicted, mine.std, mine.truth, _ood(proxy, reader, heldout, prompts), prompts)
    report = evaluate(
        proxy.reward_names,
        mine.predicted,
        baselines["ridge"].predicted,
        samples.rewards[heldout],
        mine.coverage(),
        (~samples.rewards[training].isnan()).sum(dim=0),
    )
    proxy.report = extend_report(report, mine, baselines, proxy.config.seed)
    _add_noise_levels(proxy, reader, samples.rewards[heldout], heldout)


def _at_lowest(proxy: RewardProxy, reader: Reader) -> Reader:
    return reader if proxy.noise is None else reader.at(proxy.noise.bounds[0])


def _add_noise_levels(proxy: RewardProxy, reader: Reader, truth: Tensor, heldout: Tensor) -> None:
    """Add to each reward's report, under "noise", how good a proxy of noisy latents is at each of its levels."""
    centre, scale = proxy.reward_mean.double().cpu(), proxy.reward_std.double().cpu()
    for level in [] if proxy.noise is None else proxy.noise.levels.tolist():
        mean, _ = reader.at(level).ensemble(heldout)
        predicted = proxy.correct(mean.to(proxy.reward_mean)).double().cpu() * scale + centre
        for i, name in enumerate(proxy.reward_names):
            at_level = {"t": level, **accuracy(predicted[:, i], truth[:, i])}
            proxy.report[name].setdefault("noise", []).append(at_level)


def add_learning_curves(
    proxy: RewardProxy,
    samples: Samples,
    parts: list[Tensor],
    heldout: Tensor,
    fit: Callable[[Tensor], tuple[RewardProxy, Reader]],
) -> None:
    """Refit on every part but the last and add each reward's ``"learning_curve"`` to ``proxy.report``.

    Args:
        proxy: assessed; fitted on the last part.
        samples: all samples.
        parts: int64 rows, each part within the next.
        heldout: int64 ``[m]``.
        fit: rows -> a proxy fitted on them and its reader.
    """
    assert proxy.heldout is not None  # noqa: S101 - for mypy: assess has set it
    prompts = proxy.heldout.prompts

    def refit(rows: Tensor) -> Tensor:
        smaller, reader = fit(rows)
        reader = _at_lowest(smaller, reader)
        return _judge(smaller, reader, heldout, prompts, reader.ensemble(heldout)).predicted

    known = ~samples.rewards.isnan()
    curves = learning_curves(refit, parts, proxy.heldout.predicted, samples.rewards[heldout], known)
    entries: list[dict[str, Any]] = [proxy.report[name] for name in proxy.reward_names]
    for entry, curve in zip(entries, curves, strict=True):
        entry["learning_curve"] = curve


def _judge(
    proxy: RewardProxy, reader: Reader, heldout: Tensor, prompts: Tensor, moments: tuple[Tensor, Tensor]
) -> HeldOut:
    """Judge a predictor with these standardised means and variances ``[m, R]``."""
    return judge(
        *moments,
        reader.targets(heldout),
        prompts,
        centre=proxy.reward_mean,
        scale=proxy.reward_std,
        isotonic=proxy.config.calibrate_mean == "isotonic",
    )


def _ood(proxy: RewardProxy, reader: Reader, heldout: Tensor, prompts: Tensor) -> Tensor:
    distance = proxy.distance.distance(reader.map(proxy.distance_features, heldout)).cpu()
    _, variance = reader.ensemble(heldout)
    return crossfit_ood(distance, variance.mean(dim=1) if len(proxy.members) > 1 else None, prompts)
