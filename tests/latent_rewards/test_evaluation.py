"""Means, paired differences and intervals over prompts, against closed forms."""

import math

import pytest
import torch

from latent_rewards.dataset import RewardDataset
from latent_rewards.evaluation import by_sample, compare, interval, side_by_side


def dataset(values, failures=None):
    kept = torch.tensor(values)
    return RewardDataset.from_tensors(
        torch.zeros(len(values), 1, 1, 1, 1), ["a"] * len(values), {"m": kept}, failures=failures
    )


def test_the_interval_is_as_wide_as_prompts_are_few():
    """All samples of a prompt alike: P prompts are P numbers, however many samples they have."""
    draws = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    told = interval(draws.repeat_interleave(10), torch.arange(400).repeat_interleave(10), seed=0)
    assert told["mean"] == pytest.approx(float(draws.mean())) and told["count"] == 4000
    assert told["high"] - told["low"] == pytest.approx(2 * 1.96 * float(draws.std()) / 20, rel=0.08)


def test_the_interval_weighs_samples_not_prompts_and_leaves_out_what_does_not_apply():
    values = torch.cat([torch.ones(900), torch.zeros(100), torch.full((50,), math.nan)]).double()
    groups = torch.cat([torch.arange(900) // 9, 100 + torch.arange(100), torch.full((50,), 500)])
    told = interval(values, groups, seed=0)
    assert told["mean"] == 0.9 and told["count"] == 1000 and 0.86 < told["low"] < 0.9 < told["high"] < 0.94
    nothing = interval(torch.full((3,), math.nan), torch.zeros(3), seed=0)
    assert nothing["count"] == 0 and math.isnan(nothing["mean"])


def test_samples_that_failed_leave_the_others_paired():
    mine, other = dataset([1.0, 2.0, 4.0], {1: "why"}), dataset([0.5, 9.0, 2.0], {3: "why"})
    torch.testing.assert_close(by_sample(mine, "m"), torch.tensor([1, math.nan, 2, 4]).double(), equal_nan=True)
    told = compare({"policy": mine, "baseline": other}, 2)["m"]
    # Samples 0 and 2 have both: 1 - 0.5 and 2 - 2.
    assert told["difference"]["mean"] == 0.25 and told["difference"]["count"] == 2
    assert told["won"] == 0.75
    assert told["policy"]["mean"] == pytest.approx(7 / 3) and told["baseline"]["mean"] == pytest.approx(11.5 / 3)


def test_samples_of_one_prompt_are_resampled_together():
    """Two prompts that take turns, of 0 and of 1: a resample of two prompts has mean 0, 1/2 or 1."""
    told = compare({"policy": dataset([0.0, 1.0] * 50)}, 2)["m"]["policy"]
    assert (told["low"], told["mean"], told["high"]) == (0.0, 0.5, 1.0)
    told = compare({"policy": dataset([0.0, 1.0] * 50)}, 100)["m"]["policy"]
    assert 0.35 < told["low"] < 0.45 and 0.55 < told["high"] < 0.65


def numbered(failed=(), num_prompts=3, count=9):
    """Sample i of prompt i modulo 3, whose latent is i."""
    kept = [index for index in range(count) if index not in failed]
    latents = torch.tensor(kept).float().view(-1, 1, 1, 1, 1)
    prompts = ["abc"[index % num_prompts] for index in kept]
    return RewardDataset.from_tensors(
        latents, prompts, {"m": torch.zeros(len(kept))}, failures=dict.fromkeys(failed, "why")
    )


@pytest.mark.parametrize(
    ("mine", "other", "prompts", "samples"),
    [
        ((), (), "abc", [0, 1, 2]),
        ((0,), (3, 1), "abc", [6, 4, 2]),
        ((0, 3, 6), (), "bc", [1, 2]),
        ((), (0, 3, 6), "bc", [1, 2]),
        ((0, 6, 1, 2, 5), (3, 4, 7, 8), "", []),
    ],
)
def test_what_is_shown_side_by_side_is_the_same_sample_which_failed_in_none(mine, other, prompts, samples):
    datasets = {"policy": numbered(mine), "baseline": numbered(other)}
    shown, rows = side_by_side(datasets, 3, 6)
    assert shown == list(prompts)
    for role, dataset in datasets.items():
        assert dataset.latents(rows[role]).flatten().tolist() == samples
        assert [dataset.prompts[row] for row in rows[role]] == shown


def test_a_prompt_that_is_listed_twice_is_shown_once_and_no_more_than_are_asked_for():
    data = numbered(num_prompts=3)
    twice = RewardDataset.from_tensors(data.latents(), ["a", "a", "b"] * 3, {"m": torch.zeros(9)})
    assert side_by_side({"policy": twice}, 3, 6)[0] == ["a", "b"]
    shown, rows = side_by_side({"policy": data}, 3, 2)
    assert shown == ["a", "b"] and rows["policy"].tolist() == [0, 1]
