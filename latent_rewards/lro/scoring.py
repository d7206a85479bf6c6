"""From latents to the one reward that is optimised: pessimistic proxy scores, capped, then combined."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from latent_rewards.contracts import Condition, ConfigError, DataError, Reward
from latent_rewards.lro.advantages import normalize_each
from latent_rewards.rewards import WeightedSum
from latent_rewards.training.ranks import ALONE, Ranks


class Proxy(Protocol):
    """What the trainers ask of a reward proxy; ``RewardProxy`` has it."""

    @property
    def reward_names(self) -> tuple[str, ...]:
        """The rewards it predicts."""
        ...

    def scores(self, latents: Tensor, prompts: Sequence[str], *, pessimism: float = 0.0) -> dict[str, Tensor]:
        """Return ``{name: [B]}``: mean minus ``pessimism`` standard deviations, differentiable in the latents."""
        ...


@runtime_checkable
class AdaptiveReward(Protocol):
    """A Reward that learns while training, such as :class:`~latent_rewards.lro.constraints.Lagrangian`.

    One whose ``needs_reference`` is true is given, after the means, those of the reference policy's samples of the same
    prompts and noise, and at a refresh how far true means lie above mean scores on the reference's samples.
    """

    def after_update(self, means: Mapping[str, float], /, *reference: Mapping[str, float]) -> dict[str, float]:
        """Learn from the mean score of each reward over an update's samples; return what to log."""
        ...

    def after_refresh(
        self, proxy: Mapping[str, float], true: Mapping[str, float], /, *reference_gap: Mapping[str, float] | None
    ) -> None:
        """Learn from the means of scores and true rewards of the same samples, before the proxy learns from them."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:  # noqa: ANN401 - as torch's modules
        """Restore what :meth:`state_dict` returned."""
        ...


@runtime_checkable
class ConditionedReward(Protocol):
    """A Reward that differs between samples, such as :class:`~latent_rewards.lro.pareto.PreferredReward`."""

    def given(self, condition: Condition, repeats: int, /) -> Reward:
        """Return the Reward of ``repeats`` draws for each sample with this condition."""
        ...


@contextmanager
def frozen(module: object) -> Iterator[None]:
    """Keep a module's parameters out of graphs built in the block: a backward pass then leaves no gradient on them."""
    parameters = [p for p in module.parameters() if p.requires_grad] if isinstance(module, nn.Module) else []
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class ProxyReward:
    """Scores latents with a proxy and combines the scores.

    A reward that should fall (negative weight) is scored ``pessimism`` standard deviations *above* its mean and its cap
    bounds it from below: in both cases what the policy may gain from an uncertain or unbelievable score is limited.

    Args:
        proxy: see :class:`Proxy`.
        reward: combines ``{name: [B]}``; None takes the only reward there is.
        pessimism: standard deviations.
        cap: clamp of every score; None does not clamp.
        micro_batch: samples per proxy call.
        normalize_groups: samples of the groups in which each reward is normalised; None leaves rewards as they are.

    Raises:
        ConfigError: no ``reward`` for a proxy of several, or one that cannot be normalised reward by reward.
    """

    def __init__(
        self,
        proxy: Proxy,
        reward: Reward | None,
        *,
        pessimism: float,
        cap: float | None,
        micro_batch: int,
        normalize_groups: int | None = None,
    ) -> None:
        names = tuple(proxy.reward_names)
        if reward is None and len(names) != 1:
            example = ", ".join(f"{name!r}: 1.0" for name in names)
            raise ConfigError(
                f"the proxy has {len(names)} rewards; say how to combine them: WeightedSum({{{example}}})"
            )
        plain = isinstance(reward, WeightedSum) and reward.normalize is None
        if normalize_groups is not None and not plain:
            raise ConfigError(
                "multi_objective_aggregation='normalize_then_sum' needs reward=WeightedSum(weights) with "
                f"normalize=None, which it takes apart; got {reward!r}"
            )
        self.normalize_groups = normalize_groups
        self.proxy, self.pessimism, self.cap, self.micro_batch = proxy, pessimism, cap, micro_batch
        self.reward: Reward = reward if reward is not None else (lambda values: values[names[0]])
        self._compares = reward is not None
        self.needs_reference: bool = getattr(reward, "needs_reference", False)
        self.falling = {name for name, weight in getattr(reward, "weights", {}).items() if weight < 0}

    def by_name(self, latents: Tensor, prompts: Sequence[str], pessimism: float = 0.0) -> dict[str, Tensor]:
        """Return the proxy's scores ``{name: [N]}`` at ``pessimism``, without cap."""
        parts = []
        with frozen(self.proxy):
            for start in range(0, len(latents), self.micro_batch):
                stop = start + self.micro_batch
                parts.append(self.proxy.scores(latents[start:stop], prompts[start:stop], pessimism=pessimism))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def scores(self, latents: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the pessimistic, capped scores ``{name: [N]}``."""
        scores = self.by_name(latents, prompts, self.pessimism)
        if self.falling and self.pessimism:
            optimistic = self.by_name(latents, prompts, -self.pessimism)
            scores = {name: (optimistic if name in self.falling else scores)[name] for name in scores}
        if self.cap is not None:
            scores = {
                name: value.clamp(min=self.cap) if name in self.falling else value.clamp(max=self.cap)
                for name, value in scores.items()
            }
        return scores

    def __call__(
        self, latents: Tensor, prompts: Sequence[str], condition: Condition | None = None, ranks: Ranks = ALONE
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the reward ``[N]`` and the pessimistic, capped scores ``{name: [N]}`` it was made of.

        A reward that differs between samples takes it from their ``condition``, of B samples: ``[i]`` belongs to
        sample ``i % B``. Any other may compare samples, and so sees those of all ``ranks``, each of which must call
        this.

        Raises:
            DataError: the reward returned something else than ``[N]``.
        """
        scores = self.scores(latents, prompts)
        if condition is not None and isinstance(self.reward, ConditionedReward):
            given = self.reward.given(condition, len(latents) // len(condition))
            return _per_sample(given(scores), len(latents), given), scores
        return _of_all(scores, self.reward, ranks if self._compares else ALONE), scores

    def normalized(self, total: Tensor, scores: Mapping[str, Tensor], repeats: int) -> Tensor:
        """Return what advantages are taken of, ``[N]``: the reward, or the sum of rewards normalised by group.

        Args:
            total: the reward ``[N]``.
            scores: what it was made of, ``{name: [N]}``; ``[i]`` belongs to sample ``i % (N / repeats)``.
            repeats: draws per sample.
        """
        if self.normalize_groups is None or not isinstance(self.reward, WeightedSum):
            return total
        return self.reward(normalize_each(scores, self.reward.weights, self.normalize_groups, repeats))

    def terms(self, scores: Mapping[str, Tensor], repeats: int, ranks: Ranks = ALONE) -> Tensor:
        """Return the terms ``[R, N]`` whose sum :meth:`normalized` returns; the reward must be a WeightedSum.

        Each of the ``ranks`` must call this.
        """
        reward = cast(WeightedSum, self.reward)
        if self.normalize_groups is not None:
            scores = normalize_each(scores, reward.weights, self.normalize_groups, repeats)
        return _of_all(scores, reward.terms, ranks)

    def after_update(self, logs: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
        """Let a reward that learns see the means ``rewards/<name>/mean`` of all ranks; return what it logs.

        One that compares sees ``policy/<name>/mean`` and ``reference/<name>/mean``.
        """
        if not isinstance(self.reward, AdaptiveReward):
            return {}
        kinds = ("policy", "reference") if self.needs_reference else ("rewards",)
        shares = ranks.gather([[logs[f"{kind}/{name}/mean"] for name in self.proxy.reward_names] for kind in kinds])
        means = [
            [sum(column) / len(shares) for column in zip(*rows, strict=True)] for rows in zip(*shares, strict=True)
        ]
        return self.reward.after_update(*(dict(zip(self.proxy.reward_names, row, strict=True)) for row in means))


def _of_all(scores: Mapping[str, Tensor], combine: Reward, ranks: Ranks) -> Tensor:
    """Return this rank's part of ``combine({name: [N]}) -> [..., N]`` of all ranks' samples, with its gradient.

    So a reward that compares samples of a batch is the same on any number of ranks.
    """
    if ranks.count == 1:
        return _per_sample(combine(dict(scores)), len(next(iter(scores.values()))), combine)
    shares = ranks.gather({name: values.detach().cpu() for name, values in scores.items()})
    whole = {
        name: torch.cat([mine if rank == ranks.index else share[name].to(mine) for rank, share in enumerate(shares)])
        for name, mine in scores.items()
    }
    counts = [len(next(iter(share.values()))) for share in shares]
    return _per_sample(combine(whole), sum(counts), combine).split(counts, dim=-1)[ranks.index]


def _per_sample(total: Any, count: int, reward: Reward) -> Tensor:  # noqa: ANN401 - what somebody's reward returned
    """Return a reward's result, one of ``[..., count]``.

    Raises:
        DataError: it is something else.
    """
    if isinstance(total, Tensor) and total.shape[-1:] == (count,):
        return total
    got = f"shape {list(total.shape)}" if isinstance(total, Tensor) else f"a {type(total).__name__}"
    name = getattr(reward, "__qualname__", type(reward).__qualname__)
    raise DataError(f"reward {name} must return a tensor with one number per sample, [{count}]; got {got}")
