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


def side_by_side(
    datasets: Mapping[str, RewardDataset], num_prompts: int, most: int
) -> tuple[list[str], dict[str, Tensor]]:
    """Return up to ``most`` different prompts and, by role, the rows of one sample of each, the same in all datasets.

    That is a prompt's first sample that failed in none of them; a prompt without one is left out.

    Args:
        datasets: of the same prompts in the same order.
        num_prompts: sample i is of prompt i modulo this number.
        most: at least 1.
    """
    first = next(iter(datasets.values()))
    failed = {index for dataset in datasets.values() for index in dataset.failures}
    chosen: dict[str, int] = {}
    for number in range(num_prompts):
        kept = [i for i in range(number, len(first) + len(first.failures), num_prompts) if i not in failed]
        if kept and len(chosen) < most:
            chosen.setdefault(first.prompts[_row(first, kept[0])], kept[0])
    rows = {role: torch.tensor([_row(data, i) for i in chosen.values()]).long() for role, data in datasets.items()}
    return list(chosen), rows


def _row(dataset: RewardDataset, sample: int) -> int:
    """Return where a sample that did not fail lies in a dataset, from which the failed ones are absent."""
    return sample - sum(index < sample for index in dataset.failures)


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
