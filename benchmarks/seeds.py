"""Numbers of several training seeds as mean and standard deviation, and how a table shows them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence


def over_seeds(values: Sequence[float]) -> dict[str, float]:
    """Return mean and standard deviation of one number per training seed."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def mean_cell(value: Mapping[str, float], scale: float = 1, digits: int = 1) -> str:
    """Return mean and standard deviation as a table shows them; the mean alone where nothing varies."""
    mean, std = (f"{scale * value[key]:.{digits}f}" for key in ("mean", "std"))
    return mean if value["std"] == 0 else f"{mean} ± {std}"
