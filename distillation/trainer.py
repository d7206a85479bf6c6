"""Teacher -> few-step student: VSD, then consistency distillation (CD), or both at once.

"sequential" runs VSD and then CD, each a stage with its own optimiser, EMA and folder; "joint" minimises
VSD + cd_weight CD in one stage (DOLLAR, arXiv 2412.15689, allows both readings). At the end of a stage the student
takes its EMA's weights. Every random number comes from (seed, stage, step, sample), so a run that was killed continues
to the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distillation.config import DistillationConfig, SettingsGuard
from distillation.consistency import consistency_pair, pseudo_huber, time_grid
from distillation.data import Batch, DistillationData
from distillation.denoiser import limited_guidance
from distillation.errors import DistillationConfigError
from distillation.student import FewStepStudent
from distillation.temporal import temporal_consistency_loss, temporal_vsd_loss
from distillation.vsd import (
    adamw,
    backward_simulation,
    fake_score_loss,
    sample_times,
    surrogate_loss,
    trainable,
    vsd_gradient,
)
from latent_rewards.training.loop import Ema, LoopConfig, TrainingLoop, set_learning_rate, warmup_cosine
from latent_rewards.training.randomness import sample_index, sample_noise, sample_uniform


class TeacherModel(Protocol):
    """What the trainer needs of a teacher: a denoiser, and how prompts become conditions."""

    @property
    def denoiser(self) -> nn.Module:
        """A :class:`~distillation.denoiser.Denoiser`."""
        ...

    @property
    def encode(self) -> Callable[[Sequence[Any]], Any]:
        """Prompts (texts or mappings) -> condition."""
        ...


@dataclass
class DistillationResult:
    """What training returns.

    Attributes:
        student: the trained student, on its EMA's weights.
        history: for each stage one dict per update; "vsd_loss", "cd_loss", "fake_loss", "temporal_loss", "grad_norm",
            "num_steps" and "exit_step" (the call that was trained), "learning_rate", and "x_std", the standard
            deviation of the student's samples, which grows where VSD over-saturates.
    """

    student: FewStepStudent
    history: dict[str, list[dict[str, Any]]]


class DistillationTrainer:
    """Trains a few-step student from a teacher.

    Args:
        teacher: has ``denoiser`` and ``encode``; only called without gradients.
        student: starts, as a rule, from a deep copy of the teacher's denoiser; trained in place.
        prompts_or_latents: prompts (data-free: CD then learns on the student's own samples), or a pair
            (latents [N, C, F, H, W], prompts). In place of prompts, a condition or None (unconditional).
        config: see :class:`DistillationConfig`.

    Raises:
        StepCountError: a step count the student does not claim.
        MissingPartError: neither the student nor the data tells the shape of latents.
        DistillationConfigError: teacher and student share weights, or differ in their schedules.
        ConditionError: see :class:`~distillation.data.DistillationData`.
    """

    def __init__(
        self,
        teacher: TeacherModel,
        student: FewStepStudent,
        prompts_or_latents: Any,  # noqa: ANN401 - see above
        config: DistillationConfig | None = None,
    ) -> None:
        self.config = config or DistillationConfig()
        self.teacher, self.student = teacher.denoiser.eval(), student
        for count in self.config.step_counts:
            student.timesteps(count)
        _check_pair(self.teacher, student.denoiser)
        encode = getattr(teacher, "encode", None)
        self.data = DistillationData(prompts_or_latents, encode, guided=self.config.guides)
        if self.data.latents is None:
            first = self.data.batch(torch.zeros(1, dtype=torch.long), "cpu")
            self.latent_shape = tuple(student.latent_shape(first.condition))
        else:
            self.latent_shape = tuple(self.data.latents.shape[1:])

    def train(self) -> DistillationResult:
        """Run the stages, continuing from what ``output_dir`` holds of them."""
        history = {name: _Stage(self, name, steps).run() for name, steps in self.config.stages.items()}
        return DistillationResult(self.student, history)


class _Stage:
    """One stage: its networks, optimisers and losses."""

    def __init__(self, trainer: DistillationTrainer, name: str, num_steps: int) -> None:
        config = trainer.config
        self.name, self.config, self.data = name, config, trainer.data
        self.student, self.teacher, self.latent_shape = trainer.student, trainer.teacher, trainer.latent_shape
        self.with_vsd, self.with_cd = name != "cd", name != "vsd"
        network = trainable(self.student.denoiser)
        modules = {"student": network}
        self.num_steps = num_steps
        self.learning_rate, ema_decay = config.optimisation(name)
        optimizers = {"student": adamw(network, self.learning_rate, beta1=0.0 if self.with_vsd else 0.9)}
        if self.with_vsd:
            self.fake_score = trainable(copy.deepcopy(self.teacher))
            modules["fake_score"] = self.fake_score
            optimizers["fake_score"] = adamw(self.fake_score, config.fake_learning_rate, beta1=0.0)
        loop_config = LoopConfig(
            num_steps=num_steps,
            seed=config.seed,
            output_dir=str(Path(config.output_dir) / name) if config.output_dir else None,
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
            log_with=config.log_with,
            max_grad_norm=config.max_grad_norm,
            mixed_precision=config.mixed_precision,
            device=config.device,
            progress=config.progress,
        )
        self.loop = TrainingLoop(loop_config, name=name, modules=modules, optimizers=dict(optimizers))
        self.teacher.to(self.loop.device)
        self.ema = Ema(network, ema_decay)
        self.loop.stateful.update(ema=self.ema, settings=SettingsGuard(config, name))
        wide = any(parameter.dtype == torch.float64 for parameter in network.parameters())
        self.dtype = torch.float64 if wide else torch.float32
        ranks = self.loop.ranks
        if config.batch_size % ranks.count:
            raise DistillationConfigError(
                f"batch_size={config.batch_size} cannot be shared by {ranks.count} ranks; use a multiple"
            )
        self.indices = ranks.part(config.batch_size)
        self.calls = [(count, exit_step) for count in config.step_counts for exit_step in range(count)]

    def run(self) -> list[dict[str, Any]]:
        """Train, then give the student its EMA's weights."""
        history = self.loop.run(self.step)
        self.student.denoiser.load_state_dict(self.ema.module.state_dict())
        self.student.eval()
        return history

    def step(self, step: int) -> dict[str, float]:
        """Update the student once and the fake score ``fake_updates`` times."""
        rate = self.learning_rate * warmup_cosine(step, self.num_steps, floor=self.config.learning_rate_floor)
        set_learning_rate(self.loop.optimizers["student"], rate)
        logs: dict[str, float] = {"learning_rate": rate}
        batch = self.draw_batch(step, "student")
        samples: Tensor | None = None
        losses: list[Tensor] = []
        with self.loop.accelerator.autocast():
            if self.with_vsd:
                samples, (num_steps, exit_step) = self.draw_samples(step, "student", batch)
                losses.append(self.vsd_terms(step, samples, batch, exit_step, logs))
                logs |= {"num_steps": num_steps, "exit_step": exit_step, "x_std": float(samples.detach().std())}
                samples = samples.detach()
            if self.with_cd:
                weight = self.config.cd_weight if self.with_vsd else 1.0
                losses.append(weight * self.cd_terms(step, self.cd_data(step, batch, samples), batch, logs))
        logs["grad_norm"] = self.loop.update("student", torch.stack(losses).sum())
        if samples is not None:
            self.update_fake_score(step, samples, batch, logs)
        self.ema.update()
        return logs

    def vsd_terms(self, step: int, x: Tensor, batch: Batch, exit_step: int, logs: dict[str, float]) -> Tensor:
        """Return the VSD loss of samples that left the chain at ``exit_step``, and its temporal term."""
        t, noise = self.draw_times(step, "vsd"), self.draw_noise(step, "vsd")
        config = self.config
        scale = limited_guidance(config.guidance(exit_step), t, config.guidance_start)
        gradient = vsd_gradient(x, self.teacher, self.fake_score, batch.condition, t, noise, scale, batch.negative)
        loss = surrogate_loss(x, gradient)
        logs["vsd_loss"] = float(loss.detach())
        if config.temporal_weight:
            temporal = temporal_vsd_loss(x, gradient, mask_first=config.causal_first_frame)
            logs["temporal_loss"] = float(temporal.detach())
            loss = loss + config.temporal_weight * temporal
        return loss

    def cd_terms(self, step: int, x0: Tensor, batch: Batch, logs: dict[str, float]) -> Tensor:
        """Return the CD loss and its temporal term."""
        config, grid = self.config, time_grid(self.config.num_timesteps)
        uniform = sample_uniform(config.seed, f"{self.name}/interval", step, self.indices)
        below = (uniform * config.num_timesteps).long()
        t, s = (grid[k].to(device=x0.device, dtype=self.dtype) for k in (below + 1, below))
        prediction, aim = consistency_pair(
            self.student.denoiser,
            self.ema.module,
            self.teacher,
            x0,
            batch.condition,
            self.draw_noise(step, "cd"),
            t,
            s,
            guidance_scale=limited_guidance(config.guidance(exit_step=1), t, config.guidance_start),
            negative=batch.negative,
            solver_steps=config.solver_steps,
        )
        loss = pseudo_huber(prediction, aim, config.huber_c)
        logs["cd_loss"] = float(loss.detach())
        if config.temporal_weight:
            temporal = temporal_consistency_loss(prediction, aim, mask_first=config.causal_first_frame)
            logs["temporal_loss"] = logs.get("temporal_loss", 0.0) + float(temporal.detach())
            loss = loss + config.temporal_weight * temporal
        return loss

    def cd_data(self, step: int, batch: Batch, samples: Tensor | None) -> Tensor:
        """Return what CD noises: the data, else VSD's samples of this update, else samples at the most steps."""
        if batch.latents is not None:
            return batch.latents.to(self.dtype)
        if samples is not None:
            return samples
        num_steps = max(self.config.step_counts)
        with torch.no_grad():
            return self.student.sample(batch.condition, self.draw_stack(step, "data", num_steps), num_steps)

    def update_fake_score(self, step: int, samples: Tensor, batch: Batch, logs: dict[str, float]) -> None:
        """Train the fake score: first on the samples the student was just updated with, then on fresh ones."""
        for update in range(self.config.fake_updates):
            role = f"fake{update}"
            with self.loop.accelerator.autocast():
                if update:
                    batch = self.draw_batch(step, role)
                    with torch.no_grad():
                        samples, _ = self.draw_samples(step, role, batch)
                t, noise = self.draw_times(step, role), self.draw_noise(step, role)
                loss = fake_score_loss(samples, self.fake_score, batch.condition, t, noise)
            logs["fake_loss"] = float(loss.detach())
            logs["fake_grad_norm"] = self.loop.update("fake_score", loss)

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

    def draw_batch(self, step: int, role: str) -> Batch:
        """Return rows of the data, drawn with replacement."""
        uniform = sample_uniform(self.config.seed, f"{self.name}/{role}/row", step, self.indices)
        return self.data.batch((uniform * len(self.data)).long(), self.loop.device)

    def draw_times(self, step: int, role: str) -> Tensor:
        """Return VSD times [B]."""
        uniform = sample_uniform(self.config.seed, f"{self.name}/{role}/time", step, self.indices)
        times = sample_times(uniform, shift=self.config.time_shift)
        return times.to(device=self.loop.device, dtype=self.dtype)

    def draw_noise(self, step: int, role: str) -> Tensor:
        """Return standard normal noise [B, C, F, H, W]."""
        stage = f"{self.name}/{role}/noise"
        options: dict[str, Any] = {"device": self.loop.device, "dtype": self.dtype}
        return sample_noise(self.config.seed, stage, step, self.indices, self.latent_shape, **options)

    def draw_stack(self, step: int, role: str, num_steps: int) -> Tensor:
        """Return a noise stack [num_steps, B, C, F, H, W]."""
        return torch.stack([self.draw_noise(step, f"{role}/{k}") for k in range(num_steps)])


def _check_pair(teacher: nn.Module, student: nn.Module) -> None:
    """Check that the student owns its weights and speaks the teacher's noise levels."""
    owned = {id(parameter) for parameter in teacher.parameters()}
    if any(id(parameter) in owned for parameter in student.parameters()):
        raise DistillationConfigError(
            "teacher and student share weights; start the student from copy.deepcopy(denoiser)"
        )
    times = torch.linspace(0, 1, 9, dtype=torch.float64)
    mine, theirs = (torch.stack(module.schedule(times)) for module in (teacher, student))  # type: ignore[operator]
    if not torch.allclose(mine, theirs, atol=1e-6):
        raise DistillationConfigError(
            f"teacher and student have different schedules: {teacher.schedule} and {student.schedule}; "
            "give the student the teacher's"
        )
