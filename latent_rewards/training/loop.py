"""One training loop on accelerate: progress, trackers, checkpoints, resume, and no step on a non-finite gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from latent_rewards.training.acceleration import make_accelerator
from latent_rewards.training.checkpoint import CheckpointError, load_latest, save_checkpoint, tidy_checkpoints
from latent_rewards.training.devices import join_launch
from latent_rewards.training.folder_lock import exclusive
from latent_rewards.training.history import mean_logs, write_history
from latent_rewards.training.parts import HasStateDict, load_parts, pack_parts
from latent_rewards.training.randomness import own_randomness

Logs = dict[str, float | Tensor]
"""What an update tells of itself: numbers, and scalar tensors that a GPU may not have computed yet."""


class StopTraining(Exception):
    """Raised by a step to end its stage early, in every process of a launch and before the step changes anything."""


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite; raised before the optimiser step, so parameters are untouched."""


@dataclass
class LoopConfig:
    """Settings of :class:`TrainingLoop`.

    Attributes:
        num_steps: number of updates, at least 1.
        seed: root of all randomness of the stage.
        output_dir: folder for checkpoints and ``history.jsonl``; None keeps nothing on disk.
        checkpoint_every: updates between checkpoints (the last update is always saved).
        log_every: updates between entries sent to the trackers.
        log_with: an accelerate tracker name ("tensorboard", "wandb", "trackio"), or None.
        max_grad_norm: gradient norm above which gradients are scaled down; 0 does not clip.
        mixed_precision: "no" or "bf16".
        device: "cpu", "cuda", or one of several such as "cuda:1"; None takes an accelerator if there is one.
        progress: draw a progress bar.
    """

    num_steps: int
    seed: int = 0
    output_dir: str | None = None
    checkpoint_every: int = 100
    log_every: int = 10
    log_with: str | None = None
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    device: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("num_steps", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision must be 'no' or 'bf16'; got {self.mixed_precision!r}")
        if self.max_grad_norm < 0:
            raise ValueError(f"max_grad_norm must not be negative; got {self.max_grad_norm}")


def warmup_cosine(step: int, num_steps: int, *, warmup: int = 0, floor: float = 0.0) -> float:
    """Return a learning-rate factor: linear over ``warmup`` steps, then half a cosine from 1 down to ``floor``.

    A function of the step alone, so that a resumed run needs no scheduler state.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


class Ema:
    """An exponential moving average of a module's parameters, held as a frozen copy.

    Args:
        module: the module that is followed.
        decay: weight of the past, in [0, 1).
        average: a frozen module with the same parameters and buffers that becomes the average; None makes a copy.
    """

    def __init__(self, module: nn.Module, decay: float, average: nn.Module | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1); got {decay}")
        self.source = module
        self.decay = decay
        self.module = copy.deepcopy(module).requires_grad_(False).eval() if average is None else average

    @torch.no_grad()
    def update(self) -> None:
        """Move every parameter by ``1 - decay`` towards the source; copy the buffers."""
        for mine, theirs in zip(self.module.parameters(), self.source.parameters(), strict=True):
            mine.lerp_(theirs.detach().to(mine.dtype), 1 - self.decay)
        for own, followed in zip(self.module.buffers(), self.source.buffers(), strict=True):
            own.copy_(followed)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged parameters."""
        return self.module.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the averaged parameters."""
        self.module.load_state_dict(state)


@dataclass
class TrainingLoop:
    """Runs a step function; owns the optimiser steps, the progress bar, the trackers and the checkpoints.

    Args:
        config: see :class:`LoopConfig`.
        name: stage name, shown in the progress bar and used as the tracker's project.
        modules: what is trained, by name.
        optimizers: by name; :meth:`update` takes that name.
        stateful: anything else a checkpoint must carry (EMA, anchors, guards).
        loaded_first: the same, of parts that may refuse to go on from a checkpoint (one of other settings): they are
            asked before anything else is loaded, so that a refusal leaves what is trained as it was.

    Raises:
        DeviceError: the device cannot be used.
        TrackerError: the package of ``log_with`` is not installed.
    """

    config: LoopConfig
    name: str
    modules: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    stateful: dict[str, HasStateDict] = field(default_factory=dict)
    loaded_first: dict[str, HasStateDict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Prepare modules and optimisers for the device and the number of ranks."""
        self.ranks, self.device = join_launch(self.config.device)
        self.accelerator = make_accelerator(
            self.device,
            alone=self.ranks.count == 1,
            mixed_precision=self.config.mixed_precision,
            log_with=self.config.log_with,
            project_dir=self.config.output_dir,
        )
        for module in self.modules.values():
            module.to(self.device)
        self.step = 0
        self.history: list[dict[str, Any]] = []

    def update(self, optimizer_name: str, loss: Tensor) -> float:
        """Backpropagate ``loss`` and step one optimiser.

        Gradients are averaged over ranks. Returns the gradient norm before clipping.

        Raises:
            NonFiniteError: the loss or a gradient is not finite; nothing was changed.
        """
        optimizer = self.optimizers[optimizer_name]
        loss.backward()  # accelerate's would divide by a number from the environment
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.ranks.average_gradients(parameters, at=f"an update of {optimizer_name} in step {self.step} of {self.name}")
        norm = float(nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm or math.inf))
        # Both are read here, where the norm must be: a GPU that is asked for a number has nothing more to do.
        for name, value in (("loss", float(loss.detach())), ("gradient norm", norm)):
            if not math.isfinite(value):
                optimizer.zero_grad(set_to_none=True)
                raise NonFiniteError(
                    f"{self.name}: {name} {value} at step {self.step} ({optimizer_name}); parameters kept"
                )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def run(self, step_fn: Callable[[int], Mapping[str, float]]) -> list[dict[str, Any]]:
        """Call ``step_fn(step)`` for each remaining step and return the whole history, one dict per step.

        What draws from torch's global generators in a step draws what ``seed``, stage, step and process say.
        ``step_fn`` may raise :class:`StopTraining` to end early; what was logged until then is kept and checkpointed.
        What is logged is the mean over the processes.

        Raises:
            CheckpointError: see :meth:`resume`; or the processes found different checkpoints.
            FolderLockedError: another run is training in ``output_dir``.
            OutOfStepError: some processes stop, others do not.
        """
        folder = self.config.output_dir
        with exclusive(folder, self.ranks, "training in") if folder else nullcontext():
            self._begin()
            if self.config.log_with:
                self.accelerator.init_trackers(self.name)
            with self._bar() as bar:
                while self.step < self.config.num_steps:
                    logs = self._logs_of(step_fn)
                    if logs is None:
                        self.save()
                        break
                    self.history.append({"step": self.step, **logs})
                    self.step += 1
                    bar.update()
                    self._report(bar, logs)
                    if self.step % self.config.checkpoint_every == 0 or self.step == self.config.num_steps:
                        self.save()
        # Not accelerate's end_training(), which ends the launch's process group too: the next stage needs it.
        for tracker in self.accelerator.trackers if self.config.log_with else ():
            tracker.finish()
        return self.history

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.config.num_steps,
            initial=self.step,
            desc=self.name,
            disable=not (self.config.progress and self.accelerator.is_main_process),
            dynamic_ncols=True,
        )

    def _begin(self) -> None:
        """Let all processes begin at the same step, with the same weights and no gradients."""
        if self.config.output_dir:
            self.ranks.once(partial(tidy_checkpoints, self.config.output_dir))
        self.resume()
        steps = self.ranks.gather(self.step, at=f"the beginning of {self.name}")
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"{self.name}: the processes of this launch would go on from steps {steps}; output_dir "
                f"{self.config.output_dir} must be one folder that all of them see"
            )
        averages = [part.module for part in self.stateful.values() if isinstance(part, Ema)]
        for module in (*self.modules.values(), *averages):
            self.ranks.broadcast((*module.parameters(), *module.buffers()))
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)  # what came before is no part of the first update

    def _logs_of(self, step_fn: Callable[[int], Mapping[str, float]]) -> dict[str, Any] | None:
        """Return what the next step tells, or None if all processes stop before it."""
        try:
            with self.randomness():
                logs = dict(step_fn(self.step))
        except StopTraining:
            self.ranks.gather(None, at=f"the end of {self.name} before step {self.step}")
            return None
        except StopIteration as error:
            raise RuntimeError(
                f"{self.name}: step {self.step} let a StopIteration out; to end a stage early raise StopTraining"
            ) from error
        return mean_logs(self.ranks.gather(logs, at=f"the end of step {self.step} of {self.name}"))

    def randomness(self) -> AbstractContextManager[None]:
        """Return the block a step is run in: see :func:`~latent_rewards.training.randomness.own_randomness`."""
        return own_randomness(self.config.seed, self.name, self.step, self.ranks.index, self.device)

    def _report(self, bar: tqdm, logs: Mapping[str, float]) -> None:
        if self.step % self.config.log_every == 0 or self.step == self.config.num_steps:
            shown = {k: f"{v:.4g}" for k, v in list(logs.items())[:4] if isinstance(v, int | float)}
            bar.set_postfix(shown, refresh=False)
            if self.config.log_with:
                self.accelerator.log(dict(logs), step=self.step)

    def _parts(self) -> dict[str, HasStateDict]:
        groups: dict[str, Mapping[str, HasStateDict]] = {
            "module": self.modules,
            "optimizer": self.optimizers,
            "stateful": {**self.stateful, **self.loaded_first},
        }
        return {f"{kind}.{name}": part for kind, group in groups.items() for name, part in group.items()}

    def save(self) -> None:
        """Commit a checkpoint and the history, if there is an output folder."""
        if self.config.output_dir is None or not self.accelerator.is_main_process:
            return
        state = {**pack_parts(self._parts()), "history": self.history}
        save_checkpoint(self.config.output_dir, self.step, state)
        write_history(self.config.output_dir, self.history)

    def resume(self) -> bool:
        """Load the newest checkpoint of ``output_dir``, if any, and write its history; returns whether one was found.

        Raises:
            CheckpointError: it is damaged, of a later step than the last of this run, or holds other parts than this
                loop, or parts of other shapes. Nothing was changed.
        """
        found = load_latest(self.config.output_dir) if self.config.output_dir else None
        if found is None:
            return False
        folder, step, state = found
        if step > self.config.num_steps:
            raise CheckpointError(
                f"{folder} is the state after {step} updates, this run is to make {self.config.num_steps}; use another "
                f"output_dir, or make at least {step}"
            )
        load_parts(self._parts(), state, folder, first=[f"stateful.{name}" for name in self.loaded_first])
        self.step, self.history = step, state["history"]
        if self.config.output_dir and self.accelerator.is_main_process:
            write_history(self.config.output_dir, self.history)  # a kill comes between a checkpoint and its history
        return True


def read_logs(logs: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Return numbers for what an update told, once all of it has been asked for: a GPU is waited for at the first."""
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in logs.items()}
