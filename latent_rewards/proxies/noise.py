"""Scoring noisy latents ``x_t = alpha(t) x0 + sigma(t) eps``: the levels, their schedule, and how t enters a network.

What a proxy learns to predict from x_t is the posterior mean E[r | x_t]: its error has a floor that grows with t. Its
standard deviation is therefore corrected level by level: ``std(t) = g_r(t) std``, where g_r is the split-conformal
factor (see :mod:`latent_rewards.proxies.calibration`) at five levels, linear in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError, DataError, FingerprintMismatchError
from latent_rewards.proxies.calibration import LEVEL, Z_LEVEL
from latent_rewards.proxies.held import Held
from latent_rewards.training.randomness import sample_noise, sample_uniform

Schedule = Callable[[Tensor], tuple[Tensor, Tensor]]
"""t ``[B]`` in [0, 1] -> alpha and sigma, each ``[B]``."""

Draw = Callable[[Tensor, tuple[int, ...]], tuple[Tensor, Tensor]]
"""Indices ``[B]`` and one sample's shape -> t ``[B]`` and standard normal noise ``[B, *shape]``."""

NUM_LEVELS = 5
_PROBES = 9
_WAVES = 8


def rectified_flow(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``1 - t`` and ``t`` (Liu et al. 2023)."""
    return 1 - t, t


class TimeEmbedding(nn.Module):
    """t ``[B]`` -> ``[B, width]``: sines and cosines of 8 frequencies, octaves from a quarter wave, then an MLP.

    Args:
        width: of the embedding.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi / 2 * 2.0 ** torch.arange(_WAVES), persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * _WAVES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Return ``[B, width]``."""
        angles = t[:, None].to(self.frequencies) * self.frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], dim=1))


def probe_schedule(schedule: Schedule) -> list[list[float]]:
    """Return alpha and sigma at nine times from 0 to 1: what is stored to tell one schedule from another.

    Raises:
        ConfigError: the schedule does not return two finite, non-negative tensors like t.
    """
    t = torch.linspace(0, 1, _PROBES, dtype=torch.float64)
    try:
        alpha, sigma = (torch.as_tensor(value).double().cpu().expand(_PROBES) for value in schedule(t))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"schedule must map t [B] to (alpha [B], sigma [B]); it failed: {error}") from error
    values = torch.stack([alpha, sigma], dim=1)
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ConfigError(f"schedule must return finite, non-negative alpha and sigma; got {values.tolist()}")
    return values.tolist()


class NoiseLevels(nn.Module):
    """The range of t that a proxy reads, the schedule it was trained with, and the correction of its deviation.

    Args:
        bounds: lowest and highest t.
        num_rewards: R.
        schedule: None takes :func:`rectified_flow`, unless ``stored`` says otherwise.
        stored: what :func:`probe_schedule` returned at training; a proxy whose schedule is missing can score, for that
            takes t only, but not be trained.

    Raises:
        FingerprintMismatchError: ``schedule`` is not the stored one.
        ConfigError: ``schedule`` is none.
    """

    levels: Tensor
    factors: Tensor

    def __init__(
        self,
        bounds: tuple[float, float],
        num_rewards: int,
        schedule: Schedule | None = None,
        stored: list[list[float]] | None = None,
    ) -> None:
        super().__init__()
        self.bounds = bounds
        probed = probe_schedule(schedule or rectified_flow)
        self.probed = probed if stored is None else stored
        differs = not torch.allclose(torch.tensor(probed), torch.tensor(self.probed), atol=1e-5)
        if differs and schedule is not None:
            raise FingerprintMismatchError(
                f"the proxy was trained with a schedule whose (alpha, sigma) are {self.probed} at nine times from 0 to "
                f"1; the one given has {probed}: pass the same schedule"
            )
        self._held = Held(None if differs else schedule or rectified_flow)
        self.register_buffer("levels", torch.linspace(*bounds, NUM_LEVELS))
        self.register_buffer("factors", torch.ones(NUM_LEVELS, num_rewards))

    def read(self, t: Tensor | float | None, count: int) -> Tensor:
        """Return t as ``[count]``; None is 0, clean.

        Raises:
            DataError: t is neither one number nor ``count`` many, or lies outside the range the proxy was trained for.
        """
        values = torch.as_tensor(0.0 if t is None else t).detach().to(self.levels)
        if values.ndim > 1 or values.numel() not in (1, count):
            raise DataError(f"t must be a number or [{count}], one per sample; got shape {tuple(values.shape)}")
        low, high = self.bounds
        outside = ~((values >= low - 1e-6) & (values <= high + 1e-6))
        if bool(outside.any()):
            given = "None (clean, t = 0)" if t is None else f"{float(values.reshape(-1)[outside.reshape(-1)][0]):g}"
            raise DataError(f"this proxy was trained for t in [{low:g}, {high:g}] (noise_levels); got t = {given}")
        return values.reshape(-1).expand(count)

    def corrupt(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return ``alpha(t) latents + sigma(t) noise`` for t ``[B]``.

        Raises:
            DataError: the proxy was loaded without the schedule it was trained with.
        """
        if self._held.value is None:
            raise DataError(
                "this proxy was trained with another schedule than rectified flow, which is not stored; pass it: "
                "RewardProxy.from_pretrained(path, schedule=...)"
            )
        alpha, sigma = (
            torch.as_tensor(value).to(latents).expand(len(latents)).view(-1, 1, 1, 1, 1)
            for value in self._held.value(t)
        )
        return alpha * latents + sigma * noise.to(latents)

    def factor(self, t: Tensor) -> Tensor:
        """Return g ``[B, R]`` at t ``[B]``."""
        upper = torch.searchsorted(self.levels, t.to(self.levels).contiguous()).clamp(1, NUM_LEVELS - 1)
        below, above = self.levels[upper - 1], self.levels[upper]
        part = ((t.to(self.levels) - below) / (above - below)).clamp(0, 1)[:, None]
        return (1 - part) * self.factors[upper - 1] + part * self.factors[upper]

    @torch.no_grad()
    def fit(self, errors: list[Tensor], deviations: list[Tensor]) -> None:
        """Set g from held-out errors (NaN: unknown) and deviations before correction, ``[n, R]`` at each level."""
        for row, (error, deviation) in enumerate(zip(errors, deviations, strict=True)):
            for column in range(error.shape[1]):
                known = ~error[:, column].isnan()
                ratios = (error[known, column].abs() / deviation[known, column]).double().sort().values
                if len(ratios) >= 2:
                    rank = min(len(ratios), math.ceil(LEVEL * (len(ratios) + 1)))
                    self.factors[row, column] = max(float(ratios[rank - 1]) / Z_LEVEL, 1e-3)


def read_level(noise: NoiseLevels | None, t: Tensor | float | None, count: int, *, like: Tensor) -> tuple[Tensor, ...]:
    """Return t as members take it, ``([count],)``, or nothing for a proxy of clean latents.

    Raises:
        DataError: see :meth:`NoiseLevels.read`; or t is not 0 for a proxy of clean latents.
    """
    if noise is not None:
        return (noise.read(t, count).to(like),)
    if t is not None and bool((torch.as_tensor(t) != 0).any()):
        raise DataError("this proxy was trained on clean latents; train one with noise_levels to score noisy ones")
    return ()


def fixed_draws(seed: int, bounds: tuple[float, float], level: float | None = None) -> Draw:
    """Return draws that depend on a sample's index only; t is uniform in ``bounds``, or ``level``."""
    low, high = bounds

    def draw(indices: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        rows = indices.tolist()
        noise = sample_noise(seed, "proxy/noise", 0, rows, shape)
        if level is not None:
            return torch.full((len(rows),), level), noise
        return (low + (high - low) * sample_uniform(seed, "proxy/level", 0, rows)).float(), noise

    return draw


def fresh_draws(source: torch.Generator, bounds: tuple[float, float]) -> Draw:
    """Return draws from ``source``, others at each call; t is uniform in ``bounds``."""
    low, high = bounds

    def draw(indices: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        t = low + (high - low) * torch.rand(len(indices), generator=source)
        return t, torch.randn(len(indices), *shape, generator=source)

    return draw
