from __future__ import annotations

import itertools
import math

import pytest
import torch

import latent_rewards as lr
from latent_rewards.contracts import DataError


def union_by_inclusion_and_exclusion(points, reference):
    """The same volume another way: every subset's intersection is a box."""
    sides = (torch.tensor(points, dtype=torch.float64) - torch.tensor(reference, dtype=torch.float64)).clamp(min=0)
    total = 0.0
    for size in range(1, len(sides) + 1):
        for subset in itertools.combinations(sides, size):
            total += (-1) ** (size + 1) * float(torch.stack(subset).amin(0).prod())
    return total


def test_the_area_of_a_staircase():
    points = [[1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [1.5, 1.5], [-1.0, 9.0]]
    assert lr.hypervolume(points, [0.0, 0.0]) == 6.0
    assert lr.hypervolume(points, [1.0, 0.0]) == 3.0
    assert lr.hypervolume([[1.0, 1.0]], [1.0, 0.0]) == 0.0


@pytest.mark.parametrize("rewards", [1, 2, 3, 4])
def test_volumes_equal_inclusion_and_exclusion(rewards):
    points = torch.rand(7, rewards, generator=torch.Generator().manual_seed(rewards), dtype=torch.float64)
    points[3] = points[2]
    points[4, 0] = points[2, 0]
    reference = [0.2] * rewards
    expected = union_by_inclusion_and_exclusion(points.tolist(), reference)
    assert lr.hypervolume(points, reference) == pytest.approx(expected, rel=1e-12)
    # What is dominated adds nothing.
    assert lr.hypervolume(points[lr.non_dominated(points)], reference) == pytest.approx(expected, rel=1e-12)


def test_which_points_are_dominated():
    points = [[1.0, 3.0], [2.0, 2.0], [2.0, 2.0], [2.0, 1.0], [0.5, 3.0], [3.0, 0.0]]
    assert lr.non_dominated(points).tolist() == [True, True, True, False, False, True]


def test_mistakes_are_named():
    for points in ([], [1.0, 2.0], [[1.0, math.nan]]):
        with pytest.raises(DataError, match="points must be finite"):
            lr.non_dominated(points)
    with pytest.raises(DataError, match="reference must be 2 finite numbers"):
        lr.hypervolume([[1.0, 2.0]], [0.0])
    with pytest.raises(DataError, match="reference must be 2 finite numbers"):
        lr.hypervolume([[1.0, 2.0]], [0.0, math.inf])
