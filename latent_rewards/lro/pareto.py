"""A whole Pareto front from one run: a policy that is told how much each reward counts, and the reward that asks it.

Every group of samples in training draws its own weights, uniform on the simplex; the policy sees them through small
additions to its linear layers, and its samples are rewarded with the same weights. Afterwards
:meth:`WeightConditioned.at` gives the policy of any weights. Compare Rewarded Soups (Ramé et al. 2023, 2306.04488),
which trains one policy per reward and interpolates.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latent_rewards.contracts import Condition, ConfigError, DataError, Policy, Prompt, unknown_name
from latent_rewards.rewards import check_numbers, exclude, neutral, select_rewards
from latent_rewards.training.checkpoint import CheckpointError, check_target, commit_directory, verify_directory
from latent_rewards.training.randomness import generator, sample_uniform

WEIGHTS = "preferences.safetensors"
"""File by which a folder of additions is known."""
_SETTINGS = "preferences.json"


@dataclass
class PreferredCondition:
    """A policy's condition and the weights of the rewards, one row per sample.

    Attributes:
        condition: what the policy itself asks for.
        preferences: ``[B, R]``, not negative, summing to 1.
    """

    condition: Condition
    preferences: Tensor

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.condition)

    def index_select(self, index: Tensor) -> PreferredCondition:
        """Return the rows at ``index``."""
        return PreferredCondition(self.condition.index_select(index), self.preferences[index])

    def to(self, device: torch.device | str) -> PreferredCondition:
        """Return the condition on ``device``."""
        return PreferredCondition(self.condition.to(device), self.preferences.to(device))


class Addition(nn.Module):
    """What the weights w add to a linear layer: ``up (gate(w) * down x) + shift w``, exactly 0 before training.

    Args:
        layer: what is added to; only its sizes, dtype and device are used.
        num_rewards: R.
        rank: of the product, whose factors the weights gate.
        source: of the random initial values of ``down`` and the gate.
    """

    def __init__(self, layer: nn.Linear, num_rewards: int, rank: int, source: torch.Generator) -> None:
        super().__init__()
        like = layer.weight
        down = torch.randn(rank, layer.in_features, generator=source) / math.sqrt(layer.in_features)
        self.down = nn.Parameter(down.to(like))
        self.gate = nn.Parameter(torch.randn(rank, num_rewards, generator=source).to(like))
        self.up = nn.Parameter(like.new_zeros(layer.out_features, rank))
        self.shift = nn.Parameter(like.new_zeros(layer.out_features, num_rewards))

    def forward(self, inputs: Tensor, preferences: Tensor) -> Tensor:
        """Return ``[B, ..., out]`` for ``inputs`` ``[B, ..., in]`` and ``preferences`` ``[B, R]``."""
        rows = preferences.to(self.gate).view(len(preferences), *(1,) * (inputs.ndim - 2), -1)
        gates = 1 + (rows - 1 / rows.shape[-1]) @ self.gate.T
        return (gates * (inputs @ self.down.T)) @ self.up.T + rows @ self.shift.T


class WeightConditioned(nn.Module):
    """Makes a policy depend on the weights of several rewards; a Policy itself, equal to the given one before training.

    The additions are hooks that exist during :meth:`transition` alone. So a policy that recomputes activations in the
    backward pass (gradient checkpointing) cannot be wrapped: switch that off.

    Args:
        policy: an ``nn.Module`` that is a Policy and has linear layers.
        reward_names: the R rewards, at least two; also the order of preferences.
        rank: of each layer's addition, at least 1.
        layers: name patterns of the linear layers that get one, as ``fnmatch`` reads them. Their inputs must be
            ``[B, ..., in]``, B the number of samples.
        freeze: train the additions alone; False trains the policy's own parameters along.
        seed: of the additions' initial values.

    Raises:
        ConfigError: fewer than two rewards, a rank below 1, or no linear layer of those names.
    """

    def __init__(
        self,
        policy: Policy,
        reward_names: Sequence[str],
        *,
        rank: int = 4,
        layers: Sequence[str] = ("*",),
        freeze: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(set(reward_names)) < 2 or len(set(reward_names)) != len(reward_names):
            raise ConfigError(f"reward_names must be at least two different names; got {list(reward_names)}")
        if rank < 1:
            raise ConfigError(f"rank must be at least 1; got {rank}")
        self.policy = cast(nn.Module, policy)
        self.reward_names, self.rank, self.layers = tuple(reward_names), rank, tuple(layers)
        if freeze:
            self.policy.requires_grad_(False)
        self.preference = torch.full((len(reward_names),), 1 / len(reward_names))
        self.additions = nn.ModuleList()
        self._targets: list[str] = []
        for name, layer in self.policy.named_modules():
            if isinstance(layer, nn.Linear) and any(fnmatch.fnmatchcase(name, pattern) for pattern in self.layers):
                self._targets.append(name)
                source = generator(seed, f"lro/pareto/{name}", 0)
                self.additions.append(Addition(layer, len(reward_names), rank, source))
        if not self._targets:
            raise ConfigError(f"the policy has no nn.Linear named like {', '.join(self.layers)}; see named_modules()")

    def at(self, preference: Mapping[str, float]) -> WeightConditioned:
        """Return the policy of these weights, for sampling; it shares all parameters with this one.

        Args:
            preference: reward name -> weight, not negative; they are divided by their sum. 0 where none is given.

        Raises:
            ConfigError: an unknown name, a negative weight, or no positive one.
        """
        for name, weight in check_numbers(preference, "weight").items():
            if name not in self.reward_names:
                raise ConfigError(unknown_name("reward", name, self.reward_names))
            if weight < 0:
                raise ConfigError(f"the weight of {name!r} must not be negative; got {weight}")
        weights = torch.tensor([float(preference.get(name, 0.0)) for name in self.reward_names])
        if not float(weights.sum()) > 0:
            raise ConfigError(f"at least one weight must be positive; got {dict(preference)}")
        chosen = copy.copy(self)
        chosen.preference = weights / weights.sum()
        return chosen

    def encode(self, prompts: Sequence[Prompt]) -> PreferredCondition:
        """Return the policy's condition of the prompts with this policy's weights for each."""
        condition = self._wrapped.encode(prompts)
        return PreferredCondition(condition, self.preference.expand(len(prompts), -1).clone())

    def vary(
        self, condition: PreferredCondition, *, seed: int, stage: str, step: int, groups: Sequence[int]
    ) -> PreferredCondition:
        """Return the condition with weights drawn uniformly from the simplex, the same within a group.

        Each is a function of (seed, stage, step, group) alone.
        """
        stages = [f"{stage}/preference/{name}" for name in self.reward_names]
        columns = [-torch.log1p(-sample_uniform(seed, named, step, groups)) for named in stages]
        drawn = torch.stack(columns, dim=1)
        return PreferredCondition(condition.condition, (drawn / drawn.sum(1, keepdim=True)).to(condition.preferences))

    def latent_shape(self, condition: PreferredCondition) -> tuple[int, int, int, int]:
        """Return ``(C, F, H, W)`` of one sample's latents."""
        return self._wrapped.latent_shape(condition.condition)

    def timesteps(self, num_steps: int) -> Sequence[float]:
        """Return the policy's grid of ``num_steps`` times."""
        return self._wrapped.timesteps(num_steps)

    def transition(
        self, latents: Tensor, step: int, num_steps: int, condition: PreferredCondition
    ) -> tuple[Tensor, Tensor]:
        """Return mean and std of the next latents under each sample's weights.

        Raises:
            DataError: a layer's input does not have one row per sample.
        """
        with self._adding(condition.preferences):
            return self._wrapped.transition(latents, step, num_steps, condition.condition)

    @property
    def _wrapped(self) -> Policy:
        return cast(Policy, self.policy)

    @contextmanager
    def _adding(self, preferences: Tensor) -> Iterator[None]:
        modules = dict(self.policy.named_modules())
        with ExitStack() as hooks:
            for name, addition in zip(self._targets, self.additions, strict=True):
                handle = modules[name].register_forward_hook(_hook(name, addition, preferences))
                hooks.callback(handle.remove)
            yield

    def save_pretrained(self, path: str | Path) -> None:
        """Commit the additions to a folder: safetensors and JSON. The policy itself is stored by its own means.

        Raises:
            FolderInUseError: the folder holds something else.
        """
        check_target(path, WEIGHTS)
        settings = {"reward_names": self.reward_names, "rank": self.rank, "layers": self.layers}
        with commit_directory(path) as temporary:
            tensors = {name: value.detach().cpu().contiguous() for name, value in self.additions.state_dict().items()}
            save_file(tensors, temporary / WEIGHTS)
            (temporary / _SETTINGS).write_text(json.dumps({**settings, "targets": self._targets}))

    @classmethod
    def from_pretrained(cls, policy: Policy, path: str | Path, *, freeze: bool = True) -> WeightConditioned:
        """Return ``policy`` with the additions of a folder.

        Raises:
            CheckpointError: the folder is damaged, or belongs to a policy with other layers.
        """
        verify_directory(path)
        settings: dict[str, Any] = json.loads((Path(path) / _SETTINGS).read_text())
        targets = settings.pop("targets")
        made = cls(policy, freeze=freeze, **settings)
        tensors = load_file(Path(path) / WEIGHTS)
        sizes = {name: value.shape for name, value in made.additions.state_dict().items()}
        if made._targets != targets or sizes != {name: value.shape for name, value in tensors.items()}:
            raise CheckpointError(f"{path} belongs to a policy with other linear layers: {', '.join(targets[:4])} ...")
        made.additions.load_state_dict(tensors)
        return made


