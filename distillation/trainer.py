"""Teacher -> few-step student: VSD, then consistency distillation (CD), or both at once.

"sequential" runs VSD and then CD, each a stage with its own optimiser, EMA and folder; "joint" minimises
VSD + cd_weight CD in one stage (DOLLAR, arXiv 2412.15689, allows both readings). At the end of a stage the student
takes its EMA's weights. Every random number comes from (seed, stage, step, sample), so a run that was killed continues
to the same weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from distillation.config import DistillationConfig
from distillation.consistency import (
    consistency_function,
    consistency_pair,
    curriculum_pairs,
    pseudo_huber,
    time_grid,
)
from distillation.data import Batch
from distillation.denoiser import limited_guidance
from distillation.latents import ShardedLatents
from distillation.monitors import channel_std, fake_score_lag, saturation
from distillation.roles import SharedBase
from distillation.schedule import Schedule, add_noise
from distillation.stage import Extras, Setup, Stage, TeacherModel, check_begun, prepare
from distillation.student import FewStepStudent
from distillation.terms import Discriminator, TemporalTerms
from distillation.vsd import (
    adamw,
    backward_simulation,
    fake_score_loss,
    normalised,
    score_difference,
    surrogate_loss,
    trainable,
)
from latent_rewards.training.devices import moved
from latent_rewards.training.loop import Logs
from latent_rewards.training.randomness import sample_index

_STD_VALUES = 2**26  # in samples as large as these, enough for the standard deviation of a channel


@dataclass
class DistillationResult:
    """What training returns.

    Attributes:
        student: the trained student, on its EMA's weights.
        history: for each stage one dict per update; the loss of each term before its weight ("vsd_loss", "cd_loss",
            "fake_loss", "temporal_loss", ...), "grad_norm", "learning_rate", and with VSD "num_steps" and "exit_step"
            (the call that was trained), "x_std", the standard deviation of the student's samples, with data
            "saturation" (:func:`~distillation.monitors.saturation`, of the worst channel), and every ``log_every``
            updates "fake_score_lag" (:func:`~distillation.monitors.fake_score_lag`).
    """

    student: FewStepStudent
    history: dict[str, list[dict[str, Any]]]


def start_student(
    teacher: Any,  # noqa: ANN401 - a Teacher
    config: DistillationConfig,
    timesteps: Mapping[int, Sequence[float]] | None = None,
    eta: float = 1.0,
) -> FewStepStudent:
    """Return a student that computes what the teacher does, on a copy of its network or as an adapter on it.

    Args:
        teacher: a :class:`~distillation.families.Teacher`.
        config: ``adapter_rank`` decides; with one, the teacher's denoiser gets adapters (off, except in a role's call)
            and can start no second student. ``seed`` is that of their first weights.
        timesteps: see :class:`~distillation.student.FewStepStudent`.
        eta: likewise.

    Raises:
        DistillationConfigError: see :class:`~distillation.roles.SharedBase`.
    """
    if config.adapter_rank is None:
        denoiser = copy.deepcopy(teacher.denoiser)
    else:
        denoiser = SharedBase(teacher.denoiser, config.adapter_rank, seed=config.seed).student
    parts = {name: getattr(teacher, name, None) for name in ("encode", "latent_shape", "exporter")}
    return FewStepStudent(denoiser, timesteps, eta, **parts)


class DistillationTrainer:
    """Trains a few-step student from a teacher.

    Args:
        teacher: has ``denoiser`` and ``encode``; only called without gradients.
        student: as a rule from :func:`start_student`; trained in place.
        prompts_or_latents: prompts (data-free: CD then learns on the student's own samples), or a pair
            (latents [N, C, F, H, W], prompts). In place of prompts, a condition or None (unconditional).
        config: see :class:`DistillationConfig`.

    Raises:
        StepCountError: a step count the student does not claim.
        MissingPartError: neither the student nor the data tells the shape of latents.
        DistillationConfigError: teacher and student share weights, or differ in their schedules, or the batch cannot be
            shared by the processes of the launch.
        DeviceError: ``config.device`` cannot be used.
        ConditionError: see :class:`~distillation.data.DistillationData`.
    """

    def __init__(
        self,
        teacher: TeacherModel,
        student: FewStepStudent,
        prompts_or_latents: Any,  # noqa: ANN401 - see above
        config: DistillationConfig | None = None,
    ) -> None:
        self.setup = prepare(teacher, student, prompts_or_latents, config or DistillationConfig())

    def train(self) -> DistillationResult:
        """Run the stages, continuing from what ``output_dir`` holds of them."""
        history = {}
        check_begun(self.setup, [*self.setup.config.stages])
        for name, steps in self.setup.config.stages.items():
            objectives = ("vsd", "cd") if name == "joint" else (name,)
            history[name] = DistillationStage(self.setup, name, steps, objectives).run()
        return DistillationResult(self.setup.student, history)


class DistillationStage(Stage):
    """VSD, CD, or the sum of both.

    Args:
        setup: see :class:`~distillation.stage.Setup`.
        name: of the stage.
        num_steps: student updates.
        objectives: which of "vsd" and "cd" are minimised.
    """

    def __init__(self, setup: Setup, name: str, num_steps: int, objectives: Sequence[str]) -> None:
        config = setup.config
        self.with_vsd, self.with_cd = "vsd" in objectives, "cd" in objectives
        self.temporal = TemporalTerms(config, setup.roles.teacher)
        self.discriminator: Discriminator | None = None
        extras = Extras()
        if self.with_vsd:
            self.fake_score = trainable(setup.roles.fake_score())
            modules: dict[str, nn.Module] = {"fake_score": self.fake_score}
            if config.adversarial_weight:
                self.discriminator = Discriminator(
                    self.fake_score,
                    config.adversarial_block,
                    seed=config.seed,
                    r1_weight=config.r1_weight,
                    r1_sigma=config.r1_sigma,
                )
                modules["discriminator"] = self.discriminator.head
            optimizer = adamw(nn.ModuleList(modules.values()), config.fake_learning_rate, beta1=0.0)
            extras = Extras(modules, {"fake_score": optimizer})
        rate, decay = config.optimisation("vsd" if self.with_vsd else "cd")
        beta1 = 0.0 if self.with_vsd else 0.9
        super().__init__(setup, name, num_steps, learning_rate=rate, ema_decay=decay, beta1=beta1, extras=extras)
        self.calls = [(count, exit_step) for count in config.step_counts for exit_step in range(count)]
        self.samples: Tensor | None = None
        times = [time for count in config.step_counts for time in self.student.timesteps(count)]
        self.kept_times = torch.tensor([time for time in times if time > config.cd_max_time], dtype=torch.float64)
        self.reference: nn.Module | None = None
        if config.cd_keep_weight and len(self.kept_times) and not self.with_vsd:
            self.reference = setup.roles.reference().to(self.loop.device)
        latents = self.data.latents if self.with_vsd else None
        data_std = torch.zeros(0) if latents is None else _std_of_some(latents)
        self.data_std, self.varying = data_std[data_std > 0], (data_std > 0).nonzero()[:, 0].to(self.loop.device)

    def loss(self, step: int, batch: Batch, logs: Logs) -> Tensor:
        """Return the sum of the stage's terms."""
        losses: list[Tensor] = []
        if self.with_vsd:
            samples, (num_steps, exit_step) = self.draw_samples(step, "student", batch)
            losses.append(self.vsd_terms(step, samples, batch, exit_step, logs))
            logs |= {"num_steps": num_steps, "exit_step": exit_step, **self.spread(samples.detach())}
            self.samples = samples.detach()
        if self.with_cd:
            weight = self.config.cd_weight if self.with_vsd else 1.0
            losses.append(weight * self.cd_terms(step, self.cd_data(step, batch), batch, logs))
        return torch.stack(losses).sum()

    def spread(self, samples: Tensor) -> Logs:
        """Return how far the student's samples spread, also against the data's channels where there is data."""
        logs: Logs = {"x_std": samples.std()}
        if len(self.data_std):
            logs["saturation"] = saturation(samples[:, self.varying], self.data_std).max()
        return logs

    def after_update(self, step: int, batch: Batch, logs: Logs) -> None:
        """Train the fake score: first on the samples the student was just updated with, then on fresh ones."""
        samples, self.samples = self.samples, None
        if samples is None:
            return
        # The student's loss went through the fake score's features, and left a gradient there that is not its own.
        self.loop.optimizers["fake_score"].zero_grad(set_to_none=True)
        for update in range(self.config.fake_updates):
            role = f"fake{update}"
            with self.loop.accelerator.autocast():
                if update:
                    batch = self.draw_batch(step, role)
                    with torch.no_grad():
                        samples, _ = self.draw_samples(step, role, batch)
                t, noise = self.draw_times(step, role), self.draw_noise(step, role)
                if not update and step % self.config.log_every == 0:
                    lag = fake_score_lag(samples, self.fake_score, batch.condition, t, noise)
                    logs["fake_score_lag"] = lag
                loss = fake_score_loss(samples, self.fake_score, batch.condition, t, noise)
                logs["fake_loss"] = loss.detach()
                if self.discriminator is not None:
                    loss = loss + self.discriminator_terms(step, role, samples, batch, logs)
            logs["fake_grad_norm"] = self.loop.update("fake_score", loss)

    def discriminator_terms(self, step: int, role: str, samples: Tensor, batch: Batch, logs: Logs) -> Tensor:
        """Return the weighted loss of telling noised data from noised samples."""
        assert self.discriminator is not None and batch.latents is not None  # noqa: S101 - for the type checker
        t = self.draw_times(step, f"{role}/discriminator")
        kinds = ("real", "fake", "r1") if self.config.r1_weight else ("real", "fake")
        noise = [self.draw_noise(step, f"{role}/discriminator/{kind}") for kind in kinds]
        loss = self.discriminator.loss(batch.latents.to(self.dtype), samples, batch.condition, t, *noise)
        logs["discriminator_loss"] = loss.detach()
        return self.config.discriminator_weight * loss

    def vsd_terms(self, step: int, x: Tensor, batch: Batch, exit_step: int, logs: Logs) -> Tensor:
        """Return the VSD loss of samples that left the chain at ``exit_step``, and the terms that go with it."""
        t, noise = self.draw_times(step, "vsd"), self.draw_noise(step, "vsd")
        config = self.config
        scale = limited_guidance(config.guidance(exit_step), t, config.guidance_start)
        difference, distance = score_difference(
            x, self.teacher, self.fake_score, batch.condition, t, noise, scale, batch.negative
        )
        gradient = normalised(difference, distance)
        loss = surrogate_loss(x, gradient)
        logs["vsd_loss"] = loss.detach()
        # The normaliser makes g a direction; terms that are not linear want what x would be, without it.
        loss = loss + self.temporal.of_vsd(x, gradient, difference, batch.condition, logs)
        if self.discriminator is not None:
            t = self.draw_times(step, "adversarial")
            adversarial = self.discriminator.students_loss(x, batch.condition, t, self.draw_noise(step, "adversarial"))
            logs["adversarial_loss"] = adversarial.detach()
            loss = loss + config.adversarial_weight * adversarial
        return loss

    def cd_terms(self, step: int, x0: Tensor, batch: Batch, logs: Logs) -> Tensor:
        """Return the CD loss at a random interval of time."""
        config = self.config
        t, s = (moved(time, x0.device, self.dtype) for time in self.interval(step))
        prediction, aim = consistency_pair(
            self.student.denoiser,
            self.ema.module,
            self.teacher,
            x0,
            batch.condition,
            self.draw_noise(step, "cd"),
            t,
            s,
            guidance_scale=config.cd_guidance,
            guidance_start=config.guidance_start,
            negative=batch.negative,
            solver_steps=config.solver_steps,
        )
        loss = self.cd_loss(step, prediction, aim, batch, logs)
        return loss if self.reference is None else loss + config.cd_keep_weight * self.kept(step, x0, batch, logs)

    def kept(self, step: int, x0: Tensor, batch: Batch, logs: Logs) -> Tensor:
        """Return how far the student is from what it was, at its calls above CD's times, of which all are as likely."""
        chosen = (self.draw_uniform(step, "keep/time") * len(self.kept_times)).long()
        t = moved(self.kept_times[chosen], x0.device, self.dtype)
        x_t = add_noise(cast(Schedule, self.teacher.schedule), x0, self.draw_noise(step, "keep"), t)
        with torch.no_grad():
            aim = consistency_function(cast(nn.Module, self.reference), x_t, t, batch.condition)
        now = consistency_function(self.student.denoiser, x_t, t, batch.condition)
        loss = pseudo_huber(now, aim, self.config.huber_c)
        logs["keep_loss"] = loss.detach()
        return loss

    def interval(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the ends (t, s) of CD's intervals, [B] on the CPU."""
        uniform = self.draw_uniform(step, "interval")
        if self.config.curriculum:
            t, s = curriculum_pairs(uniform, step / self.num_steps)
            return self.config.cd_max_time * t, self.config.cd_max_time * s
        grid, below = time_grid(self.config.num_timesteps), (uniform * self.config.num_cd_intervals).long()
        return grid[below + 1], grid[below]

    def cd_loss(self, step: int, prediction: Tensor, aim: Tensor, batch: Batch, logs: Logs) -> Tensor:
        """Return the distance of the prediction from its aim, and of their motion."""
        loss = pseudo_huber(prediction, aim, self.config.huber_c)
        logs["cd_loss"] = loss.detach()
        return loss + self.temporal.of_cd(prediction, aim, batch.condition, logs)

    def cd_data(self, step: int, batch: Batch) -> Tensor:
        """Return what CD noises: the data, else VSD's samples of this update, else samples at the most steps."""
        if batch.latents is not None and not self.config.cd_on_samples:
            return batch.latents.to(self.dtype)
        if self.samples is not None:
            return self.samples
        num_steps = max(self.config.step_counts)
        with torch.no_grad():
            return self.student.sample(batch.condition, self.draw_stack(step, "data", num_steps), num_steps)

    def draw_samples(self, step: int, role: str, batch: Batch) -> tuple[Tensor, tuple[int, int]]:
        """Return the student's x0 after one of the calls it can make, and that call; the same on every rank.

        A call is a step count and the step of its chain that is left.

        All calls of all step counts are equally likely. A step count drawn first, and then its exit, would give the
        last call of four steps a seventh of the updates that the call at pure noise has; so it has a third.
        """
        call = sample_index(self.config.seed, f"{self.name}/{role}/call", step, len(self.calls))
        num_steps, exit_step = self.calls[call]
        stack = self.draw_stack(step, role, num_steps)
        return backward_simulation(self.student, batch.condition, stack, num_steps, exit_step), (num_steps, exit_step)


def _std_of_some(latents: Tensor | ShardedLatents) -> Tensor:
    """Return the standard deviation of each channel over the first samples; all would not fit into memory twice."""
    return channel_std(latents[: max(1, _STD_VALUES // math.prod(latents.shape[1:]))])
