"""Which grids of a variance-preserving student an unmodified diffusers pipeline can be made to use, and how.

The counterpart of :mod:`distillation.families.grids` for diffusion: schedulers here walk over whole indices of a table
of noise levels, index i being t = (i + 1) / N. The table itself can be given (``trained_betas``), so every schedule of
ours is reached; what limits a grid is which indices a scheduler visits when it is told only the number of steps.

eta = 0 is ``CogVideoXDDIMScheduler``, whose "leading" spacing visits any arithmetic progression. eta = 1 is
``LCMScheduler``, which divides the table evenly; its boundary condition, which would mix the input into the prediction,
vanishes for a large ``timestep_scaling``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distillation.denoiser import Kind
from distillation.errors import TimestepsError
from distillation.families.grids import build_scheduler
from distillation.schedule import VariancePreserving

PREDICTION_TYPES: dict[Kind, str] = {"x0": "sample", "eps": "epsilon", "v": "v_prediction"}
"""What diffusers calls a network's native prediction."""

_WHOLE = 1e-4
_TOLERANCE = 1e-6
_NO_BOUNDARY = 1e6  # c_skip is then at most 2.5e-13, from index 1 on

_REMEDY = "a grid that always can be is uniform, e.g. {1: [1.0], 2: [1.0, 0.5], 4: [1.0, 0.75, 0.5, 0.25]}"


def exportable_vp(
    timesteps: Mapping[int, Sequence[float]], eta: float, *, schedule: VariancePreserving, native: Kind = "v"
) -> dict[int, dict[str, Any]]:
    """Return, for each step count, the scheduler configuration with which a stock pipeline samples like the student.

    Args:
        timesteps: ``{step count: times in (0, 1]}``, strictly descending.
        eta: 1 (fresh noise) or 0 (deterministic); of no consequence for a single step.
        schedule: the student's.
        native: what its network puts out.

    Returns:
        ``{step count: configuration}``; ``"_class_name"`` is the scheduler's class.

    Raises:
        TimestepsError: no stock scheduler visits a grid, or none re-noises with such an eta. The message names the
            grid and what can be exported.
    """
    return {count: _configuration(list(grid), eta, schedule, native) for count, grid in timesteps.items()}


def _configuration(grid: list[float], eta: float, schedule: VariancePreserving, native: Kind) -> dict[str, Any]:
    count = len(grid)
    named = f"the {count}-step grid {[round(t, 6) for t in grid]} cannot be exported"
    if count > 1 and eta not in (0, 1):
        raise TimestepsError(f"{named}: stock schedulers inject all fresh noise (eta = 1) or none (0), not eta = {eta}")
    indices = _whole_indices(grid, schedule.num_train_timesteps, named)
    if count > 1 and eta == 0:
        spacing, untouched = _leading(indices, named)
    else:
        spacing, untouched = _even(indices, named), 0
    configuration = {
        "clip_sample": False,
        "prediction_type": PREDICTION_TYPES[native],
        "set_alpha_to_one": True,
        "trained_betas": _betas(schedule, untouched),
        **spacing,
    }
    _check(configuration, indices, schedule, named)
    return configuration


def _whole_indices(grid: list[float], levels: int, named: str) -> list[int]:
    indices = [round(levels * t - 1) for t in grid]
    for t, index in zip(grid, indices, strict=True):
        if abs(levels * t - 1 - index) > _WHOLE or index < 0:
            raise TimestepsError(
                f"{named}: t = {t} lies between two of the {levels} noise levels a stock scheduler knows; use "
                f"{(max(index, 0) + 1) / levels}. {_REMEDY}"
            )
    return indices


def _leading(indices: list[int], named: str) -> tuple[dict[str, Any], int]:
    """Return settings of the DDIM scheduler, and how many levels below the last visited one must be free of noise."""
    steps = {earlier - later for earlier, later in zip(indices, indices[1:], strict=False)}
    if len(steps) > 1 or min(steps) < 1:
        raise TimestepsError(
            f"{named}: its steps are {[a - b for a, b in zip(indices, indices[1:], strict=False)]} noise levels long, "
            f"and a CogVideoXDDIMScheduler makes equal ones; {_REMEDY}"
        )
    step = steps.pop()
    settings = {
        "_class_name": "CogVideoXDDIMScheduler",
        "num_train_timesteps": step * len(indices),
        "timestep_spacing": "leading",
        "steps_offset": indices[-1],
        "rescale_betas_zero_snr": False,
        "snr_shift_scale": 1.0,
    }
    # The last step goes as far as the others do; where that is a level of the table, it must be the data itself.
    return settings, max(indices[-1] - step + 1, 0)


def _even(indices: list[int], named: str) -> dict[str, Any]:
    """Return settings of the LCM scheduler, which cuts ``original_inference_steps`` levels into equal runs."""
    count, total = len(indices), indices[0] + 1
    for originals in range(count, total + 1):
        stride, rest = divmod(total, originals)
        if not rest and indices == [(originals - k * originals // count) * stride - 1 for k in range(count)]:
            break
    else:
        raise TimestepsError(f"{named}: an LCMScheduler divides the levels below the first evenly; {_REMEDY}")
    if indices[-1] < 1:
        raise TimestepsError(f"{named}: an LCMScheduler returns its input at the lowest level; leave that out")
    return {
        "_class_name": "LCMScheduler",
        "num_train_timesteps": total,
        "original_inference_steps": originals,
        "timestep_scaling": _NO_BOUNDARY,
    }


def _betas(schedule: VariancePreserving, untouched: int) -> list[float]:
    """Return the betas of the schedule's table, in which the first ``untouched`` levels are data."""
    levels = schedule.num_train_timesteps
    alpha, _ = schedule(torch.arange(1, levels + 1, dtype=torch.float64) / levels)
    squared = alpha**2
    squared[:untouched] = 1
    before = torch.cat([torch.ones(1, dtype=torch.float64), squared[:-1]])
    betas: list[float] = (1 - squared / before).tolist()
    return betas


def _check(configuration: Mapping[str, Any], indices: list[int], schedule: VariancePreserving, named: str) -> None:
    """Ask the scheduler itself, so that a change in diffusers cannot go unnoticed."""
    scheduler = build_scheduler(configuration)
    scheduler.set_timesteps(len(indices))
    visited = scheduler.timesteps.tolist()
    times = torch.tensor([index + 1 for index in indices], dtype=torch.float64) / schedule.num_train_timesteps
    error = (scheduler.alphas_cumprod[visited].double() - schedule(times)[0] ** 2).abs().max()
    if visited != indices or error > _TOLERANCE:
        raise TimestepsError(
            f"{named}: a {configuration['_class_name']} comes to the indices {visited} instead of {indices}, its noise "
            f"levels off by {float(error):.1e}; {_REMEDY}"
        )
