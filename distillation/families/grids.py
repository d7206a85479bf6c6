"""Which grids of noise levels an unmodified diffusers pipeline can be made to use, and how.

A stock pipeline tells its scheduler only the number of steps, so the grid must come out of the scheduler's settings:
levels ``1 - i d``, i = 0 .. N - 1, go through its shift ``a`` and are stretched linearly until the last one is
``shift_terminal``. Hence ``1 - sigma_i`` is proportional to ``i / (1 - c i)``: a grid can be exported if and only if
``i / (1 - sigma_i)`` is affine in i, and c is not too large for any ``a``. That holds for one and two steps, for every
uniform grid and for moderately shifted ones. ``FlowMatchLCMScheduler`` re-noises (eta = 1) and
``FlowMatchEulerDiscreteScheduler`` does not (eta = 0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distillation.errors import TimestepsError
from distillation.families import import_diffusers
from distillation.schedule import RectifiedFlow

TRAIN_TIMESTEPS = 1000
"""What Wan and its schedulers multiply a noise level by."""

_TOLERANCE = 1e-6

_REMEDY = (
    "stock schedulers reach levels that start at 1 and form a uniform grid, shifted moderately or not, down to any "
    "last level, e.g. {1: [1.0], 2: [1.0, 0.5], 4: [1.0, 0.75, 0.5, 0.25]}"
)


def scheduler_folder(num_steps: int) -> str:
    """Return the name of the folder with the scheduler of a step count, e.g. ``scheduler_4_steps``."""
    return f"scheduler_{num_steps}_step" if num_steps == 1 else f"scheduler_{num_steps}_steps"


def build_scheduler(configuration: Mapping[str, Any]) -> Any:  # noqa: ANN401 - a diffusers scheduler
    """Return the diffusers scheduler of one configuration of :func:`exportable`."""
    settings = {key: value for key, value in configuration.items() if not key.startswith("_")}
    return getattr(import_diffusers(), configuration["_class_name"])(**settings)


def exportable(
    timesteps: Mapping[int, Sequence[float]], eta: float, *, shift: float = 1.0
) -> dict[int, dict[str, Any]]:
    """Return, for each step count, the scheduler configuration with which a stock pipeline samples like the student.

    Args:
        timesteps: ``{step count: times in (0, 1]}``.
        eta: 1 (fresh noise) or 0 (deterministic); of no consequence for a single step.
        shift: of the student's :class:`~distillation.schedule.RectifiedFlow`, which turns times into noise levels.

    Returns:
        ``{step count: configuration}``; ``"_class_name"`` is the scheduler's class.

    Raises:
        TimestepsError: no stock scheduler reaches a grid, or none re-noises with such an eta. The message names the
            grid and what can be exported.
    """
    schedule = RectifiedFlow(shift)
    return {
        count: _configuration([float(schedule(float(t))[1]) for t in grid], eta) for count, grid in timesteps.items()
    }


def _configuration(sigmas: list[float], eta: float) -> dict[str, Any]:
    count = len(sigmas)
    grid = f"the {count}-step grid with noise levels {[round(sigma, 6) for sigma in sigmas]} cannot be exported"
    if count > 1 and eta not in (0, 1):
        raise TimestepsError(f"{grid}: stock schedulers inject all fresh noise (eta = 1) or none (0), not eta = {eta}")
    descending = all(later < earlier for earlier, later in zip(sigmas, sigmas[1:], strict=False))
    if not descending or abs(sigmas[0] - 1) > _TOLERANCE or sigmas[-1] <= 0:
        raise TimestepsError(f"{grid}: levels descend strictly from 1 and stay above 0; {_REMEDY}")
    name = "FlowMatchEulerDiscreteScheduler" if count > 1 and eta == 0 else "FlowMatchLCMScheduler"
    configuration: dict[str, Any] = {"_class_name": name, "num_train_timesteps": TRAIN_TIMESTEPS, "shift": 1.0}
    if count > 1:
        # With a single step shift_terminal would divide 0 by 0.
        shift = _scheduler_shift(sigmas)
        if shift is None:
            raise TimestepsError(f"{grid}: its steps grow faster than any shift makes them; {_REMEDY}")
        configuration |= {"shift": shift, "shift_terminal": sigmas[-1]}
    reached = _stock_levels(configuration, count)
    if max(abs(a - b) for a, b in zip(sigmas, reached, strict=True)) > _TOLERANCE:
        raise TimestepsError(f"{grid}: a {name} comes to {[round(level, 6) for level in reached]}; {_REMEDY}")
    return configuration


def _scheduler_shift(sigmas: list[float]) -> float | None:
    """Return ``a`` with ``c (N - 1) = (a - 1)(T - 1) / (a (T - 1 + a))``, T = 1000, or None where there is none."""
    if len(sigmas) == 2:
        return 1.0
    first, second = 1 / (1 - sigmas[1]), 2 / (1 - sigmas[2])
    if 2 * first <= second:
        return None
    bend = (first - second) / (2 * first - second) * (len(sigmas) - 1)
    last = TRAIN_TIMESTEPS - 1
    discriminant = ((1 - bend) * last) ** 2 - 4 * bend * last
    if bend >= 1 or discriminant < 0:
        return None
    return round(2 * last / ((1 - bend) * last + math.sqrt(discriminant)), 12)


def _stock_levels(configuration: Mapping[str, Any], num_steps: int) -> list[float]:
    """Return the levels the scheduler itself comes to, so that a change in diffusers cannot go unnoticed."""
    scheduler = build_scheduler(configuration)
    scheduler.set_timesteps(num_steps)
    levels: list[float] = scheduler.sigmas[:-1].tolist()
    return levels
