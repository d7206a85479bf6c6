"""Refreshing the proxy on true rewards of what the policy generates now, with everything seen before as replay.

Where the proxy chooses what is scored, half of the queries stay as the policy draws them. Of samples that were chosen
because the proxy rates them highly, proxy minus truth is too large, and of uncertain ones the error; so the gap, the
errors before the update and the calibration are taken from the drawn half alone.

In a launch of several ranks each generates, decodes and scores its share; one updates the proxy for all.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError, DataError, FingerprintMismatchError, Oracle, unknown_name
from latent_rewards.dataset import RewardDataset
from latent_rewards.lro.guard import Guard
from latent_rewards.lro.sampling import Batch
from latent_rewards.lro.scoring import AdaptiveReward, Proxy, ProxyReward
from latent_rewards.training.parts import HasStateDict
from latent_rewards.training.randomness import derive_seed
from latent_rewards.training.ranks import Ranks, current_ranks


@runtime_checkable
class UpdatableProxy(Protocol):
    """A proxy that learns from fresh samples."""

    def update(
        self, fresh: RewardDataset, /, *, replay: RewardDataset | None, num_updates: int, seed: int
    ) -> Mapping[str, float] | None:
        """Take ``num_updates`` optimiser steps on fresh and replayed samples; return what to log."""
        ...


def check_fingerprints(oracle: Oracle | None, proxy: Proxy, dataset: RewardDataset | None) -> None:
    """Check that oracle, proxy and replay data share latent space and metrics, as far as each knows its own.

    Raises:
        FingerprintMismatchError: two differ; the message names both.
    """
    metrics = getattr(oracle, "fingerprints", {})
    for kind, part in (("proxy", proxy), ("dataset", dataset)):
        for name, fingerprint in (getattr(part, "metric_fingerprints", None) or {}).items():
            if name in metrics and metrics[name] != fingerprint:
                raise FingerprintMismatchError(
                    f"reward {name!r} is {metrics[name]!r} in the oracle and {fingerprint!r} in the {kind}; collect "
                    "and fit again with the oracle's metric, or use the metric of that version and those options"
                )
    mine = getattr(proxy, "latent_space", None)
    for kind, other in (("oracle", oracle), ("dataset", dataset)):
        theirs = getattr(other, "latent_space", None)
        if mine is not None and theirs is not None and mine != theirs:
            raise FingerprintMismatchError(
                f"the proxy was trained in latent space {mine!r} and the {kind} belongs to {theirs!r}; use a proxy "
                "that was trained on this codec's latents"
            )


_REFERENCE_ROWS = 512
"""Most samples of the reference that a reward which compares with it is told of."""


class Refresher:
    """Queries the oracle, records the gap, and updates the proxy; holds the fresh samples for replay.

    Args:
        proxy: is updated in place.
        oracle: the true metrics; must return every reward of the proxy.
        dataset: what the proxy was trained on, replayed at each refresh; None replays only earlier fresh samples.
        guard: records the gap and counts the queries.
        num_updates: proxy updates per refresh.
        seed: root of the proxy updates' randomness.
        acquisition: "random", or how the proxy chooses half of the queries (see :mod:`latent_rewards.proxies.acquire`).
        acquisition_pool: candidates per query; they are held in memory while the proxy chooses.
        half_life: refreshes after which a replayed sample is drawn half as often; None replays all alike.

    Raises:
        ConfigError: the proxy has no ``update``, or cannot choose or weigh samples by age and should; or the oracle
            says what it returns, and one of the proxy's rewards is not among that.
        DataError: ``dataset`` lacks one of the proxy's rewards.
    """

    def __init__(
        self,
        scoring: ProxyReward,
        oracle: Oracle,
        dataset: RewardDataset | None,
        guard: Guard,
        *,
        num_updates: int,
        seed: int,
        acquisition: str = "random",
        acquisition_pool: int = 4,
        half_life: float | None = None,
    ) -> None:
        if not isinstance(scoring.proxy, UpdatableProxy):
            raise ConfigError(
                f"an oracle was given, but {type(scoring.proxy).__name__} has no update(...) to learn from it; pass a "
                "RewardProxy, or oracle=None to keep the proxy frozen"
            )
        self._check_abilities(scoring.proxy, acquisition, half_life)
        known: dict[str, str] = getattr(oracle, "fingerprints", {})  # not every oracle says what it returns
        for name in scoring.proxy.reward_names:
            if known and name not in known:
                raise ConfigError(
                    f"the oracle returns {', '.join(known)} and not the proxy's reward {name!r}, which it shall "
                    "refresh; name its metrics as the proxy's rewards, MetricOracle(codec, {reward: metric})"
                )
            if dataset is not None and name not in dataset.reward_names:
                raise DataError(f"the dataset to replay lacks it: {unknown_name('reward', name, dataset.reward_names)}")
        self.scoring, self.oracle, self.guard = scoring, oracle, guard
        self.num_updates, self.seed = num_updates, seed
        self.acquisition, self.acquisition_pool, self.half_life = acquisition, acquisition_pool, half_life
        self.replay, self._first = dataset, len(dataset or ())
        self._fresh: list[RewardDataset] = []

    @property
    def _ranks(self) -> Ranks:
        return current_ranks()  # not before the first refresh: by then the loop has joined the launch on its device

    @staticmethod
    def _check_abilities(proxy: UpdatableProxy, acquisition: str, half_life: float | None) -> None:
        parameters = inspect.signature(proxy.update).parameters
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        needs = {"half_life": half_life is not None, "num_random": acquisition != "random"}
        for name in (name for name, needed in needs.items() if needed and not anything and name not in parameters):
            raise ConfigError(
                f"{type(proxy).__name__}.update has no {name}=, so this proxy can be used with acquisition='random' "
                "and replay_half_life=None only; pass a RewardProxy for others"
            )
        if acquisition != "random" and not hasattr(proxy, "acquire"):
            raise ConfigError(
                f"acquisition={acquisition!r} lets the proxy choose, but {type(proxy).__name__} has no acquire(...); "
                "pass a RewardProxy, or acquisition='random'"
            )

    def candidates(self, queries: int) -> int:
        """Return how many samples :meth:`refresh` wants for that many queries."""
        return queries if self.acquisition == "random" else queries * self.acquisition_pool

    def refresh(
        self, step: int, samples: Iterable[tuple[Batch, Tensor]], queries: int | None = None
    ) -> dict[str, float]:
        """Score samples of the current policy with oracle and proxy, then update the proxy; return what to log.

        Args:
            step: policy updates done so far.
            samples: batches and their final latents ``[B, C, F, H, W]``, over all ranks :meth:`candidates` in all.
            queries: how many of them to score; needed unless acquisition is "random", which scores all.

        Raises:
            DataError: the oracle does not return one of the proxy's rewards, or returns infinity.
        """
        latents, prompts = self._pool(samples)
        rows, num_random = torch.arange(len(prompts)), None
        if self.acquisition != "random":
            if queries is None:
                raise ConfigError(f"refresh(..., queries=) is needed with acquisition={self.acquisition!r}")
            num_random = queries - queries // 2
            rows = self._ranks.once(lambda: self._chosen(step, latents, prompts, num_random, queries - num_random))
        latents, prompts = latents[rows], [prompts[i] for i in rows.tolist()]
        true, predicted = self._score(latents, prompts)
        drawn = slice(num_random)
        logs = self.guard.record_gap(
            step,
            {name: values[drawn] for name, values in predicted.items()},
            {name: values[drawn] for name, values in true.items()},
            num_queries=len(prompts),
        )
        # Before it learns: of these very samples it will know more than of those that come.
        self._tell_reward(latents[drawn], prompts[drawn], {name: values[drawn] for name, values in true.items()})
        fresh = self._dataset(latents, prompts, true)
        learnt = self._learn(fresh, step, self._extras(num_random))
        self._append(fresh)
        return {**logs, **{f"proxy/{key}": value for key, value in (learnt or {}).items()}}

    def _pool(self, samples: Iterable[tuple[Batch, Tensor]]) -> tuple[Tensor, list[str]]:
        """Return latents ``[N, C, F, H, W]`` on the CPU and prompts of every rank's samples, in the order of ids."""
        mine = [(final.cpu(), batch.prompts, batch.sample_ids) for batch, final in samples]
        parts = [part for share in self._ranks.gather(mine) for part in share]
        order = torch.tensor([i for _, _, ids in parts for i in ids]).argsort()
        prompts = [prompt for _, texts, _ in parts for prompt in texts]
        return torch.cat([latents for latents, _, _ in parts])[order], [prompts[i] for i in order.tolist()]

    def _chosen(self, step: int, latents: Tensor, prompts: list[str], num_random: int, num_chosen: int) -> Tensor:
        """Return the rows to score: ``num_random`` as drawn, then ``num_chosen`` that the proxy chose of the rest.

        Those as drawn are the samples of the first ids: the same as would be drawn if there were no others.
        """
        picked = cast(Any, self.scoring.proxy).acquire(
            latents[num_random:],
            num_chosen,
            prompts[num_random:],
            strategy=self.acquisition,
            seed=derive_seed(self.seed, "lro/acquire", step),
            reward=self.scoring.reward,
        )
        return torch.cat([torch.arange(num_random), num_random + picked])

    def _score(self, latents: Tensor, prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the true rewards and the proxy's scores, each ``{name: [N]}`` on the CPU; the ranks share the work."""
        device = next(self.guard.policy.parameters()).device
        size = min(self.scoring.micro_batch, math.ceil(len(prompts) / self._ranks.count))

        def score(start: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            part, texts = latents[start : start + size].to(device), prompts[start : start + size]
            true = query(self.oracle, part, texts, self.scoring.proxy.reward_names)
            with torch.no_grad():
                predicted = self.scoring.by_name(part, texts)
            return true, _on_cpu(predicted)

        scored = self._ranks.share(range(0, len(prompts), size), score)
        return _joined([true for true, _ in scored]), _joined([predicted for _, predicted in scored])

    def _learn(self, fresh: RewardDataset, step: int, extras: Mapping[str, Any]) -> Mapping[str, float] | None:
        """Update the proxy, in one rank if the others can take over its state; return what to log."""
        proxy = cast(UpdatableProxy, self.scoring.proxy)
        seed = derive_seed(self.seed, "lro/proxy-update", step)

        def learn() -> Mapping[str, float] | None:
            return proxy.update(fresh, replay=self.replay, num_updates=self.num_updates, seed=seed, **extras)

        if self._ranks.count == 1 or not isinstance(proxy, nn.Module):
            return learn()
        learnt, state = self._ranks.once(lambda: (learn(), _on_cpu(proxy.state_dict())))
        proxy.load_state_dict(state)
        return learnt

    def _tell_reward(self, latents: Tensor, prompts: list[str], true: Mapping[str, Tensor]) -> None:
        """Show a reward that learns the truth, and what the proxy makes of samples that it has not learnt from."""
        if not isinstance(self.scoring.reward, AdaptiveReward):
            return
        device = next(self.guard.policy.parameters()).device

        def score() -> dict[str, Tensor]:
            with torch.no_grad():
                return _on_cpu(self.scoring.scores(latents.to(device), prompts))

        scores = self._ranks.once(score)
        applies = {name: ~torch.isnan(values) for name, values in true.items()}
        self.scoring.reward.after_refresh(
            {name: float(values[applies[name]].double().mean()) for name, values in scores.items()},
            {name: float(values[applies[name]].double().mean()) for name, values in true.items()},
            *((self._ranks.once(self._reference_gap),) if self.scoring.needs_reference else ()),
        )

    @torch.no_grad()
    def _reference_gap(self) -> dict[str, float] | None:
        """Return how far true means lie above mean scores on the dataset the trainer was given, if it was."""
        if self.replay is None or not self._first:
            return None
        rows = torch.arange(self._first)[:: -(-self._first // _REFERENCE_ROWS)]
        known = self.replay.select(rows)
        device = next(self.guard.policy.parameters()).device
        scores = self.scoring.scores(known.latents().to(device), known.prompts)
        return {name: float((known.rewards[name].double() - s.double().cpu()).nanmean()) for name, s in scores.items()}

    def _extras(self, num_random: int | None) -> dict[str, Any]:
        extras: dict[str, Any] = {} if num_random is None else {"num_random": num_random}
        if self.half_life is not None and self.replay is not None:
            extras |= {"half_life": self.half_life, "replay_ages": self.replay_ages()}
        return extras

    def replay_ages(self) -> Tensor:
        """Return float64 ``[len(replay)]``: 1 for the samples of the last refresh, 2 for those before, and so on.

        The dataset the trainer was given is one refresh older than the first refresh.
        """
        sizes = [self._first, *(len(fresh) for fresh in self._fresh)]
        ages = torch.arange(len(sizes), 0, -1, dtype=torch.float64)
        return ages.repeat_interleave(torch.tensor(sizes))

    def _dataset(self, latents: Tensor, prompts: list[str], rewards: Mapping[str, Tensor]) -> RewardDataset:
        """Return a dataset that can join the replay: its dtype and fingerprints, NaN in columns the proxy lacks."""
        known = self.replay
        if known is None:
            metrics = getattr(self.oracle, "fingerprints", {})
            return RewardDataset.from_tensors(
                latents,
                prompts,
                rewards,
                latent_space=getattr(self.scoring.proxy, "latent_space", None),
                metric_fingerprints={name: metrics[name] for name in rewards if name in metrics},
            )
        absent = torch.full((len(latents),), torch.nan)
        return RewardDataset.from_tensors(
            latents.to(known.dtype),
            prompts,
            {name: rewards.get(name, absent) for name in known.reward_names},
            latent_space=known.latent_space,
            metric_fingerprints=known.metric_fingerprints,
        )

    def _append(self, fresh: RewardDataset) -> None:
        self._fresh.append(fresh)
        self.replay = fresh if self.replay is None else self.replay.concatenate(fresh)

    def state_dict(self) -> dict[str, Any]:
        """Return the fresh samples and, if it has a state, the proxy."""
        parts = [{"latents": f.latents(), "prompts": f.prompts, "rewards": f.rewards} for f in self._fresh]
        proxy = self.scoring.proxy
        return {"fresh": parts, "proxy": proxy.state_dict() if hasattr(proxy, "state_dict") else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for part in state["fresh"]:
            self._append(self._dataset(part["latents"], part["prompts"], part["rewards"]))
        if state["proxy"] is not None:
            cast(HasStateDict, self.scoring.proxy).load_state_dict(state["proxy"])


def query(oracle: Oracle, latents: Tensor, prompts: list[str], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Return the oracle's rewards ``{name: [B]}`` for ``latents``, without gradient and on the CPU.

    Args:
        oracle: true metrics.
        latents: ``[B, C, F, H, W]``.
        prompts: B texts.
        names: the rewards wanted; None keeps all it returns.

    Raises:
        DataError: a wanted reward is missing, or one is not ``[B]``.
    """
    with torch.no_grad():
        rewards = oracle(latents, prompts)
    wanted = list(rewards) if names is None else list(names)
    for name in wanted:
        if name not in rewards:
            raise DataError(f"the oracle did not return it: {unknown_name('reward', name, rewards)}")
        if rewards[name].shape != (len(latents),):
            raise DataError(
                f"the oracle's reward {name!r} has shape {tuple(rewards[name].shape)}; expected [{len(latents)}]"
            )
    return _on_cpu({name: rewards[name] for name in wanted})


def _on_cpu(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in values.items()}


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