class PreferredReward:
    """The reward of each sample under its own weights, for a :class:`WeightConditioned` policy.

    "linear" is ``sum_i w_i reward_i / unit_i``; "tchebycheff" is ``-max_i w_i (ideal_i - reward_i) / unit_i``, which
    also reaches the concave parts of a front.

    Args:
        units: reward name -> what counts as one of it, positive, such as its standard deviation over the student's
            samples; it names the rewards, in the policy's order.
        kind: "linear" or "tchebycheff".
        ideals: for "tchebycheff", reward name -> a value that is hardly reached.

    Raises:
        ConfigError: a unit that is not positive, an unknown kind, or ideals for other names.
    """

    def __init__(
        self,
        units: Mapping[str, float],
        kind: Literal["linear", "tchebycheff"] = "linear",
        ideals: Mapping[str, float] | None = None,
    ) -> None:
        if kind not in ("linear", "tchebycheff"):
            raise ConfigError(unknown_name("kind", str(kind), ("linear", "tchebycheff")))
        self.units, self.kind = check_numbers(units, "unit"), kind
        for name, unit in self.units.items():
            if unit <= 0:
                raise ConfigError(f"the unit of {name!r} must be positive; got {unit}")
        if set(ideals or {}) != (set(self.units) if kind == "tchebycheff" else set()):
            raise ConfigError(f"ideals belong to 'tchebycheff' and name {sorted(self.units)}; got {ideals}")
        self.ideals = dict(ideals or dict.fromkeys(self.units, 0.0))

    def __call__(self, rewards: Mapping[str, Tensor]) -> Tensor:
        """Return ``[B]`` under equal weights, which is what a proxy chooses true queries by.

        Raises:
            DataError: a reward is missing.
        """
        rows = select_rewards(rewards, self.units)
        return self._combined(rows, torch.full_like(rows, 1 / len(rows)))

    def given(self, condition: Condition, repeats: int) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """Return the reward ``{name: [repeats * B]} -> [repeats * B]`` of samples with this condition.

        Raises:
            ConfigError: the condition has no weights, or another number of them.
        """
        preferences = getattr(condition, "preferences", None)
        if preferences is None or preferences.shape[1] != len(self.units):
            raise ConfigError(
                f"PreferredReward needs a policy that was told the weights of {', '.join(self.units)}: "
                "WeightConditioned(policy, reward_names)"
            )
        columns = preferences.T.repeat(1, repeats)
        return lambda rewards: self._combined(select_rewards(rewards, self.units), columns)

    def _combined(self, rows: Tensor, weights: Tensor) -> Tensor:
        rows, applies = neutral(rows)
        units, ideals = (rows.new_tensor(list(values.values()))[:, None] for values in (self.units, self._ordered()))
        gains = weights.to(rows) * (rows - ideals) / units
        return exclude(gains.sum(dim=0) if self.kind == "linear" else gains.amin(dim=0), applies)

    def _ordered(self) -> dict[str, float]:
        return {name: self.ideals[name] for name in self.units}

    def __repr__(self) -> str:
        """Return the constructor call."""
        return f"PreferredReward({self.units}, {self.kind!r})"


def _hook(name: str, addition: nn.Module, preferences: Tensor) -> Callable[..., Tensor]:
    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if len(inputs[0]) != len(preferences):
            raise DataError(
                f"layer {name!r} has an input of shape {tuple(inputs[0].shape)} for {len(preferences)} samples; leave "
                "it out of WeightConditioned(layers=...)"
            )
        return output + addition(inputs[0], preferences).to(output)

    return add
