"""Variational score distillation (VSD, also distribution matching distillation).

The student's samples x are noised, and two denoisers look at them: the teacher, which knows the data, and the fake
score, which is trained on the student's own samples. The difference of their x0 predictions is, up to the factor
sigma^2 / alpha^2, the gradient of KL(student_t || teacher_t) (Wang et al. 2023, ProlificDreamer; Yin et al. 2024, DMD2,
arXiv 2405.14867). Without the fake score this would be score distillation sampling, which collapses onto the mode.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from distillation.denoiser import Prediction, guided, limited_guidance
from distillation.errors import ConditionError, DistillationConfigError, StepCountError
from distillation.roles import trains_nothing
from distillation.schedule import add_noise, shift_time, working_dtype
from distillation.student import FewStepStudent, check_noise
from latent_rewards.training.loop import NonFiniteError
from latent_rewards.training.precision import widened_to_train
from latent_rewards.training.randomness import sample_index, sample_noise, sample_uniform
from latent_rewards.training.ranks import current_ranks

NORMALISER_FLOOR = 1e-6


def sample_times(u: Tensor, low: float = 0.02, high: float = 0.98, shift: float = 1.0) -> Tensor:
    """Return times in [low, high) from uniform numbers: shifted towards noise, then scaled into the range.

    Args:
        u: [B], uniform in [0, 1).
        low: smallest time; near 0 the score difference is all noise.
        high: largest time.
        shift: see :func:`~distillation.schedule.shift_time`; on top of the schedule's own shift, so 1 where it has one.

    Raises:
        DistillationConfigError: the range is empty or leaves [0, 1].
    """
    if not 0 <= low < high <= 1:
        raise DistillationConfigError(f"times need 0 <= low < high <= 1; got {low} and {high}")
    return low + (high - low) * shift_time(u, shift)


@torch.no_grad()
def score_difference(
    x: Tensor,
    teacher: nn.Module,
    fake_score: nn.Module,
    condition: Any,  # noqa: ANN401 - any Condition
    t: Tensor,
    noise: Tensor,
    guidance_scale: float | Tensor = 1.0,
    negative: Any = None,  # noqa: ANN401 - any Condition
) -> tuple[Tensor, Tensor]:
    """Return ``x0_fake - x0_teacher`` at noised x, and per sample ``mean |x - x0_teacher|`` [B, 1, ...]; no gradient.

    Arguments are those of :func:`vsd_loss`.
    """
    x = x.detach().to(working_dtype(x))
    schedule: Any = teacher.schedule
    x_t = add_noise(schedule, x, noise, t)
    real = guided(teacher, x_t, t, condition, negative, guidance_scale).x0
    fake: Prediction = fake_score(x_t, t, condition)
    return fake.x0 - real, (x - real).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)


def normalised(difference: Tensor, distance: Tensor) -> Tensor:
    """Return the difference of :func:`score_difference` over its distance (DMD, arXiv 2311.18828, eq. 8)."""
    return difference / (distance + NORMALISER_FLOOR)


@torch.no_grad()
def vsd_gradient(
    x: Tensor,
    teacher: nn.Module,
    fake_score: nn.Module,
    condition: Any,  # noqa: ANN401 - any Condition
    t: Tensor,
    noise: Tensor,
    guidance_scale: float | Tensor = 1.0,
    negative: Any = None,  # noqa: ANN401 - any Condition
    *,
    normalize: bool = True,
) -> Tensor:
    """Return g = x0_fake - x0_teacher at noised x, the direction along which x is moved backwards; no gradient.

    Arguments are those of :func:`vsd_loss`.
    """
    difference, distance = score_difference(x, teacher, fake_score, condition, t, noise, guidance_scale, negative)
    return normalised(difference, distance) if normalize else difference


def vsd_target(x: Tensor, gradient: Tensor) -> Tensor:
    """Return ``stopgrad(x - g)``, the target of VSD's regression and of every temporal term beside it.

    Args:
        x: the student's samples [B, C, F, H, W].
        gradient: g of :func:`vsd_gradient`, likewise.
    """
    return x.detach() - gradient.detach()


def surrogate_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """Return ``0.5 mean |x - stopgrad(x - g)|^2``, whose gradient with respect to x is g / x.numel()."""
    x = x.to(working_dtype(x))
    return 0.5 * torch.mean((x - vsd_target(x, gradient)) ** 2)


def vsd_loss(
    x: Tensor,
    teacher: nn.Module,
    fake_score: nn.Module,
    condition: Any,  # noqa: ANN401 - any Condition
    t: Tensor,
    noise: Tensor,
    guidance_scale: float | Tensor = 1.0,
    negative: Any = None,  # noqa: ANN401 - any Condition
    *,
    normalize: bool = True,
) -> Tensor:
    """Return the VSD loss of student samples, a scalar; only x receives a gradient.

    Args:
        x: [B, C, F, H, W], the student's samples with their gradient.
        teacher: the denoiser of the data.
        fake_score: the denoiser of the student's samples.
        condition: of length B, or None.
        t: [] or [B], see :func:`sample_times`.
        noise: standard normal, like ``x``.
        guidance_scale: w of the teacher's ``u + w (c - u)``; the fake score is never guided.
        negative: the condition u; needed unless ``guidance_scale`` is 1.
        normalize: divide g per sample by ``mean |x - x0_teacher|`` (DMD, arXiv 2311.18828).
    """
    gradient = vsd_gradient(x, teacher, fake_score, condition, t, noise, guidance_scale, negative, normalize=normalize)
    return surrogate_loss(x, gradient)


def fake_score_loss(
    x: Tensor,
    fake_score: nn.Module,
    condition: Any,  # noqa: ANN401 - any Condition
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    """Return the denoising loss of the fake score on the student's samples, a scalar; x receives no gradient.

    The mean squared error is taken in the network's native form. In units of x0 error that is the weight 1 for x0,
    1 / sigma^2 for v (flow and variance preserving alike) and alpha^2 / sigma^2 for eps.

    Args:
        x: the student's samples [B, C, F, H, W].
        fake_score: a :class:`~distillation.denoiser.Denoiser`.
        condition: of length B, or None.
        t: [] or [B].
        noise: standard normal, like ``x``.
    """
    x = x.detach().to(working_dtype(x))
    schedule: Any = fake_score.schedule
    prediction: Prediction = fake_score(add_noise(schedule, x, noise, t), t, condition)
    return torch.mean((prediction.value - prediction.native_target(x, noise)) ** 2)


def backward_simulation(
    student: FewStepStudent,
    condition: Any,  # noqa: ANN401 - any Condition
    noise: Tensor,
    num_steps: int,
    exit_step: int,
) -> Tensor:
    """Run the student's own chain to ``exit_step`` and return the x0 predicted there; only that call has a gradient.

    So training sees the latents that sampling will see (backward simulation of DMD2, arXiv 2405.14867).

    Args:
        student: the student.
        condition: of length B, or None.
        noise: stack [num_steps, B, C, F, H, W].
        num_steps: a claimed step count.
        exit_step: 0 to num_steps - 1.

    Raises:
        NoiseError: the stack has another length.
        StepCountError: the count or the step is not one of the student's.
    """
    check_noise(noise, num_steps, condition)
    if not 0 <= exit_step < num_steps:
        raise StepCountError(f"exit_step must lie in 0..{num_steps - 1} of {num_steps} steps; got {exit_step}")
    latents = _run_chain(student, condition, noise, num_steps, exit_step)
    return student.predict(latents, exit_step, num_steps, condition).x0


@torch.no_grad()
def _run_chain(policy: Any, condition: Any, noise: Tensor, num_steps: int, exit_step: int) -> Tensor:  # noqa: ANN401
    latents = noise[0].to(working_dtype(noise))
    for step in range(exit_step):
        mean, std = policy.transition(latents, step, num_steps, condition)
        latents = mean + std * noise[step + 1]
    return latents


class VSDAnchor:
    """VSD as a loss that holds a policy near its teacher while something else optimises it.

    ``loss`` is called before each policy update and ``after_step`` after it; the latter trains the fake score on the
    samples of the former. A policy with ``predict`` (as :class:`~distillation.student.FewStepStudent`) is left at a
    random step; any other one at its last step, whose mean is x0.

    Args:
        teacher: the denoiser of the data; only called without gradients.
        fake_score: the denoiser of the policy's samples, trained here; start it as a copy of the teacher. If none of
            its parameters asks for gradients all of them will, else (adapters) only those that do. Where the policy is
            an adapter on the teacher, ``student.denoiser.roles.fake_score()``.
        guidance_scale: of the teacher.
        refine_guidance_scale: in its place for every call of the chain but the first; None takes ``guidance_scale``.
        guidance_start: see :func:`~distillation.denoiser.limited_guidance`.
        negative: a condition with one row, repeated for the batch; needed unless both scales are 1.
        encode: makes ``negative`` from an empty prompt where none is given.
        learning_rate: of the fake score (AdamW, beta1 = 0).
        fake_updates: fake score updates per policy update, each with its own times and noise.
        seed: root of the times and noise.
        num_steps: step count of the chain; None takes the length of the noise stack.
        time_shift: see :func:`sample_times`.

    Raises:
        ConditionError: guidance without a negative condition.
        DistillationConfigError: ``fake_updates`` is less than 1, or the fake score has nothing to train.
    """

    def __init__(
        self,
        teacher: nn.Module,
        fake_score: nn.Module,
        *,
        guidance_scale: float = 1.0,
        refine_guidance_scale: float | None = None,
        guidance_start: float = 0.0,
        negative: Any = None,  # noqa: ANN401 - any Condition
        encode: Any = None,  # noqa: ANN401 - prompts -> Condition
        learning_rate: float = 1e-5,
        fake_updates: int = 5,
        seed: int = 0,
        num_steps: int | None = None,
        time_shift: float = 1.0,
    ) -> None:
        if fake_updates < 1:
            raise DistillationConfigError(f"fake_updates must be at least 1; got {fake_updates}")
        refined = guidance_scale if refine_guidance_scale is None else refine_guidance_scale
        guides = guidance_scale != 1 or refined != 1
        if negative is None and encode is not None and guides:
            negative = encode([""])
        if negative is None and guides:
            raise ConditionError(f"guidance {guidance_scale} and {refined} needs negative=encode(['']) or encode=")
        self.teacher, self.fake_score = teacher.eval(), trainable(fake_score)
        self.guidance_scale, self.refine_guidance_scale = guidance_scale, refined
        self.guidance_start, self.negative = guidance_start, negative
        self.fake_updates, self.seed = fake_updates, seed
        self.num_steps, self.time_shift = num_steps, time_shift
        self.step = 0
        self.optimizer = adamw(self.fake_score, learning_rate, beta1=0.0)
        self._samples: list[tuple[Tensor, Any]] = []

    def loss(self, policy: Any, condition: Any, noise: Tensor) -> Tensor:  # noqa: ANN401 - structural Policy
        """Return the VSD loss of the policy's samples, a scalar.

        Args:
            policy: an nn.Module with ``transition``.
            condition: of length B, or None.
            noise: stack [num_steps, B, C, F, H, W].
        """
        stage = f"anchor/{len(self._samples)}"
        x, exit_step = self._sample(policy, condition, noise)
        t, fresh = self._draw(stage, x)
        negative = self.negative
        if negative is not None:
            rows = torch.zeros(len(x), dtype=torch.long)
            negative = negative.index_select(rows).to(x.device)
        wanted = self.refine_guidance_scale if exit_step else self.guidance_scale
        scale = limited_guidance(wanted, t, self.guidance_start)
        return vsd_loss(x, self.teacher, self.fake_score, condition, t, fresh, scale, negative)

    @torch.no_grad()
    def observe(self, policy: Any, condition: Any, noise: Tensor) -> None:  # noqa: ANN401 - structural Policy
        """Show the policy's samples to the fake score without a loss, as before the first update.

        Arguments are those of :meth:`loss`; the next :meth:`after_step` trains on them.
        """
        self._sample(policy, condition, noise)

    def _sample(self, policy: Any, condition: Any, noise: Tensor) -> tuple[Tensor, int]:  # noqa: ANN401 - structural
        """Return the policy's x0 with its gradient and the step it left the chain at; keep x0 for the fake score."""
        num_steps = self.num_steps or len(noise)
        check_noise(noise[:num_steps], num_steps, condition)
        self._place(noise.device)
        if hasattr(policy, "predict"):
            exit_step = sample_index(self.seed, "anchor/exit", self.step, num_steps)
            x = backward_simulation(policy, condition, noise[:num_steps], num_steps, exit_step)
        else:
            exit_step = num_steps - 1
            latents = _run_chain(policy, condition, noise, num_steps, exit_step)
            x, _ = policy.transition(latents, exit_step, num_steps, condition)
        self._samples.append((x.detach(), condition))
        return x, exit_step

    def after_step(self) -> None:
        """Train the fake score on the samples seen since the last call.

        Raises:
            NonFiniteError: a gradient is NaN or infinite; the fake score is kept as it was.
        """
        for update in range(self.fake_updates if self._samples else 0):
            x, condition = self._samples[update % len(self._samples)]
            t, noise = self._draw(f"anchor/fake/{update}", x)
            fake_score_loss(x, self.fake_score, condition, t, noise).backward()
            parameters = self.optimizer.param_groups[0]["params"]
            current_ranks().average_gradients(parameters)
            norm = float(nn.utils.clip_grad_norm_(parameters, 1.0))
            if not math.isfinite(norm):
                self.optimizer.zero_grad(set_to_none=True)
                raise NonFiniteError(f"anchor: gradient norm {norm} of the fake score at step {self.step}; it is kept")
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self._samples.clear()
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the fake score, its optimiser and the step: all that continuing needs between two updates."""
        return {
            "fake_score": dict(self.fake_score.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.fake_score.load_state_dict(state["fake_score"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self._samples.clear()

    def _draw(self, stage: str, x: Tensor) -> tuple[Tensor, Tensor]:
        rank = current_ranks().index
        indices = range(rank * len(x), (rank + 1) * len(x))
        times = sample_times(sample_uniform(self.seed, f"{stage}/time", self.step, indices), shift=self.time_shift)
        noise = sample_noise(self.seed, stage, self.step, indices, x.shape[1:], device=x.device, dtype=x.dtype)
        return times.to(device=x.device, dtype=x.dtype), noise

    def _place(self, device: torch.device) -> None:
        for module in (self.teacher, self.fake_score):
            tensor = next(iter([*module.parameters(), *module.buffers()]), None)
            if tensor is not None and tensor.device != device:
                module.to(device)
        # The moments of a checkpoint were read to where the fake score was then; reading them anew takes them along.
        if any(state["exp_avg"].device != parameter.device for parameter, state in self.optimizer.state.items()):
            self.optimizer.load_state_dict(self.optimizer.state_dict())


def trainable(module: nn.Module) -> nn.Module:
    """Return the module in training mode, with what is trained of it held in at least float32.

    If no parameter asks for gradients (a copy of a frozen one), all will.

    Raises:
        DistillationConfigError: all that asks for gradients are adapters that are off.
    """
    if trains_nothing(module):
        raise DistillationConfigError(
            f"{type(module).__name__} has nothing to train: all that asks for gradients in it are adapters that are "
            "off, as in a copy of a teacher that start_student gave adapters; take student.denoiser.roles.fake_score() "
            "as the fake score, or copy the teacher after student.merged() and student.denoiser.roles.remove()"
        )
    if not any(parameter.requires_grad for parameter in module.parameters()):
        module.requires_grad_(True)
    return widened_to_train(module).train()


def adamw(module: nn.Module, learning_rate: float, *, beta1: float) -> torch.optim.AdamW:
    """Return AdamW without weight decay over the parameters that ask for gradients.

    Score differences change with the fake score from step to step, so VSD and its fake score use beta1 = 0, as DMD2.

    Raises:
        DistillationConfigError: there is no such parameter.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise DistillationConfigError(f"{type(module).__name__} has no parameter to train; call requires_grad_(True)")
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(beta1, 0.999), weight_decay=0.0)
