import pytest

from benchmarks.seeds import mean_cell, over_seeds


def test_one_seed_does_not_vary_and_is_shown_alone():
    assert over_seeds([0.25]) == {"mean": 0.25, "std": 0.0} and mean_cell(over_seeds([0.25]), 100) == "25.0"


def test_several_seeds_are_told_by_the_deviation_of_a_sample():
    told = over_seeds([1.0, 2.0, 3.0])
    assert told == {"mean": 2.0, "std": pytest.approx(1.0)} and mean_cell(told, digits=2) == "2.00 ± 1.00"
