"""Conformal quantiles are the textbook's order statistics, and hold on samples not seen."""

import math

import pytest
import torch

from latent_rewards.contracts import ConfigError
from latent_rewards.proxies.conformal import conformal_quantiles, conformal_rank, level_index, normal_quantiles


def test_levels_are_rounded_up_to_thousandths():
    assert [level_index(level) for level in (0.9, 0.5, 0.0001, 0.9001, 0.999, 1 - 0.05)] == [900, 500, 1, 901, 999, 950]
    for level in (0.0, 1.0, 0.9995, -0.1):
        with pytest.raises(ConfigError, match="level must lie in"):
            level_index(level)


def test_ranks_are_those_of_the_definition():
    for count in (1, 9, 19, 99, 100, 2345):
        for index in (1, 100, 500, 900, 950, 999):
            assert conformal_rank(index, count) == math.ceil(index * (count + 1) / 1000 - 1e-9)


def test_quantiles_by_hand():
    quantiles = conformal_quantiles(torch.arange(19.0, 0.0, -1.0), math.inf)
    assert quantiles.shape == (999,)
    assert quantiles[899] == 18.0 and quantiles[499] == 10.0 and quantiles[949] == 19.0
    ranks = [conformal_rank(index, 19) for index in range(1, 951)]
    assert quantiles[:950].tolist() == [float(rank) for rank in ranks]
    assert quantiles[950].isinf() and quantiles[998].isinf() and quantiles[0] == 1.0


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
def test_a_new_sample_lies_below_with_exactly_the_rank_s_probability(level):
    count, repeats = 49, 2000
    draws = torch.rand(repeats, count + 1, generator=torch.Generator().manual_seed(1)).double() ** 3
    bounds = torch.stack([conformal_quantiles(row[:count], math.inf)[level_index(level) - 1] for row in draws])
    share = float((draws[:, -1] <= bounds).double().mean())
    expected = math.ceil(level * 50 - 1e-9) / 50
    assert abs(share - expected) < 4.5 * math.sqrt(expected * (1 - expected) / repeats)


def test_normal_quantiles():
    quantiles = normal_quantiles()
    assert float(quantiles[899]) == pytest.approx(1.6448536, abs=1e-6)
    assert float(quantiles[499]) == pytest.approx(0.6744898, abs=1e-6)
