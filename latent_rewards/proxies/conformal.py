"""Order statistics that hold on samples not seen: the finite-sample quantiles of split-conformal prediction.

Of n held-out values and one new value, all exchangeable, the new one exceeds the ``ceil(level (n + 1))``-th smallest
held-out one with probability at most ``1 - level`` (Vovk et al. 2005; Lei et al. 2018). So that a stored proxy has one
size whatever n is, the quantiles are kept at the levels k/1000, and a level between two of them takes the higher.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latent_rewards.contracts import ConfigError

RESOLUTION = 1000
"""Levels are kept in steps of 1/RESOLUTION."""

NUM_LEVELS = RESOLUTION - 1


def level_index(level: float, name: str = "level") -> int:
    """Return the least k in ``[1, 999]`` with ``k / 1000 >= level``.

    Raises:
        ConfigError: ``level`` lies outside (0, 0.999].
    """
    if not 0 < level <= NUM_LEVELS / RESOLUTION:
        raise ConfigError(f"{name} must lie in (0, {NUM_LEVELS / RESOLUTION}]; got {level}")
    return max(1, math.ceil(level * RESOLUTION - 1e-6))


def conformal_rank(index: int, count: int) -> int:
    """Return ``ceil(index / 1000 (count + 1))``, the rank whose value bounds a share ``index / 1000`` of new ones."""
    return -(-index * (count + 1) // RESOLUTION)


def conformal_quantiles(values: Tensor, beyond: float) -> Tensor:
    """Return the ``[999]`` quantiles of ``values`` ``[n]``; ``beyond`` where n values cannot bound that level."""
    ordered = torch.cat([values.sort().values, values.new_full((1,), beyond)])
    ranks = -(-torch.arange(1, RESOLUTION, device=values.device) * (len(values) + 1) // RESOLUTION)
    return ordered[(ranks - 1).clamp(max=len(values))]


def normal_quantiles() -> Tensor:
    """Return float32 ``[999]``: the half-widths of a standard normal's central intervals at levels k/1000."""
    levels = torch.arange(1, RESOLUTION, dtype=torch.float64) / RESOLUTION
    return torch.special.ndtri((1 + levels) / 2).float()
