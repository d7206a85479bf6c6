"""What a denoiser predicts, in whichever form its network speaks, and guidance.

``x_t = alpha x0 + sigma eps`` and ``v = p x0 + q eps`` (see :mod:`distillation.schedule`): given x_t, any one of x0,
eps and v determines the other two. Predictions are held in float32, or float64 if they come so.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from distillation.errors import ConditionError, DistillationConfigError, PredictionError
from distillation.schedule import Schedule, coefficients, expand, working_dtype

Kind = Literal["x0", "eps", "v"]


@runtime_checkable
class Condition(Protocol):
    """Prompts as a denoiser wants them; structurally the condition of any policy."""

    def __len__(self) -> int:
        """Return the number of samples described."""
        ...

    def index_select(self, index: Tensor) -> Any:  # noqa: ANN401 - the same kind of condition
        """Return the rows at ``index`` (int64 [M])."""
        ...

    def to(self, device: torch.device | str) -> Any:  # noqa: ANN401 - the same kind of condition
        """Return the condition on ``device``."""
        ...


class Prediction:
    """One prediction at x_t, readable as ``x0``, ``eps`` or ``v`` (v in the schedule's convention), computed lazily.

    Args:
        x_t: noisy latents [B, ...].
        t: time, number, [] or [B].
        schedule: the denoiser's schedule.
        x0: predicted clean latents; give exactly one of the three.
        eps: predicted noise.
        v: predicted velocity, flow ``eps - x0``, variance preserving ``alpha eps - sigma x0``.

    Attributes:
        native: which of the three was given, "x0", "eps" or "v".
        x_t: the noisy latents, float32 or float64.
        alpha: [] or [B, 1, ...], shaped to multiply x_t.
        sigma: likewise.

    Raises:
        PredictionError: none or several were given; or, on reading, x0 from eps where alpha is 0 (zero terminal SNR),
            or eps or v from x0 where sigma is 0.
    """

    def __init__(
        self,
        x_t: Tensor,
        t: Tensor | float,
        schedule: Schedule,
        *,
        x0: Tensor | None = None,
        eps: Tensor | None = None,
        v: Tensor | None = None,
    ) -> None:
        given: dict[Kind, Tensor] = {}
        for kind, value in (("x0", x0), ("eps", eps), ("v", v)):
            if value is not None:
                given[kind] = value  # type: ignore[index]
        if len(given) != 1:
            raise PredictionError(f"give exactly one of x0, eps and v; got {', '.join(given) or 'none'}")
        ((self.native, value),) = given.items()
        self.x_t = x_t.to(working_dtype(x_t))
        self._value = value.to(working_dtype(value))
        self.alpha, self.sigma = coefficients(schedule, t, x_t)
        self._p, self._q = schedule.velocity_coefficients(self.alpha, self.sigma)

    @property
    def value(self) -> Tensor:
        """The prediction in its native form."""
        return self._value

    @cached_property
    def x0(self) -> Tensor:
        """Predicted clean latents [B, ...]."""
        if self.native == "x0":
            return self._value
        if self.native == "v":
            return self._q * self.x_t - self.sigma * self._value
        if bool((self.alpha == 0).any()):
            raise PredictionError(
                "alpha is 0 here (zero terminal SNR): a noise prediction says nothing about x0; "
                "use a v or x0 prediction, or keep the times below 1"
            )
        return (self.x_t - self.sigma * self._value) / self.alpha

    @cached_property
    def eps(self) -> Tensor:
        """Predicted noise [B, ...]."""
        if self.native == "eps":
            return self._value
        if self.native == "v":
            return self.alpha * self._value - self._p * self.x_t
        if bool((self.sigma == 0).any()):
            raise PredictionError(
                "sigma is 0 here (t = 0): an x0 prediction says nothing about the noise; keep the times above 0"
            )
        return (self.x_t - self.alpha * self._value) / self.sigma

    @cached_property
    def v(self) -> Tensor:
        """Predicted velocity [B, ...] in the schedule's convention."""
        return self._value if self.native == "v" else self._p * self.x0 + self._q * self.eps

    def native_target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Return what a perfect network would have put out, given the x0 and the noise that made x_t."""
        if self.native == "v":
            return self._p * x0 + self._q * noise
        return x0 if self.native == "x0" else noise


class Denoiser(nn.Module):
    """A network and its schedule: ``denoiser(x_t, t, condition) -> Prediction``.

    Structural: whatever is an ``nn.Module`` with ``schedule`` and this ``forward`` serves; nothing checks the class.
    """

    schedule: Schedule

    def forward(self, x_t: Tensor, t: Tensor, condition: Any = None) -> Prediction:  # noqa: ANN401 - any Condition
        """Predict at noisy latents.

        Args:
            x_t: [B, C, F, H, W].
            t: [] or [B], in [0, 1]; 1 is noise. The schedule turns it into alpha and sigma.
            condition: a :class:`Condition` of length B, or None.
        """
        raise NotImplementedError


class GaussianDenoiser(Denoiser):
    """The exact denoiser of data N(mean, std^2 I), or of frames with a covariance; it has no parameters.

    ``E[x0 | x_t] = m + alpha s^2 / (alpha^2 s^2 + sigma^2) (x_t - alpha m)``, in the eigenbasis of the covariance.

    Args:
        mean: number, or tensor that broadcasts against [B, C, F, H, W].
        std: likewise; constant along the frames if ``frame_covariance`` is given.
        schedule: the noise schedule.
        frame_covariance: [F, F], symmetric and positive; multiplied by ``std^2``. None is the identity.
    """

    mean: Tensor
    variance: Tensor
    basis: Tensor | None

    def __init__(
        self,
        mean: Tensor | float,
        std: Tensor | float,
        schedule: Schedule,
        *,
        frame_covariance: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        variance = torch.as_tensor(std, dtype=torch.float64) ** 2
        basis = None
        if frame_covariance is not None:
            eigenvalues, basis = torch.linalg.eigh(frame_covariance.to(torch.float64))
            variance = variance * eigenvalues.view(-1, 1, 1)
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float64))
        self.register_buffer("variance", variance)
        self.register_buffer("basis", basis)

    def forward(self, x_t: Tensor, t: Tensor, condition: Any = None) -> Prediction:  # noqa: ANN401 - not looked at
        """Return the posterior mean, given as a velocity: exact at both ends of time."""
        alpha, sigma = coefficients(self.schedule, t, x_t)
        mean, variance = self.mean.to(alpha.dtype), self.variance.to(alpha.dtype)
        residual = x_t.to(alpha.dtype) - alpha * mean
        if self.basis is not None:
            residual = torch.einsum("fg,bcfhw->bcghw", self.basis.to(alpha.dtype), residual)
        whitened = residual / (alpha**2 * variance + sigma**2)
        p, q = self.schedule.velocity_coefficients(alpha, sigma)
        moved = (p * alpha * variance + q * sigma) * whitened
        if self.basis is not None:
            moved = torch.einsum("fg,bcghw->bcfhw", self.basis.to(alpha.dtype), moved)
        return Prediction(x_t, t, self.schedule, v=p * mean + moved)


class EmpiricalDenoiser(Denoiser):
    """The exact denoiser of a finite data set, or of equal Gaussians around its points; it has no parameters.

    With w the posterior ``softmax_i(log weight_i - |x_t - alpha x_i|^2 / (2 (alpha^2 std^2 + sigma^2)))`` and
    ``m = sum_i w_i x_i``, ``E[x0 | x_t] = m + alpha std^2 / (alpha^2 std^2 + sigma^2) (x_t - alpha m)``: for std = 0
    the softmax-weighted mean of the data, and for two points and std > 0 a mixture of two Gaussians.

    Args:
        points: the data [K, C, F, H, W], or the means of the mixture.
        schedule: the noise schedule.
        std: spread around each point, in latent units; 0 is the data set itself.
        weights: [K], not negative; their sum does not matter. None weighs all alike.

    Raises:
        DistillationConfigError: there is no point, ``std`` is negative, or the weights are not K such numbers.
    """

    points: Tensor
    log_weights: Tensor

    def __init__(self, points: Tensor, schedule: Schedule, *, std: float = 0.0, weights: Tensor | None = None) -> None:
        super().__init__()
        if not len(points) or std < 0:
            raise DistillationConfigError(f"give at least one point and std >= 0; got {len(points)} and std = {std}")
        weighed = torch.ones(len(points)) if weights is None else weights
        if weighed.shape != (len(points),) or bool((weighed < 0).any()) or not bool(weighed.sum() > 0):
            raise DistillationConfigError(
                f"weights must be {len(points)} numbers >= 0, one per point, not all 0; got {weighed.tolist()}"
            )
        self.schedule, self.std = schedule, float(std)
        self.register_buffer("points", points.to(torch.float64))
        self.register_buffer("log_weights", weighed.to(device=points.device, dtype=torch.float64).log())

    def forward(self, x_t: Tensor, t: Tensor, condition: Any = None) -> Prediction:  # noqa: ANN401 - not looked at
        """Return the posterior mean, given as a velocity: exact at both ends of time."""
        alpha, sigma = (c.to(torch.float64) for c in coefficients(self.schedule, t, x_t))
        x = x_t.to(torch.float64)
        variance = (alpha**2 * self.std**2 + sigma**2).clamp(min=1e-30)
        distances = (x.flatten(1)[:, None] - alpha.view(-1, 1, 1) * self.points.flatten(1)).square().sum(dim=2)
        posterior = (self.log_weights - distances / (2 * variance.view(-1, 1))).softmax(dim=1)
        mean = torch.einsum("bk,k...->b...", posterior, self.points)
        p, q = self.schedule.velocity_coefficients(alpha, sigma)
        moved = (p * alpha * self.std**2 + q * sigma) * (x - alpha * mean) / variance
        return Prediction(x_t, t, self.schedule, v=(p * mean + moved).to(working_dtype(x_t)))


def guided(
    denoiser: nn.Module,
    x_t: Tensor,
    t: Tensor | float,
    condition: Any,  # noqa: ANN401 - any Condition
    negative: Any = None,  # noqa: ANN401 - any Condition
    guidance_scale: float | Tensor = 1.0,
) -> Prediction:
    """Return the classifier-free guided prediction ``u + w (c - u)``; samples of w = 1 need no u and cost one call.

    x0, eps and v are affine in one another at fixed x_t, so guiding the native form guides all three alike.

    Args:
        denoiser: a :class:`Denoiser`.
        x_t: [B, ...].
        t: number, [] or [B].
        condition: what is asked for.
        negative: what the prediction moves away from; needed unless ``guidance_scale`` is 1.
        guidance_scale: w, a number or one per sample [B].

    Raises:
        ConditionError: guidance is asked for and ``negative`` is None.
    """
    conditional: Prediction = denoiser(x_t, t, condition)
    if not isinstance(guidance_scale, Tensor) and guidance_scale == 1:
        return conditional
    if negative is None:
        raise ConditionError(
            f"guidance_scale = {guidance_scale} needs a negative condition; encode an empty prompt, or set it to 1"
        )
    schedule: Any = denoiser.schedule
    if not isinstance(guidance_scale, Tensor) or guidance_scale.ndim == 0:
        unconditional: Prediction = denoiser(x_t, t, negative)
        value = unconditional.value + guidance_scale * (conditional.value - unconditional.value)
        return Prediction(x_t, t, schedule, **{conditional.native: value})
    scale = guidance_scale.to(x_t.device).expand(len(x_t))
    rows = (scale != 1).nonzero()[:, 0]
    if not len(rows):
        return conditional
    times = t[rows] if isinstance(t, Tensor) and t.ndim else t
    unconditional = denoiser(x_t[rows], times, negative.index_select(rows))
    u, c = unconditional.value, conditional.value[rows]
    blended = u + expand(scale[rows], x_t) * (c - u)
    value = conditional.value.to(blended.dtype).index_copy(0, rows, blended)
    return Prediction(x_t, t, schedule, **{conditional.native: value})


def limited_guidance(guidance_scale: float | Tensor, t: Tensor, start: float) -> float | Tensor:
    """Return w where t >= ``start`` and 1 (no guidance) below it: guidance decides content, and harms detail.

    Kynkaanniemi et al. 2024 (arXiv 2404.07724) limit the guidance of a sampler to an interval of noise levels.

    Args:
        guidance_scale: w; one per sample only where ``start`` is 0.
        t: [] or [B].
        start: time in [0, 1]; 0 guides everywhere.

    Returns:
        ``guidance_scale`` itself where ``start`` is 0 or it is 1, else one scale per sample, like ``t``.
    """
    if start == 0 or guidance_scale == 1:
        return guidance_scale
    return torch.where(t >= start, guidance_scale, torch.ones_like(t))
