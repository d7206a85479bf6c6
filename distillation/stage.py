"""One stage of a training: a student, its optimiser and its average, and draws that depend on nothing but their names.

What a stage minimises is its subclass's :meth:`Stage.loss`. Every random number comes from (seed, stage, role, step,
sample), so that neither the number of processes nor a kill changes one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distillation.config import DistillationConfig, SettingsGuard
from distillation.data import Batch, DistillationData
from distillation.errors import DistillationConfigError
from distillation.roles import Roles, roles_of, save_activations
from distillation.student import FewStepStudent
from distillation.temporal import neighbouring_frames
from distillation.vsd import adamw, sample_times, trainable
from latent_rewards.training.devices import join_launch, moved
from latent_rewards.training.loop import (
    Ema,
    Logs,
    LoopConfig,
    TrainingLoop,
    read_logs,
    set_learning_rate,
    warmup_cosine,
)
from latent_rewards.training.parts import stored_part
from latent_rewards.training.randomness import sample_noise, sample_uniform
from latent_rewards.training.weights import weights_digest


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


@dataclass(frozen=True)
class Setup:
    """What all stages of a training share.

    Attributes:
        config: the settings.
        student: trained in place.
        roles: the networks that play teacher, student, fake score and target.
        data: prompts, and latents if there are any.
        latent_shape: (C, F, H, W) of one sample.
    """

    config: DistillationConfig
    student: FewStepStudent
    roles: Roles
    data: DistillationData
    latent_shape: tuple[int, ...]


def prepare(
    teacher: TeacherModel,
    student: FewStepStudent,
    prompts_or_latents: Any,  # noqa: ANN401 - see DistillationTrainer
    config: DistillationConfig,
) -> Setup:
    """Check teacher, student, data and settings against one another, before any work, and return them together.

    Arguments and errors are those of :class:`~distillation.trainer.DistillationTrainer`.
    """
    ranks, _ = join_launch(config.device)
    if config.batch_size % ranks.count:
        raise DistillationConfigError(
            f"batch_size={config.batch_size} cannot be shared by {ranks.count} ranks; use a multiple"
        )
    for count in config.step_counts:
        student.timesteps(count)
    denoiser = teacher.denoiser.eval()
    roles = roles_of(denoiser, student.denoiser, config.adapter_rank)
    _check_schedules(denoiser, student.denoiser)
    data = DistillationData(prompts_or_latents, getattr(teacher, "encode", None), guided=config.guides)
    if data.latents is None and config.adversarial_weight:
        raise DistillationConfigError(
            f"adversarial_weight = {config.adversarial_weight} needs data to tell samples from; pass (latents, "
            "prompts), or set it to 0"
        )
    if data.latents is None:
        first = data.batch(torch.zeros(1, dtype=torch.long), "cpu")
        shape = tuple(student.latent_shape(first.condition))
    else:
        shape = tuple(data.latents.shape[1:])
    if config.temporal_weight or config.feature_weight or config.correspondence_weight:
        neighbouring_frames(torch.empty((1, *shape), device="meta"), mask_first=config.causal_first_frame)
    return Setup(config, student, roles, data, shape)


def facts(setup: Setup) -> dict[str, Any]:
    """Return what decides the weights beside the settings: teacher, the student's chains, and what is trained on."""
    student, data = setup.student, setup.data
    found: dict[str, Any] = {
        "timesteps": {str(count): [float(t) for t in grid] for count, grid in student.grids.items()},
        "eta": float(student.eta),
        "teacher": weights_digest(setup.roles.teacher, without="lora_"),
        "number of prompts": len(data),
        "number of latents": 0 if data.latents is None else len(data.latents),
    }
    if data.prompts is not None and all(isinstance(prompt, str) for prompt in data.prompts):
        found["prompts"] = "sha256 " + hashlib.sha256("\0".join(data.prompts).encode()).hexdigest()[:16]
    return found


def check_begun(setup: Setup, stages: Sequence[str]) -> None:
    """Check that every stage of which ``output_dir`` has a checkpoint may go on, before the first of them does.

    Raises:
        DistillationConfigError: one was trained under other settings.
    """
    if setup.config.output_dir is None:
        return
    stored = {name: stored_part(Path(setup.config.output_dir) / name, "stateful.settings") for name in stages}
    found = facts(setup) if any(stored.values()) else {}  # it reads all of the teacher
    for name, state in stored.items():
        if state is not None:
            SettingsGuard(setup.config, name, found).load_state_dict(state)


@dataclass(frozen=True)
class Extras:
    """What a stage trains beside its student, by name.

    Attributes:
        modules: networks.
        optimizers: over their parameters.
    """

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    optimizers: Mapping[str, Optimizer] = field(default_factory=dict)


