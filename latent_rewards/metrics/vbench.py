"""VBench's totals from its sixteen dimensions (Huang et al. 2023, arXiv 2311.17982; constants of its leaderboard).

    quality  = (six dimensions + half of dynamic degree) / 6.5      semantic = mean of nine dimensions
    total    = 0.8 quality + 0.2 semantic

Each dimension is first mapped linearly from the range it was seen to take onto 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from latent_rewards.contracts import DataError, unknown_name

QUALITY: dict[str, tuple[float, float, float]] = {
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
}
"""Dimension -> (low, high, weight)."""

SEMANTIC: dict[str, tuple[float, float, float]] = {
    "object_class": (0.0, 1.0, 1.0),
    "multiple_objects": (0.0, 1.0, 1.0),
    "human_action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0),
    "spatial_relationship": (0.0, 1.0, 1.0),
    "scene": (0.0, 0.8222, 1.0),
    "appearance_style": (0.0009, 0.2855, 1.0),
    "temporal_style": (0.0, 0.364, 1.0),
    "overall_consistency": (0.0, 0.364, 1.0),
}
"""Dimension -> (low, high, weight)."""

_QUALITY_SHARE = 0.8


@dataclass(frozen=True)
class VBenchScore:
    """VBench's three totals, in percent."""

    quality: float
    semantic: float
    total: float


def vbench_score(dimensions: Mapping[str, float]) -> VBenchScore:
    """Return VBench's quality, semantic and total score, in percent.

    Args:
        dimensions: the sixteen dimensions in percent, as VBench's tables print them; a name may be written with spaces
            or underscores. The values are not clipped to the ranges, as VBench does not.

    Raises:
        DataError: a dimension is missing, unknown, given twice, or not a number from 0 to 100.
    """
    values: dict[str, float] = {}
    known = QUALITY | SEMANTIC
    for name, value in dimensions.items():
        key = name.strip().lower().replace(" ", "_")
        if key not in known:
            raise DataError(unknown_name("VBench dimension", name, known))
        if key in values:
            raise DataError(f"VBench dimension {key!r} is given twice; keep one of them")
        if not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 100:
            raise DataError(f"VBench dimension {key!r} must be a percentage from 0 to 100; got {value!r}")
        values[key] = float(value)
    if missing := [name for name in known if name not in values]:
        raise DataError(f"VBench dimensions are missing: {', '.join(missing)}; the totals need all sixteen")
    if 0 < max(values.values()) <= 1:
        raise DataError("no VBench dimension exceeds 1: these look like fractions; multiply them by 100")
    quality, semantic = _weighted(values, QUALITY), _weighted(values, SEMANTIC)
    return VBenchScore(quality, semantic, _QUALITY_SHARE * quality + (1 - _QUALITY_SHARE) * semantic)


def _weighted(percent: Mapping[str, float], part: Mapping[str, tuple[float, float, float]]) -> float:
    total = sum(weight * (percent[name] - 100 * low) / (high - low) for name, (low, high, weight) in part.items())
    return total / sum(weight for _, _, weight in part.values())
