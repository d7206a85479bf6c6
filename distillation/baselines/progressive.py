"""Progressive distillation: halve the steps again and again (Salimans and Ho 2022, arXiv 2202.00512, algorithm 2).

In a round a student of N steps learns to do with one deterministic step what its predecessor does with two; the first
predecessor is the guided teacher, so guidance is distilled too (Meng et al. 2023, arXiv 2210.03142, for one fixed
scale). Each round's student is good at its own number of steps, so every step count is a student of its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distillation.config import DistillationConfig
from distillation.data import Batch
from distillation.denoiser import Prediction
from distillation.errors import DistillationConfigError
from distillation.sampler import follow_ode
from distillation.schedule import add_noise, coefficients
from distillation.stage import Setup, Stage, TeacherModel, prepare
from distillation.student import FewStepStudent
from latent_rewards.training.devices import moved
from latent_rewards.training.loop import Logs
from latent_rewards.training.settings import check_types


@dataclass
class ProgressiveConfig(DistillationConfig):
    """Settings of :class:`ProgressiveTrainer`; those of VSD and CD that it inherits are not read.

    Attributes:
        first_steps: student steps of the first round, a power of two; its predecessor is the teacher at twice as many.
        round_updates: updates of each round.
        last_updates: updates of the rounds of 1 and 2 steps, which need more; None takes ``round_updates``.

    Raises:
        DistillationConfigError: a value is out of range.
    """

    first_steps: int = 16
    round_updates: int = 200
    last_updates: int | None = None

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_types(self, DistillationConfigError)
        if self.first_steps < 1 or self.first_steps & (self.first_steps - 1):
            raise DistillationConfigError(f"first_steps must be a power of two, e.g. 16; got {self.first_steps}")
        for name in ("round_updates", "last_updates"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise DistillationConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        super().__post_init__()
        rounds = set(self.rounds)
        for count in self.step_counts:
            if count not in rounds:
                raise DistillationConfigError(
                    f"step_counts holds {count}, but the rounds are of {', '.join(map(str, self.rounds))} steps; "
                    "ask for powers of two up to first_steps"
                )

    @property
    def rounds(self) -> list[int]:
        """The student steps of each round, descending to the fewest of ``step_counts``."""
        rounds, count = [], self.first_steps
        while count >= max(1, min(self.step_counts, default=1)):
            rounds.append(count)
            count //= 2
        return rounds

    @property
    def stages(self) -> dict[str, int]:
        """The rounds in their order, and the updates of each."""
        last = self.round_updates if self.last_updates is None else self.last_updates
        return {f"progressive_{count}": last if count <= 2 else self.round_updates for count in self.rounds}


@dataclass
class ProgressiveResult:
    """What training returns.

    Attributes:
        students: for each of ``step_counts`` the student of that round, deterministic (eta = 0), with that grid alone.
        history: for each round one dict per update; "progressive_loss", "grad_norm", "learning_rate".
    """

    students: dict[int, FewStepStudent]
    history: dict[str, list[dict[str, Any]]]


class ProgressiveTrainer:
    """Trains one student per step count by halving.

    Args:
        teacher: has ``denoiser`` and ``encode``.
        student: starts from a copy of the teacher's denoiser; trained in place, at the end that of the last round.
        latents_and_prompts: (latents [N, C, F, H, W], prompts); the paths that are halved start from noised data.
        config: see :class:`ProgressiveConfig`.

    Raises:
        DistillationConfigError: there are no latents, or ``adapter_rank`` is set (the predecessor is a network of its
            own); or see :class:`~distillation.trainer.DistillationTrainer`.
    """

    def __init__(
        self,
        teacher: TeacherModel,
        student: FewStepStudent,
        latents_and_prompts: Any,  # noqa: ANN401 - see above
        config: ProgressiveConfig | None = None,
    ) -> None:
        config = config or ProgressiveConfig()
        if config.adapter_rank is not None:
            raise DistillationConfigError(
                f"adapter_rank = {config.adapter_rank}: a round's predecessor is a network of its own; set it to None"
            )
        self.config, self.setup = config, prepare(teacher, student, latents_and_prompts, config)
        if self.setup.data.latents is None:
            raise DistillationConfigError("progressive distillation needs data; pass (latents, prompts)")

    def train(self) -> ProgressiveResult:
        """Run the rounds, continuing from what ``output_dir`` holds of them."""
        students: dict[int, FewStepStudent] = {}
        history: dict[str, list[dict[str, Any]]] = {}
        predecessor: nn.Module | None = None
        for count, (name, updates) in zip(self.config.rounds, self.config.stages.items(), strict=True):
            if history:
                predecessor = copy.deepcopy(self.setup.student.denoiser).requires_grad_(False).eval()
            history[name] = _Round(self.setup, name, updates, count, predecessor).run()
            if count in self.config.step_counts:
                students[count] = self._student(count)
        return ProgressiveResult(students, history)

    def _student(self, count: int) -> FewStepStudent:
        grid = {count: [1 - step / count for step in range(count)]}
        return copy.deepcopy(self.setup.student).with_grids(grid, eta=0.0)


class _Round(Stage):
    """One halving: ``count`` student steps for twice as many of the predecessor, or of the guided teacher."""

    def __init__(self, setup: Setup, name: str, updates: int, count: int, predecessor: nn.Module | None) -> None:
        config = setup.config
        rate, decay = config.optimisation("vsd")
        super().__init__(setup, name, updates, learning_rate=rate, ema_decay=decay, beta1=0.9)
        self.count, self.predecessor = count, predecessor

    def loss(self, step: int, batch: Batch, logs: Logs) -> Tensor:
        """Return the mean squared error of the network's native output, its target two steps of the predecessor.

        In units of x0 error that is the weight 1 / sigma^2 for v: SNR + 1, one of the paper's, where alpha^2 + sigma^2
        = 1.
        """
        assert batch.latents is not None  # noqa: S101 - for the type checker; the trainer refuses others
        end = (self.draw_uniform(step, "interval") * self.count).long() + 1
        t, middle, s = ((end - part).double() / self.count for part in (0.0, 0.5, 1.0))
        times = [moved(time, self.loop.device, self.dtype) for time in (t, middle, s)]
        x0, noise = batch.latents.to(self.dtype), self.draw_noise(step, "progressive")
        x_t = add_noise(self._schedule, x0, noise, times[0])
        aim_x0, aim_eps = self._aim(x_t, times, batch)
        prediction: Prediction = self.student.denoiser(x_t, times[0], batch.condition)
        loss = torch.mean((prediction.value - prediction.native_target(aim_x0, aim_eps)) ** 2)
        logs["progressive_loss"] = loss.detach()
        return loss

    @property
    def _schedule(self) -> Any:  # noqa: ANN401 - a Schedule
        return self.teacher.schedule

    @torch.no_grad()
    def _aim(self, x_t: Tensor, times: list[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the x0 and eps from which one step leads where two steps of the predecessor lead."""
        if self.predecessor is not None:
            reached = follow_ode(self.predecessor, x_t, times, batch.condition)
        else:
            reached = follow_ode(
                self.teacher,
                x_t,
                times,
                batch.condition,
                guidance_scale=self.config.guidance_scale,
                guidance_start=self.config.guidance_start,
                negative=batch.negative,
            )
        alpha, sigma = coefficients(self._schedule, times[0], x_t)
        alpha_s, sigma_s = coefficients(self._schedule, times[-1], x_t)
        ratio = sigma_s / sigma
        x0 = (reached - ratio * x_t) / (alpha_s - ratio * alpha)
        return x0, (x_t - alpha * x0) / sigma
