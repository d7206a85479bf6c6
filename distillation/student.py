"""A few-step student: a denoiser that is called on a short grid of times, as a Markov chain of Gaussian transitions.

``x_{k+1} = mean_k + std_k noise_{k+1}`` with the family of :func:`distillation.sampler.transition`; the last step is
deterministic and returns the predicted x0. The object is a policy in the structural sense of reinforcement learning
libraries: ``encode``, ``latent_shape``, ``timesteps`` and ``transition``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distillation.denoiser import Prediction
from distillation.errors import ConditionError, DistillationConfigError, MissingPartError, NoiseError, StepCountError
from distillation.sampler import time_like, transition
from distillation.schedule import check_timesteps, coefficients, working_dtype

LatentShape = tuple[int, int, int, int]

DEFAULT_TIMESTEPS: dict[int, list[float]] = {1: [1.0], 2: [1.0, 0.5], 4: [1.0, 0.75, 0.5, 0.25]}


class FewStepStudent(nn.Module):
    """A denoiser sampled in 1 to 4 steps.

    Args:
        denoiser: a :class:`~distillation.denoiser.Denoiser`; its parameters are the student's.
        timesteps: ``{step count: times}``; times are t in (0, 1], strictly descending, and are handed to the denoiser
            as they are (its schedule turns them into noise levels). The default is 1, 2 and 4 steps, uniform in t.
        eta: share of fresh noise in [0, 1]; 1 is multistep consistency sampling, 0 deterministic Euler / DDIM.
        encode: prompts -> condition; needed by :meth:`encode` only. Shared, not copied, by ``copy.deepcopy``.
        latent_shape: (C, F, H, W), or a function of the condition that returns it.
        exporter: what :meth:`save_pretrained` needs to know of the pipeline the student belongs to.

    Raises:
        TimestepsError: a grid cannot be sampled.
        DistillationConfigError: eta is outside [0, 1].
    """

    def __init__(
        self,
        denoiser: nn.Module,
        timesteps: Mapping[int, Sequence[float]] | None = None,
        eta: float = 1.0,
        *,
        encode: Callable[[Sequence[Any]], Any] | None = None,
        latent_shape: LatentShape | Callable[[Any], LatentShape] | None = None,
        exporter: Any = None,  # noqa: ANN401 - belongs to the family
    ) -> None:
        super().__init__()
        if not 0 <= eta <= 1:
            raise DistillationConfigError(f"eta must lie in [0, 1] (1: fresh noise, 0: deterministic); got {eta}")
        self.denoiser = denoiser
        self.grids = check_timesteps(DEFAULT_TIMESTEPS if timesteps is None else timesteps)
        self.eta = float(eta)
        # In a dict, so that a text encoder that is a module does not become part of the student's weights.
        self._parts: dict[str, Any] = {"encode": encode, "latent_shape": latent_shape, "exporter": exporter}

    @property
    def exporter(self) -> Any:  # noqa: ANN401
        """What was given as ``exporter``."""
        return self._parts["exporter"]

    @property
    def step_counts(self) -> tuple[int, ...]:
        """The step counts it can be sampled with, ascending."""
        return tuple(self.grids)

    def __deepcopy__(self, memo: dict[int, Any]) -> FewStepStudent:
        """Copy the denoiser; share the encoder and the exporter."""
        copied = type(self)(copy.deepcopy(self.denoiser, memo), self.grids, self.eta, **self._parts)
        memo[id(self)] = copied
        return copied.train(self.training)

    def merged(self) -> FewStepStudent:
        """Return the student with an adapter on a shared base made a network of its own; others as they are."""
        from distillation.roles import merged

        denoiser = merged(self.denoiser)
        return self if denoiser is self.denoiser else type(self)(denoiser, self.grids, self.eta, **self._parts)

    def with_grids(self, timesteps: Mapping[int, Sequence[float]], eta: float) -> FewStepStudent:
        """Return a student of the same denoiser, not a copy, that is sampled on other grids."""
        return type(self)(self.denoiser, timesteps, eta, **self._parts)

    def encode(self, prompts: Sequence[Any]) -> Any:  # noqa: ANN401 - the family's condition
        """Return the condition of the prompts (texts or mappings).

        Raises:
            MissingPartError: the student was built without ``encode``.
        """
        if self._parts["encode"] is None:
            raise MissingPartError("this student cannot encode prompts; build it with encode=teacher.encode")
        return self._parts["encode"](prompts)

    def latent_shape(self, condition: Any = None) -> LatentShape:  # noqa: ANN401 - any Condition
        """Return (C, F, H, W) of one sample.

        Raises:
            MissingPartError: the student was built without ``latent_shape``.
        """
        shape = self._parts["latent_shape"]
        if shape is None:
            raise MissingPartError("this student does not know its latents; build it with latent_shape=(C, F, H, W)")
        return shape(condition) if callable(shape) else tuple(shape)

    def timesteps(self, num_steps: int) -> tuple[float, ...]:
        """Return the times at which the network is called.

        Raises:
            StepCountError: the student does not claim that count.
        """
        if num_steps not in self.grids:
            claimed = ", ".join(map(str, self.grids))
            raise StepCountError(f"this student samples in {claimed} steps; got {num_steps}: add a grid to timesteps")
        return self.grids[num_steps]

    def predict(self, latents: Tensor, step: int, num_steps: int, condition: Any = None) -> Prediction:  # noqa: ANN401
        """Return the denoiser's prediction at ``step`` (0 to num_steps - 1) of a ``num_steps`` chain.

        Raises:
            StepCountError: the count or the step is not one of the student's.
        """
        grid = self.timesteps(num_steps)
        if not 0 <= step < num_steps:
            raise StepCountError(f"step must lie in 0..{num_steps - 1} of {num_steps} steps; got {step}")
        prediction: Prediction = self.denoiser(latents, time_like(grid[step], latents), condition)
        return prediction

    def transition(
        self,
        latents: Tensor,
        step: int,
        num_steps: int,
        condition: Any = None,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Return mean [B, C, F, H, W] and std [] of the next latents.

        Args:
            latents: [B, C, F, H, W]; pure noise at step 0.
            step: 0 to num_steps - 1; after the last one std is 0 and the mean is the final x0.
            num_steps: a claimed step count.
            condition: of length B, or None.

        Raises:
            StepCountError: see :meth:`predict`.
        """
        prediction = self.predict(latents, step, num_steps, condition)
        reached = self.grids[num_steps][step + 1] if step + 1 < num_steps else None
        x0 = prediction.x0
        if reached is None:
            return x0, x0.new_zeros(())
        alpha_next, sigma_next = coefficients(self.denoiser.schedule, reached, x0)  # type: ignore[arg-type]
        return transition(x0, None if self.eta == 1 else prediction.eps, alpha_next, sigma_next, self.eta)

    def sample(self, condition: Any, noise: Tensor, num_steps: int = 4) -> Tensor:  # noqa: ANN401 - any Condition
        """Return latents [B, C, F, H, W]; differentiable, so wrap it in ``torch.no_grad()`` when no gradient is wanted.

        Args:
            condition: of length B, or None.
            noise: [num_steps, B, C, F, H, W]; noise[0] is the initial latents, noise[k] what step k - 1 injects.
            num_steps: a claimed step count.

        Raises:
            StepCountError: the count is not claimed.
            NoiseError: the stack has another length or rank.
            ConditionError: the condition describes another number of samples.
        """
        self.timesteps(num_steps)
        check_noise(noise, num_steps, condition)
        latents = noise[0].to(working_dtype(noise))
        for step in range(num_steps):
            mean, std = self.transition(latents, step, num_steps, condition)
            latents = mean if step + 1 == num_steps else mean + std * noise[step + 1]
        return latents

    def forward(self, condition: Any, noise: Tensor, num_steps: int = 4) -> Tensor:  # noqa: ANN401 - any Condition
        """Call :meth:`sample`."""
        return self.sample(condition, noise, num_steps)

    def save_pretrained(self, path: str | Path, *, merge_adapters: bool = True) -> None:
        """Write the student as a folder a stock diffusers pipeline loads; see :mod:`distillation.families.export`.

        Args:
            path: the folder.
            merge_adapters: False writes the adapter alone, for a pipeline that has the teacher; see
                :mod:`distillation.families.adapters`.
        """
        from distillation.families.adapters import save_adapter
        from distillation.families.export import save_student

        if merge_adapters:
            save_student(self, path)
        else:
            save_adapter(self, path)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> FewStepStudent:
        """Load what :meth:`save_pretrained` wrote."""
        from distillation.families.export import load_student

        student: FewStepStudent = load_student(path)
        return student


def check_noise(noise: Tensor, num_steps: int, condition: Any = None) -> None:  # noqa: ANN401 - any Condition
    """Check a noise stack [num_steps, B, C, F, H, W] against a step count and a condition of length B.

    Raises:
        NoiseError: the stack has another rank or length.
        ConditionError: the condition describes another number of samples.
    """
    if noise.ndim != 6 or noise.shape[0] != num_steps:
        raise NoiseError(
            f"{num_steps} steps take noise [{num_steps}, B, C, F, H, W], one entry per step; got {list(noise.shape)}"
        )
    if condition is not None and len(condition) != noise.shape[1]:
        raise ConditionError(
            f"the condition describes {len(condition)} samples, the noise {noise.shape[1]}; match them"
        )
