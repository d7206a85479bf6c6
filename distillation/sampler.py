"""Samplers: the teacher's deterministic steps and the one transition family of few-step students.

A deterministic step keeps the prediction and changes the noise level, ``x_s = alpha_s x0 + sigma_s eps``: DDIM (Song et
al. 2021) for diffusion, Euler for rectified flow. A student's transition spends part of eps on fresh noise and keeps
the coefficients (coefficients-preserving sampling, arXiv 2509.05952), so one ``eta`` joins Euler (0) and multistep
consistency sampling (1).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from distillation.denoiser import Prediction, guided
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
    schedule: Any = denoiser.schedule
    x = noise.to(working_dtype(noise))
    for step in tqdm(range(num_steps), desc="teacher", disable=not progress, dynamic_ncols=True):
        t = time_like(1 - step / num_steps, x)
        prediction = guided(denoiser, x, t, condition, negative, guidance_scale)
        x = ode_step(x, prediction, *coefficients(schedule, 1 - (step + 1) / num_steps, x))
    return x


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
