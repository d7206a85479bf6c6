"""Points in the space of rewards, more being better in each: which of them are Pareto-optimal, and what they cover."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latent_rewards.contracts import DataError

Points = Tensor | Sequence[Sequence[float]]


def non_dominated(points: Points) -> Tensor:
    """Return bool ``[N]``: True where no other point is at least as good in every reward and better in one.

    Equal points do not dominate each other.

    Args:
        points: ``[N, R]``, finite.

    Raises:
        DataError: the shape is another, or a value is not finite.
    """
    rows = _checked(points)
    at_least = (rows[None] >= rows[:, None]).all(dim=2)
    better = (rows[None] > rows[:, None]).any(dim=2)
    return ~(at_least & better).any(dim=1)


def hypervolume(points: Points, reference: Tensor | Sequence[float]) -> float:
    """Return the volume between a reference point and a set of points (Zitzler and Thiele 1998), exact in float64.

    It is cut into slices along one reward after the other, which takes of the order of ``N^(R - 1)`` steps: meant for
    two or three rewards. A point that is not above the reference in every reward adds nothing.

    Args:
        points: ``[N, R]``, finite.
        reference: ``[R]``, the worst values that count.

    Raises:
        DataError: the shapes do not fit, or a value is not finite.
    """
    rows = _checked(points)
    corner = torch.as_tensor(reference, dtype=torch.float64)
    if corner.shape != rows.shape[1:] or not bool(torch.isfinite(corner).all()):
        raise DataError(f"reference must be {rows.shape[1]} finite numbers, one per reward; got {corner.tolist()}")
    sides = rows - corner
    return _volume(sides[(sides > 0).all(dim=1)])


def _volume(sides: Tensor) -> float:
    """Return the volume of the union of boxes with one corner at 0 and positive ``sides`` ``[N, R]``."""
    if not len(sides):
        return 0.0
    if sides.shape[1] == 1:
        return float(sides.max())
    ordered = sides[sides[:, -1].argsort(descending=True)]
    heights = [*ordered[:, -1].tolist(), 0.0]
    slices = [(i + 1, heights[i] - heights[i + 1]) for i in range(len(ordered)) if heights[i] > heights[i + 1]]
    return sum(thickness * _volume(ordered[:count, :-1]) for count, thickness in slices)


def _checked(points: Points) -> Tensor:
    rows = torch.as_tensor(points, dtype=torch.float64)
    if rows.ndim != 2 or not rows.numel() or not bool(torch.isfinite(rows).all()):
        raise DataError(f"points must be finite and [N, R], at least one; got shape {tuple(rows.shape)}")
    return rows
