"""``config="auto"``: which trunk, decided by cross-validation within a budget of sample updates.

Each trunk that applies is fitted on two thirds of the training samples and judged on the third left, three times, one
network each; samples of one prompt stay together and the held-out part of the data is never looked at. The least mean
squared error of standardised rewards wins, and of equals the cheaper trunk. A sample update is one forward and backward
pass of one sample: the trunks that are trained share the budget equally, so the choice does not depend on how fast the
machine is. Ridge regressions cost none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from latent_rewards.contracts import ConfigError
from latent_rewards.proxies.config import ProxyConfig
from latent_rewards.proxies.ensemble import EVALUATE_EVERY
from latent_rewards.proxies.report import accuracy
from latent_rewards.proxies.samples import Samples, group_ids, split_folds
from latent_rewards.proxies.text import PromptEncoder
from latent_rewards.proxies.trunks import list_trunks, trunk_kind

NUM_FOLDS = 3

Judge = Callable[[ProxyConfig, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Settings, rows to fit on and rows to predict -> predictions and targets ``[n, R]``, standardised, on the CPU."""


def applicable(
    config: ProxyConfig, has_backbone: bool, num_shapes: int = 1, *, has_codec: bool = False
) -> tuple[str, ...]:
    """Return the registered trunks that can be tried, cheapest first.

    Those that need a backbone or a codec are left out where there is none, those that know no time where latents are
    noisy, and ridge regressions on latents where these have several shapes, and all of them for another objective than
    theirs.
    """
    kinds = [trunk_kind(name) for name in list_trunks()]
    return tuple(
        kind.name
        for kind in kinds
        if (has_backbone or not kind.needs_backbone)
        and (has_codec or not kind.needs_codec)
        and not (kind.needs_codec and config.noise_levels is not None)
        and not (kind.closed_form and (config.noise_levels is not None or config.objective != "mse"))
        and not (kind.closed_form and not kind.needs_backbone and num_shapes > 1)
    )


def candidate(config: ProxyConfig, name: str) -> ProxyConfig:
    """Return the settings with trunk ``name``; adapters stay where they apply."""
    return replace(config, trunk=name, adapter_rank=config.adapter_rank if name == "backbone" else 0)


def updates_each(config: ProxyConfig, num_training: int, num_trained: int) -> int:
    """Return the updates of each of ``num_trained`` trained trunks in each fold.

    Raises:
        ConfigError: the budget does not allow 25 each.
    """
    size = min(config.batch_size, num_training)
    most = config.updates(num_training)
    share = num_trained * NUM_FOLDS * size
    least = EVALUATE_EVERY * share
    budget = config.selection_budget or max(least, config.ensemble_size * most * size)
    if budget < least:
        raise ConfigError(
            f"selection_budget={budget} sample updates are too few to compare {num_trained} trunks in {NUM_FOLDS} "
            f"folds at batches of {size}; give at least {least}"
        )
    return min(most, budget // share) if num_trained else 0


def remember(encode: PromptEncoder) -> PromptEncoder:
    """Return ``encode`` with a memory: all candidates read the same prompts, and a text encoder is slow."""
    known: dict[tuple[str, ...], Tensor] = {}

    def encoded(texts: Sequence[str]) -> Tensor:
        key = tuple(texts)
        if key not in known:
            known[key] = encode(texts)
        return known[key]

    return encoded


def choose_trunk(
    config: ProxyConfig,
    samples: Samples,
    training: Tensor,
    judge: Judge,
    *,
    has_backbone: bool,
    has_codec: bool = False,
) -> tuple[ProxyConfig, dict[str, Any]]:
    """Return the settings with the best trunk, and how it was found.

    Args:
        config: whose trunk is "auto".
        samples: all of them.
        training: int64 ``[n]``, the rows that may be looked at.
        judge: fits and predicts.
        has_backbone: whether trunks that need a backbone can be tried.
        has_codec: likewise.

    Returns:
        The settings and ``{"chosen", "folds", "num_samples", "sample_updates", "candidates": {trunk: {"mse", "rewards":
        {reward: {"spearman", "r2", "mae"}}, "updates", "sample_updates"}}}``; errors are in units of the rewards'
        standard deviation, sample updates are the most that were allowed.

    Raises:
        ConfigError: the budget is too small.
    """
    names = applicable(config, has_backbone, len(samples.latent_shapes), has_codec=has_codec)
    trained = [name for name in names if not trunk_kind(name).closed_form]
    updates = updates_each(config, len(training), len(trained))
    size = min(config.batch_size, len(training))
    folds = split_folds(training, group_ids(samples.prompts, len(samples)), NUM_FOLDS, config.seed)
    results: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(names) * NUM_FOLDS, desc="trunks", disable=not config.progress, dynamic_ncols=True) as bar:
        for name in names:
            spent = updates if name in trained else 0
            settings = replace(
                candidate(config, name), ensemble_size=1, num_updates=max(1, spent), batch_size=size, progress=False
            )
            parts = []
            for fold in range(NUM_FOLDS):
                parts.append(judge(settings, training[folds != fold], training[folds == fold]))
                bar.update()
            predicted, target = (torch.cat(column) for column in zip(*parts, strict=True))
            results[name] = {
                "mse": float((predicted - target).double().square().nanmean()),
                "rewards": {
                    reward: accuracy(predicted[:, i], target[:, i]) for i, reward in enumerate(samples.reward_names)
                },
                "updates": spent,
                "sample_updates": spent * NUM_FOLDS * size,
            }
    best = min(names, key=lambda name: results[name]["mse"])
    return candidate(config, best), {
        "chosen": best,
        "folds": NUM_FOLDS,
        "num_samples": len(training),
        "sample_updates": sum(entry["sample_updates"] for entry in results.values()),
        "candidates": results,
    }
