"""Consistency distillation: one network that maps every point of a teacher's ODE path to the path's end.

``f(x_t, t) = c_skip x_t + c_out x0(x_t, t)`` is trained to agree with a slowly moving copy of itself one teacher step
closer to the data (Song et al. 2023; latent video: Luo et al. 2023, Wang et al. 2024). Everything is written in alpha
and sigma, so a shifted flow is stepped in sigma and not in t. The fixed point is the teacher's own discrete sampler on
the same grid, not the exact ODE.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distillation.denoiser import Prediction
from distillation.errors import DistillationConfigError
from distillation.sampler import follow_ode
from distillation.schedule import add_noise, expand


def time_grid(num_timesteps: int) -> Tensor:
    """Return the ``num_timesteps + 1`` times 0 = t_0 < ... < t_n = 1 (float64, uniform); training pairs are neighbours.

    Raises:
        DistillationConfigError: fewer than one interval.
    """
    if num_timesteps < 1:
        raise DistillationConfigError(f"num_timesteps must be at least 1; got {num_timesteps}")
    return torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps


def curriculum_pairs(
    u: Tensor,
    progress: float,
    *,
    num_stages: int = 8,
    q: float = 2.0,
    k: float = 8.0,
    b: float = 1.0,
    lowest: float = 0.02,
) -> tuple[Tensor, Tensor]:
    """Return training pairs whose gap shrinks as training goes on, in place of neighbours on :func:`time_grid`.

    Easy consistency tuning (Geng et al. 2024, arXiv 2406.14548)::

        s / t = max(0, 1 - q^-a (1 + k sigmoid(-b t))),   a = 1 + floor(num_stages progress)

    Early pairs reach to the data (s = 0: the target is the end of the teacher's step), late ones approach the
    continuous limit s -> t. The paper's t is a noise-to-signal ratio, here it is the time; so with the default k and b
    the first stage is s = 0 for every t.

    Args:
        u: [B], uniform in [0, 1).
        progress: share of the training that is done, in [0, 1].
        num_stages: how often the gap is divided by q.
        q: by what, more than 1.
        k: widens the gap, most near the data (by 1 + k / 2), not negative; 0 gives every t the same ratio.
        b: how fast that fades with t, not negative.
        lowest: smallest t; the largest is 1, where samplers start.

    Returns:
        t in (lowest, 1] and s in [0, t), like ``u``.

    Raises:
        DistillationConfigError: a value is out of range.
    """
    if not 0 <= progress <= 1:
        raise DistillationConfigError(f"progress must lie in [0, 1]; got {progress}")
    if num_stages < 1 or not q > 1 or k < 0 or b < 0 or not 0 <= lowest < 1:
        raise DistillationConfigError(
            "a curriculum needs num_stages >= 1, q > 1, k >= 0, b >= 0 and 0 <= lowest < 1; got "
            f"num_stages = {num_stages}, q = {q}, k = {k}, b = {b} and lowest = {lowest}"
        )
    stage = 1 + min(int(num_stages * progress), num_stages - 1)
    t = 1 - (1 - lowest) * u
    gap = (1 + k * torch.sigmoid(-b * t)) / q**stage
    return t, t * (1 - gap).clamp(min=0)


def consistency_function(
    denoiser: nn.Module,
    x_t: Tensor,
    t: Tensor,
    condition: Any = None,  # noqa: ANN401 - any Condition
) -> Tensor:
    """Return ``c_skip x_t + c_out x0``, equal to x_t at t = 0.

    Rectified flow meets the boundary by itself (``x0 = x_t - sigma v``); variance-preserving schedules use the
    coefficients of latent consistency models.

    Args:
        denoiser: a :class:`~distillation.denoiser.Denoiser`.
        x_t: [B, ...].
        t: [] or [B].
        condition: of length B, or None.
    """
    prediction: Prediction = denoiser(x_t, t, condition)
    schedule: Any = denoiser.schedule
    c_skip, c_out = (expand(c, x_t) for c in schedule.boundary(t))
    return c_skip * prediction.x_t + c_out * prediction.x0


def consistency_pair(
    student: nn.Module,
    target: nn.Module,
    teacher: nn.Module,
    x0: Tensor,
    condition: Any,  # noqa: ANN401 - any Condition
    noise: Tensor,
    t: Tensor,
    s: Tensor,
    *,
    guidance_scale: float | Tensor = 1.0,
    guidance_start: float = 0.0,
    negative: Any = None,  # noqa: ANN401 - any Condition
    solver_steps: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return ``f_theta(x_t, t)`` with its gradient, and ``f_ema(x_s, s)`` without.

    Args:
        student: the denoiser that is trained.
        target: its slow copy (EMA), or ``student`` itself: the target is then the student without gradient, as an
            ``ema_decay`` of 0, the choice of improved and easy consistency training (arXiv 2310.14189, 2406.14548).
        teacher: the denoiser whose guided ODE steps lead from x_t to x_s.
        x0: data [B, C, F, H, W].
        condition: of length B, or None.
        noise: standard normal, like ``x0``.
        t: [] or [B], in (0, 1].
        s: like t, smaller; 0 is data.
        guidance_scale: w in ``u + w (c - u)``, a number or [B].
        guidance_start: time below which the teacher's steps are not guided; needs a number for w.
        negative: the condition u; needed unless ``guidance_scale`` is 1.
        solver_steps: ODE steps from t to s, equal in time.
    """
    schedule: Any = teacher.schedule
    with torch.no_grad():
        x_t = add_noise(schedule, x0, noise, t)
        times = [*(t + (s - t) * step / solver_steps for step in range(solver_steps)), s]
        guidance: dict[str, Any] = {"guidance_scale": guidance_scale, "guidance_start": guidance_start}
        x_s = follow_ode(teacher, x_t, times, condition, **guidance, negative=negative)
        aim = consistency_function(target, x_s, s, condition)
    return consistency_function(student, x_t, t, condition), aim


def pseudo_huber(prediction: Tensor, target: Tensor, huber_c: float) -> Tensor:
    """Return the mean over elements of ``sqrt(d^2 + c^2) - c``, d = prediction - target; the target gets no gradient.

    The elementwise form of latent consistency models (Luo et al. 2023).

    Raises:
        DistillationConfigError: ``huber_c`` is not positive.
    """
    if not huber_c > 0:
        raise DistillationConfigError(f"huber_c must be positive; got {huber_c}")
    squared = (prediction - target.detach()) ** 2
    # The same number as sqrt(d^2 + c^2) - c, without its cancellation where d is small.
    return torch.mean(squared / (torch.sqrt(squared + huber_c**2) + huber_c))


def consistency_loss(
    student: nn.Module,
    target: nn.Module,
    teacher: nn.Module,
    x0: Tensor,
    condition: Any,  # noqa: ANN401 - any Condition
    noise: Tensor,
    t: Tensor,
    s: Tensor,
    *,
    guidance_scale: float | Tensor = 1.0,
    guidance_start: float = 0.0,
    negative: Any = None,  # noqa: ANN401 - any Condition
    solver_steps: int = 1,
    huber_c: float = 1e-3,
) -> Tensor:
    """Return the discrete consistency distillation loss, a scalar.

    Args:
        student: see :func:`consistency_pair`, as all that follow.
        target: the slow copy.
        teacher: the teacher.
        x0: data [B, C, F, H, W].
        condition: of length B, or None.
        noise: like ``x0``.
        t: [] or [B].
        s: like t, smaller.
        guidance_scale: w.
        guidance_start: of it.
        negative: u.
        solver_steps: teacher steps from t to s.
        huber_c: width of the quadratic part of the loss, in latent units.
    """
    prediction, aim = consistency_pair(
        student,
        target,
        teacher,
        x0,
        condition,
        noise,
        t,
        s,
        guidance_scale=guidance_scale,
        guidance_start=guidance_start,
        negative=negative,
        solver_steps=solver_steps,
    )
    return pseudo_huber(prediction, aim, huber_c)