class Stage:
    """Trains the student of a setup for some updates; a subclass says on what.

    Args:
        setup: see :class:`Setup`.
        name: of the stage: its folder, and part of the names of its draws.
        num_steps: student updates.
        learning_rate: of the student.
        ema_decay: of its average.
        beta1: of the student's AdamW.
        extras: see :class:`Extras`.

    Raises:
        DistillationConfigError: nothing of the student asks for gradients.
    """

    def __init__(
        self,
        setup: Setup,
        name: str,
        num_steps: int,
        *,
        learning_rate: float,
        ema_decay: float,
        beta1: float,
        extras: Extras | None = None,
    ) -> None:
        self.name, self.num_steps, self.learning_rate = name, num_steps, learning_rate
        self.config, self.data, self.latent_shape = setup.config, setup.data, setup.latent_shape
        self.student, self.teacher = setup.student, setup.roles.teacher
        network, extras = trainable(self.student.denoiser), extras or Extras()
        if self.config.gradient_checkpointing:
            denoisers = {name: module for name, module in extras.modules.items() if name == "fake_score"}
            save_activations(setup.roles, {"student": network, **denoisers})
        self.loop = TrainingLoop(
            self._loop_config(),
            name=name,
            modules={"student": network, **extras.modules},
            optimizers={"student": adamw(network, learning_rate, beta1=beta1), **extras.optimizers},
        )
        self.teacher.to(self.loop.device)
        self.ema = Ema(network, ema_decay, average=setup.roles.target())
        self.loop.stateful["ema"] = self.ema
        self.loop.loaded_first["settings"] = SettingsGuard(self.config, name, facts(setup))
        wide = any(parameter.dtype == torch.float64 for parameter in network.parameters())
        self.dtype = torch.float64 if wide else torch.float32
        self.indices = self.loop.ranks.part(self.config.batch_size)

    def _loop_config(self) -> LoopConfig:
        config = self.config
        return LoopConfig(
            num_steps=self.num_steps,
            seed=config.seed,
            output_dir=str(Path(config.output_dir) / self.name) if config.output_dir else None,
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
            log_with=config.log_with,
            max_grad_norm=config.max_grad_norm,
            mixed_precision=config.mixed_precision,
            device=config.device,
            progress=config.progress,
        )

    def run(self) -> list[dict[str, Any]]:
        """Train, then give the student its EMA's weights."""
        history = self.loop.run(self.step)
        self.student.denoiser.load_state_dict(self.ema.module.state_dict())
        self.student.eval()
        return history

    def step(self, step: int) -> dict[str, float]:
        """Update the student once, and what else the stage trains."""
        rate = self.learning_rate * warmup_cosine(step, self.num_steps, floor=self.config.learning_rate_floor)
        set_learning_rate(self.loop.optimizers["student"], rate)
        logs: Logs = {"learning_rate": rate}
        batch = self.draw_batch(step, "student")
        with self.loop.accelerator.autocast():
            loss = self.loss(step, batch, logs)
        logs["grad_norm"] = self.loop.update("student", loss)
        self.after_update(step, batch, logs)
        self.ema.update()
        return read_logs(logs)

    def loss(self, step: int, batch: Batch, logs: Logs) -> Tensor:
        """Return what the student minimises at ``step``, a scalar, and note its parts in ``logs``."""
        raise NotImplementedError

    def after_update(self, step: int, batch: Batch, logs: Logs) -> None:
        """Train what else there is; by default nothing."""

    def draw_batch(self, step: int, role: str) -> Batch:
        """Return rows of the data, drawn with replacement."""
        uniform = self.draw_uniform(step, f"{role}/row")
        return self.data.batch((uniform * len(self.data)).long(), self.loop.device)

    def draw_uniform(self, step: int, role: str) -> Tensor:
        """Return numbers in [0, 1), [B] on the CPU."""
        return sample_uniform(self.config.seed, f"{self.name}/{role}", step, self.indices)

    def draw_times(self, step: int, role: str) -> Tensor:
        """Return VSD times [B]."""
        times = sample_times(self.draw_uniform(step, f"{role}/time"), shift=self.config.time_shift)
        return moved(times, self.loop.device, self.dtype)

    def draw_noise(self, step: int, role: str) -> Tensor:
        """Return standard normal noise [B, C, F, H, W]."""
        stage = f"{self.name}/{role}/noise"
        options: dict[str, Any] = {"device": self.loop.device, "dtype": self.dtype}
        return sample_noise(self.config.seed, stage, step, self.indices, self.latent_shape, **options)

    def draw_stack(self, step: int, role: str, num_steps: int) -> Tensor:
        """Return a noise stack [num_steps, B, C, F, H, W]."""
        return torch.stack([self.draw_noise(step, f"{role}/{k}") for k in range(num_steps)])


def _check_schedules(teacher: nn.Module, student: nn.Module) -> None:
    """Check that the student speaks the teacher's noise levels."""
    times = torch.linspace(0, 1, 9, dtype=torch.float64)
    mine, theirs = (torch.stack(module.schedule(times)) for module in (teacher, student))  # type: ignore[operator]
    if not torch.allclose(mine, theirs, atol=1e-6):
        raise DistillationConfigError(
            f"teacher and student have different schedules: {teacher.schedule} and {student.schedule}; "
            "give the student the teacher's"
        )
