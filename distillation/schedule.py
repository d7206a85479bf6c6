"""Noise schedules: time -> (alpha, sigma), with ``x_t = alpha x0 + sigma eps``.

t lies in [0, 1] and t = 1 is noise. Every formula elsewhere is written in alpha and sigma; only this module knows t. A
schedule also owns the convention of the velocity, ``v = p x0 + q eps``. Both conventions here satisfy
``alpha q - sigma p = 1``, so ``x0 = q x_t - sigma v`` and ``eps = alpha v - p x_t`` hold for either without a division.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from distillation.errors import DistillationConfigError, TimestepsError
from latent_rewards.training.devices import moved

MAX_STEPS = 4

_LCM_SIGMA_DATA = 0.5
_LCM_TIME_SCALING = 10.0


class Schedule(Protocol):
    """What every formula needs to know about a diffusion or flow model's time."""

    def __call__(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma, of the shape and dtype of ``t`` (float64 for a Python number)."""
        ...

    def velocity_coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return (p, q) with ``v = p x0 + q eps``."""
        ...

    def boundary(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return (c_skip, c_out) of the consistency function ``c_skip x_t + c_out x0``; (1, 0) at t = 0."""
        ...


@dataclass(frozen=True)
class RectifiedFlow:
    """Straight paths from data to noise: alpha = 1 - sigma and v = eps - x0 (Liu et al. 2022; Lipman et al. 2022).

    Args:
        shift: maps t to ``sigma = shift t / (1 + (shift - 1) t)`` (Esser et al. 2024, eq. 23); 1 gives sigma = t.

    Raises:
        DistillationConfigError: ``shift`` is not positive.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        """Check the shift."""
        if not (self.shift > 0 and math.isfinite(self.shift)):
            raise DistillationConfigError(f"shift must be positive and finite (1 is none); got {self.shift}")

    def __call__(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at ``t`` (number, [] or [B]), in t's dtype."""
        sigma = shift_time(as_time(t), self.shift)
        return 1 - sigma, sigma

    def time_of(self, sigma: float) -> float:
        """Return the t at which the noise level is ``sigma``."""
        return sigma / (self.shift - (self.shift - 1) * sigma)

    def velocity_coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return (-1, 1): v = eps - x0."""
        return -torch.ones_like(alpha), torch.ones_like(alpha)

    def boundary(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return (0, 1), and (1, 0) at t = 0.

        A velocity network meets the boundary by itself; the exception matters for one that predicts x0.
        """
        at_data = (as_time(t) == 0).to(as_time(t).dtype)
        return at_data, 1 - at_data


@dataclass(frozen=True)
class VariancePreserving:
    """Diffusion with alpha^2 + sigma^2 = 1 and v = alpha eps - sigma x0 (Ho et al. 2020; Salimans and Ho 2022).

    The table of ``num_train_timesteps`` levels is the one diffusers' schedulers build: index i is t = (i + 1) /
    num_train_timesteps, and t = 0 is data. Between two indices the angle atan2(sigma, alpha) is interpolated.

    Args:
        kind: "cosine" (Nichol and Dhariwal 2021), "linear" or "scaled_linear" (linear in sqrt beta).
        beta_start: first beta of the two linear kinds.
        beta_end: last beta of the two linear kinds.
        num_train_timesteps: number of levels.
        zero_snr: rescale so that alpha is exactly 0 at t = 1 (Lin et al. 2023, algorithm 1).
        snr_shift: divides the signal-to-noise ratio; 1 is none (CogVideoX uses 3).

    Raises:
        DistillationConfigError: an unknown kind or a value out of range.
    """

    kind: Literal["cosine", "linear", "scaled_linear"] = "cosine"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    zero_snr: bool = False
    snr_shift: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.kind not in ("cosine", "linear", "scaled_linear"):
            raise DistillationConfigError(f"kind must be 'cosine', 'linear' or 'scaled_linear'; got {self.kind!r}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise DistillationConfigError(
                f"betas must satisfy 0 < beta_start <= beta_end < 1; got {self.beta_start} and {self.beta_end}"
            )
        if self.num_train_timesteps < 2:
            raise DistillationConfigError(f"num_train_timesteps must be at least 2; got {self.num_train_timesteps}")
        if not self.snr_shift > 0:
            raise DistillationConfigError(f"snr_shift must be positive (1 is none); got {self.snr_shift}")

    def __call__(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at ``t`` (number, [] or [B]), in t's dtype."""
        time = as_time(t)
        angles = _angles(self).to(time.device)
        position = time.double() * self.num_train_timesteps
        below = position.floor().clamp(0, self.num_train_timesteps - 1).long()
        angle = torch.lerp(angles[below], angles[below + 1], position - below)
        alpha = torch.where(angle >= math.pi / 2, torch.zeros_like(angle), angle.cos())
        return alpha.to(time.dtype), angle.sin().to(time.dtype)

    def velocity_coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return (-sigma, alpha): v = alpha eps - sigma x0."""
        return -sigma, alpha

    def boundary(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return c_skip and c_out of latent consistency models, with n = t num_train_timesteps (Luo et al. 2023)."""
        scaled = _LCM_TIME_SCALING * self.num_train_timesteps * as_time(t)
        total = scaled**2 + _LCM_SIGMA_DATA**2
        return _LCM_SIGMA_DATA**2 / total, scaled / total.sqrt()


@lru_cache(maxsize=16)
def _angles(schedule: VariancePreserving) -> Tensor:
    """Return atan2(sigma, alpha) at t = 0, 1/N, ..., 1 as float64 ``[N + 1]``."""
    count = schedule.num_train_timesteps
    if schedule.kind == "cosine":
        edges = torch.linspace(0, 1, count + 1, dtype=torch.float64)
        levels = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - levels[1:] / levels[:-1]).clamp(max=0.999)
    elif schedule.kind == "linear":
        betas = torch.linspace(schedule.beta_start, schedule.beta_end, count, dtype=torch.float64)
    else:
        ends = schedule.beta_start**0.5, schedule.beta_end**0.5
        betas = torch.linspace(*ends, count, dtype=torch.float64) ** 2
    alpha_squared = torch.cumprod(1 - betas, dim=0)
    alpha_squared = alpha_squared / (schedule.snr_shift + (1 - schedule.snr_shift) * alpha_squared)
    alpha = alpha_squared.sqrt()
    if schedule.zero_snr:
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.acos(alpha)])


def as_time(t: Tensor | float) -> Tensor:
    """Return ``t`` as a floating tensor; a Python number becomes a float64 scalar, which promotes no latents.

    Raises:
        TimestepsError: a Python number outside [0, 1].
    """
    if isinstance(t, Tensor):
        return t if t.is_floating_point() else t.to(torch.float64)
    if not 0 <= t <= 1:
        raise TimestepsError(f"time must lie in [0, 1], where 1 is noise; got {t}")
    return torch.tensor(t, dtype=torch.float64)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Return ``shift t / (1 + (shift - 1) t)``: moves times in [0, 1] towards noise for shift > 1."""
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


def working_dtype(like: Tensor) -> torch.dtype:
    """Return float64 for float64 and float32 for everything else: what predictions and losses are computed in."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Return ``values`` ([] or [B]) on ``like``'s device and working dtype, shaped to multiply ``like`` [B, ...]."""
    values = moved(values, like.device, working_dtype(like))
    return values if values.ndim == 0 else values.view(-1, *[1] * (like.ndim - 1))


def coefficients(schedule: Schedule, t: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma at ``t`` (number, [] or [B]), shaped to multiply ``like`` [B, ...]."""
    alpha, sigma = schedule(t)
    return expand(alpha, like), expand(sigma, like)


def add_noise(schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """Return ``x_t = alpha x0 + sigma noise`` for latents [B, ...] and t [] or [B]."""
    alpha, sigma = coefficients(schedule, t, x0)
    return alpha * x0 + sigma * noise


def check_timesteps(timesteps: Mapping[int, Sequence[float]]) -> dict[int, tuple[float, ...]]:
    """Return the grids of a few-step student, ``{step count: times}``, as a plain dict of tuples.

    Raises:
        TimestepsError: there is none; a count is not 1 to 4; a list has another length, is not strictly descending, or
            leaves (0, 1]. The message names the value and the remedy.
    """
    if not timesteps:
        raise TimestepsError("timesteps is empty; give at least one grid, e.g. {4: [1.0, 0.75, 0.5, 0.25]}")
    grids: dict[int, tuple[float, ...]] = {}
    for count, listed in timesteps.items():
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_STEPS:
            raise TimestepsError(f"a student takes 1 to {MAX_STEPS} steps; got the step count {count!r}: remove it")
        grid = tuple(float(time) for time in listed)
        if len(grid) != count:
            raise TimestepsError(f"timesteps[{count}] holds {len(grid)} times {list(grid)}; give exactly {count}")
        for time in grid:
            if not 0 < time <= 1:
                raise TimestepsError(f"timesteps[{count}] holds {time}; times lie in (0, 1], where 1 is noise")
        if any(later >= earlier for earlier, later in zip(grid, grid[1:], strict=False)):
            raise TimestepsError(f"timesteps[{count}] = {list(grid)} is not strictly descending; sort it, noise first")
        grids[count] = grid
    return dict(sorted(grids.items()))
