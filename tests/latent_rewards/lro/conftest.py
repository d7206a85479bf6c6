"""A linear policy, exact reward models and a true metric for them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn


class Rows:
    """A condition that is a table of embeddings, one row per sample."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def index_select(self, index: Tensor) -> Rows:
        return Rows(self.table[index])

    def to(self, device: torch.device | str) -> Rows:
        return Rows(self.table.to(device))


class LinearPolicy(nn.Module):
    """mean = gain * x + shift, std = sigma before the last step and 0 at it."""

    def __init__(self, dim: int = 1, gain: float = 1.0, shift: float = 0.0, sigma: float = 0.5) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))
        self.shift = nn.Parameter(torch.full((dim, 1, 1, 1), shift, dtype=torch.float64))
        self.sigma, self.dim, self.calls = sigma, dim, 0

    def encode(self, prompts: Sequence[str | dict]) -> Rows:
        return Rows(torch.arange(len(prompts), dtype=torch.float64)[:, None])

    def latent_shape(self, condition: Rows) -> tuple[int, int, int, int]:
        return (self.dim, 1, 1, 1)

    def timesteps(self, num_steps: int) -> list[float]:
        return [1 - k / num_steps for k in range(num_steps)]

    def transition(self, latents: Tensor, step: int, num_steps: int, condition: Rows) -> tuple[Tensor, Tensor]:
        self.calls += torch.is_grad_enabled()
        std = 0.0 if step + 1 == num_steps else self.sigma
        return self.gain * latents + self.shift, torch.tensor(std, dtype=torch.float64)


class ExactProxy(nn.Module):
    """Scores -curvature/2 |x - target|^2 + slope . x with a standard deviation of ``spread`` |x|.

    An update fits nothing: it moves the target to the best sample it was shown.
    """

    def __init__(self, target: float = 1.0, curvature: float = 1.0, slope: float = 0.0, spread: float = 0.0) -> None:
        super().__init__()
        self.target = nn.Parameter(torch.tensor(target, dtype=torch.float64))
        self.curvature, self.slope, self.spread = curvature, slope, spread
        self.reward_names: tuple[str, ...] = ("quality",)
        self.latent_space: str | None = None
        self.updates: list[dict] = []

    def scores(self, latents: Tensor, prompts: Sequence[str], pessimism: float = 0.0) -> dict[str, Tensor]:
        assert len(latents) == len(prompts)
        flat = latents.flatten(1)
        score = -0.5 * self.curvature * ((flat - self.target) ** 2).sum(1) + self.slope * flat.sum(1)
        return {name: score - pessimism * self.spread * flat.norm(dim=1) for name in self.reward_names}

    def update(self, fresh, *, replay=None, num_updates: int = 0, seed: int = 0) -> None:  # noqa: ANN001
        everything = fresh if replay is None else replay.concatenate(fresh)
        self.updates.append({"fresh": len(fresh), "replay": 0 if replay is None else len(replay), "seed": seed})
        best = int(everything.rewards["quality"].nan_to_num(nan=-torch.inf).argmax())
        with torch.no_grad():
            self.target.fill_(float(everything.latents([best]).mean()))


@pytest.fixture
def linear_policy() -> type[LinearPolicy]:
    return LinearPolicy


@pytest.fixture
def exact_proxy() -> type[ExactProxy]:
    return ExactProxy


@pytest.fixture
def rows() -> type[Rows]:
    return Rows


@pytest.fixture
def gradient_estimates():
    """A function that trains at a rate that moves nothing and returns each optimiser step's gradient, by parameter."""

    def collect(made) -> dict[str, Tensor]:
        seen: dict[str, list[Tensor]] = {name: [] for name, p in made.policy.named_parameters() if p.requires_grad}
        for name in seen:
            parameter = made.policy.get_parameter(name)
            parameter.register_post_accumulate_grad_hook(lambda p, kept=seen[name]: kept.append(p.grad.clone()))
        made.train()
        return {name: torch.stack(values) for name, values in seen.items()}

    return collect


@pytest.fixture
def assert_mean():
    """A function that checks that values ``[n, ...]`` have a mean within 4.5 standard errors of the exact one."""

    def check(values: Tensor, exact: Tensor | float) -> None:
        error, allowed = (values.mean(0) - exact).abs(), 4.5 * values.std(0) / len(values) ** 0.5
        assert (error <= allowed + 1e-12).all(), (values.mean(0), exact, allowed)

    return check
