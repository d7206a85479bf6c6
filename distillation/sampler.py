"""Samplers: the teacher's deterministic steps and the one transition family of few-step students.

A deterministic step keeps the prediction and changes the noise level, ``x_s = alpha_s x0 + sigma_s eps``: DDIM (Song et
al. 2021) for diffusion, Euler for rectified flow. A student's transition spends part of eps on fresh noise and keeps
the coefficients (coefficients-preserving sampling, arXiv 2509.05952), so one ``eta`` joins Euler (0) and multistep
consistency sampling (1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from distillation.denoiser import Prediction, guided, limited_guidance
from distillation.errors import DistillationConfigError, PredictionError
from distillation.schedule import coefficients, working_dtype


def ode_step(x_t: Tensor, prediction: Prediction, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
    """Return ``alpha_s x0 + sigma_s eps``, one DDIM or Euler step from ``x_t`` to the level (alpha_s, sigma_s).

    Args:
        x_t: where the prediction was made [B, ...]; a velocity makes the step an exact increment of it.
        prediction: the (guided) prediction at x_t.
        alpha_s: [] or [B, 1, ...].
        sigma_s: likewise; for rectified flow the step is ``x_t + (sigma_s - sigma_t) v``, whatever the shift.
    """
    if prediction.native == "x0":
        ratio = sigma_s / prediction.sigma
        return ratio * x_t + (alpha_s - ratio * prediction.alpha) * prediction.x0
    return alpha_s * prediction.x0 + sigma_s * prediction.eps


@torch.no_grad()
def sample_teacher(
    denoiser: nn.Module,
    condition: Any,  # noqa: ANN401 - any Condition
    noise: Tensor,
    *,
    num_steps: int = 50,
    guidance_scale: float = 1.0,
    negative: Any = None,  # noqa: ANN401 - any Condition
    progress: bool = False,
) -> Tensor:
    """Integrate the probability-flow ODE from noise to latents on a uniform grid in t; deterministic.

    Args:
        denoiser: a :class:`~distillation.denoiser.Denoiser`.
        condition: a condition of length B, or None.
        noise: [B, C, F, H, W], standard normal.
        num_steps: network evaluations (twice as many with guidance), at least 1.
        guidance_scale: w in ``u + w (c - u)``; 1 is none.
        negative: the condition u; needed unless ``guidance_scale`` is 1.
        progress: draw a progress bar.

    Returns:
        Latents of the shape of ``noise``, float32 or float64.

    Raises:
        DistillationConfigError: ``num_steps`` is less than 1.
    """
    if num_steps < 1:
        raise DistillationConfigError(f"num_steps must be at least 1; got {num_steps}")
    x, times = noise.to(working_dtype(noise)), [1 - step / num_steps for step in range(num_steps + 1)]
    return follow_ode(
        denoiser, x, times, condition, guidance_scale=guidance_scale, negative=negative, progress=progress
    )


def follow_ode(
    denoiser: nn.Module,
    x_t: Tensor,
    times: Sequence[float | Tensor],
    condition: Any,  # noqa: ANN401 - any Condition
    *,
    guidance_scale: float | Tensor = 1.0,
    guidance_start: float = 0.0,
    negative: Any = None,  # noqa: ANN401 - any Condition
    progress: bool = False,
) -> Tensor:
    """Return where deterministic steps through the times lead, [B, ...]; with n + 1 times, n predictions.

    Args:
        denoiser: a :class:`~distillation.denoiser.Denoiser`.
        x_t: latents [B, ...] at the first time.
        times: descending; each a number, [] or [B]; 0 is data.
        condition: of length B, or None.
        guidance_scale: w, a number or one per sample [B].
        guidance_start: see :func:`~distillation.denoiser.limited_guidance`; needs a number for w.
        negative: the condition u; needed unless ``guidance_scale`` is 1.
        progress: draw a progress bar.
    """
    schedule: Any = denoiser.schedule
    for here, there in tqdm([*pairwise(times)], desc="teacher", disable=not progress, dynamic_ncols=True):
        t = here if isinstance(here, Tensor) else time_like(here, x_t)
        scale = limited_guidance(guidance_scale, t, guidance_start)
        prediction = guided(denoiser, x_t, t, condition, negative, scale)
        x_t = ode_step(x_t, prediction, *coefficients(schedule, there, x_t))
    return x_t


def transition(
    x0: Tensor, eps_hat: Tensor | None, alpha_next: Tensor, sigma_next: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """Return mean ``alpha' x0 + sigma' cos(eta pi/2) eps_hat`` and std ``sigma' sin(eta pi/2)`` of the next latents.

    Args:
        x0: predicted clean latents [B, ...].
        eps_hat: predicted noise; not needed (may be None) at eta = 1.
        alpha_next: alpha' of the level reached, [] or [B, 1, ...]; 1 after the last step.
        sigma_next: sigma' likewise; 0 after the last step, which makes it deterministic.
        eta: in [0, 1]; 0 is DDIM / Euler, 1 multistep consistency sampling (fresh noise).

    Raises:
        PredictionError: ``eps_hat`` is None and eta is not 1.
    """
    mean = alpha_next * x0
    if eta != 1:
        if eps_hat is None:
            raise PredictionError(f"eta = {eta} keeps part of the predicted noise; pass eps_hat")
        mean = mean + sigma_next * math.cos(eta * math.pi / 2) * eps_hat
    return mean, sigma_next * math.sin(eta * math.pi / 2)


def time_like(t: float, like: Tensor) -> Tensor:
    """Return ``t`` as a scalar tensor a network can take beside the latents ``like``."""
    return torch.full((), t, dtype=working_dtype(like), device=like.device)
