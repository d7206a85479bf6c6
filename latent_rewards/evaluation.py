"""Comparing what metrics say of two policies' samples of the same prompts and noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latent_rewards.dataset import RewardDataset

RESAMPLES = 2000


def compare(datasets: Mapping[str, RewardDataset], num_prompts: int, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Return for every metric the mean of each dataset, and the paired difference of "policy" and "baseline".

    Args:
        datasets: "policy" and perhaps "baseline", of the same prompts in the same order.
        num_prompts: sample i is of prompt i modulo this number.
        seed: of the resampling.

    Returns:
        metric -> ``{role: {"mean", "low", "high", "count"}}`` and, with a baseline, ``"difference"`` of the samples
        that both have a value for, and ``"won"``, the share of those in which the policy's value is higher, an equal
        one counting half. Where a metric applies to nothing, all are NaN. Bounds are 95 % percentiles over prompts.
    """
    results: dict[str, dict[str, Any]] = {}
    for name in datasets["policy"].reward_names:
        columns = {role: by_sample(data, name) for role, data in datasets.items()}
        groups = torch.arange(len(columns["policy"])) % num_prompts
        told: dict[str, Any] = {role: interval(values, groups, seed=seed) for role, values in columns.items()}
        if "baseline" in columns:
            difference = columns["policy"] - columns["baseline"]
            told["difference"] = interval(difference, groups, seed=seed)
            known = difference[~difference.isnan()]
            told["won"] = float(((known > 0).double() + 0.5 * (known == 0).double()).mean())
        results[name] = told
    return results


def by_sample(dataset: RewardDataset, name: str) -> Tensor:
    """Return a reward by sample number, float64, NaN where the sample failed and is absent from the dataset."""
    values = torch.full((len(dataset) + len(dataset.failures),), float("nan"), dtype=torch.float64)
    present = [index for index in range(len(values)) if index not in dataset.failures]
    values[present] = dataset.rewards[name].double()
    return values


def interval(values: Tensor, groups: Tensor, *, seed: int, resamples: int = RESAMPLES) -> dict[str, float]:
    """Return mean, bounds and number of the values ``[N]`` that are no NaN; groups ``[N]`` are resampled whole."""
    known = ~values.isnan()
    values, groups = values[known], groups[known]
    if not len(values):
        return {"mean": float("nan"), "low": float("nan"), "high": float("nan"), "count": 0}
    _, groups = groups.unique(return_inverse=True)
    count = int(groups.max()) + 1
    sums = torch.zeros(count, dtype=values.dtype).index_add(0, groups, values)
    sizes = torch.zeros(count, dtype=values.dtype).index_add(0, groups, torch.ones_like(values))
    draws = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    means = sums[draws].sum(dim=1) / sizes[draws].sum(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return {"mean": float(values.mean()), "low": low, "high": high, "count": len(values)}
