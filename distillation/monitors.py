"""What to watch while VSD trains: the two failures its users report most, over-saturation and a fake score that lags.

Both are numbers to log, without gradient and without a network call that training would not make.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distillation.denoiser import Prediction
from distillation.errors import DistillationConfigError, NoiseError
from distillation.schedule import add_noise, working_dtype
from latent_rewards.training.devices import moved


@torch.no_grad()
def channel_std(latents: Tensor) -> Tensor:
    """Return the standard deviation of each channel over samples, frames and positions.

    Args:
        latents: [B, C, ...].

    Returns:
        [C], float32 or float64; normalised by the number of values, not by one less.
    """
    values = latents.to(working_dtype(latents)).transpose(0, 1).flatten(1)
    return values.std(dim=1, correction=0)


@torch.no_grad()
def saturation(samples: Tensor, reference_std: Tensor | float) -> Tensor:
    """Return by how much the student's samples spread more than the reference does, per channel.

    1 is as it should be. Strong guidance and long VSD push it up: colours saturate and contrast hardens; 1.2 in a
    channel is visible, and a value that keeps rising is a reason to stop or to lower the guidance. Far below 1 the
    student has collapsed.

    Args:
        samples: the student's latents [B, C, F, H, W].
        reference_std: number or [C], :func:`channel_std` of data. Without data take it of the teacher's x0 estimates of
            the noised samples; those lack the posterior's variance, so only the change of the ratio tells anything.

    Returns:
        [C].

    Raises:
        NoiseError: ``reference_std`` is for another number of channels.
        DistillationConfigError: it is not positive.
    """
    spread = channel_std(samples)
    reference = torch.as_tensor(reference_std)
    if reference.ndim > 1 or (reference.ndim == 1 and len(reference) != len(spread)):
        raise NoiseError(f"reference_std has shape {list(reference.shape)}; the samples have {len(spread)} channels")
    if not bool((reference > 0).all()):
        raise DistillationConfigError(
            f"reference_std must be positive; got {float(reference.min())}: a channel of the reference is constant"
        )
    return spread / moved(reference, spread.device, spread.dtype)


@torch.no_grad()
def fake_score_lag(
    x: Tensor,
    fake_score: nn.Module,
    condition: Any,  # noqa: ANN401 - any Condition
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    """Return which share of its loss the fake score would be rid of, were it merely rescaled to fresh samples.

    An up-to-date denoiser D is a conditional mean: regressing x0 on D gives slope 1 and intercept 0. One that was
    trained on the student of some updates ago does not, and the regression on the very batch shows what it has lost::

        lag = (mean |D - x0|^2 - min_{a, b} mean |a D + b - x0|^2) / min_{a, b} mean |a D + b - x0|^2

    with a and b per channel. It costs one call of the fake score and is never negative: 0 is up to date. In general it
    is a lower bound of the loss that is too much, in units of the least one; exact for Gaussian samples and one t.
    With x ~ N(b, a^2), a fake score of N(b', a'^2) and k = alpha a^2 / (alpha^2 a^2 + sigma^2)::

        lag = ((k' - k)^2 u + (1 - alpha k')^2 (b' - b)^2) u / (a^2 sigma^2),   u = alpha^2 a^2 + sigma^2

    At equal parts of signal and noise a spread that is 10 % off gives 0.01, 20 % gives 0.03. A lag that stays above
    0.03, or rises, means that VSD follows a score of the past: raise ``fake_updates`` or the fake score's learning
    rate. A batch of few values overestimates it by about 2 C / x.numel().

    Args:
        x: fresh student samples [B, C, F, H, W].
        fake_score: a :class:`~distillation.denoiser.Denoiser`.
        condition: of length B, or None.
        t: [] or [B].
        noise: standard normal, like ``x``.

    Returns:
        A scalar; infinite where the rescaled fake score would be perfect and the present one is not.
    """
    x = x.to(working_dtype(x))
    schedule: Any = fake_score.schedule
    prediction: Prediction = fake_score(add_noise(schedule, x, noise, t), t, condition)
    aim, guess = (values.transpose(0, 1).flatten(1) for values in (x, prediction.x0.to(x.dtype)))
    aim_mean, guess_mean = (values.mean(dim=1, keepdim=True) for values in (aim, guess))
    centred = guess - guess_mean
    variance = (centred**2).mean(dim=1, keepdim=True)
    covariance = (centred * (aim - aim_mean)).mean(dim=1, keepdim=True)
    slope = torch.where(variance > 0, covariance / variance, torch.zeros_like(variance))
    best = ((aim - aim_mean - slope * centred) ** 2).mean()
    # The excess by itself, not as a difference of two losses that nearly agree.
    excess = (((1 - slope) * centred + guess_mean - aim_mean) ** 2).mean()
    return torch.where(excess > 0, excess / best, torch.zeros_like(excess))
