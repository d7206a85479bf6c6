"""Continued training of a proxy on fresh samples, with replay of what it has seen.

While a policy is optimised against a proxy its samples drift away from the proxy's training data. A refresh scores some
of them with the true metrics and continues from the current weights; half of each batch is fresh and half replayed, so
that the proxy learns where the policy is without forgetting where it was.

With a half life replayed samples are drawn the more rarely the older they are, with replacement and probability
proportional to ``2^(-age / half_life)``: what the policy made long ago it may never make again.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.dataset import RewardDataset
from latent_rewards.proxies.ensemble import Reader, shuffled_batches
from latent_rewards.proxies.fit import fit_linear
from latent_rewards.proxies.joint import continue_training
from latent_rewards.proxies.objectives import PREFERENCE_OBJECTIVES
from latent_rewards.proxies.proxy import RewardProxy
from latent_rewards.proxies.report import accuracy
from latent_rewards.proxies.samples import Rewards, Samples, concatenate_samples, gather_samples
from latent_rewards.proxies.settle import settle, settle_strangeness
from latent_rewards.proxies.text import Prompts
from latent_rewards.training.randomness import generator

DEFAULT_UPDATES = 24
LEARNING_RATE_FACTOR = 0.4
"""Peak learning rate of a refresh in units of the config's."""

_MIN_FRESH = 8
_MIN_CALIBRATION = 20
_STRANGENESS_ROWS = 512
_LINEAR_ROWS = 4096


def update_proxy(
    proxy: RewardProxy,
    dataset_or_latents: RewardDataset | Tensor,
    rewards: Rewards | None = None,
    prompts: Prompts | None = None,
    *,
    replay: RewardDataset | None = None,
    replay_ages: Tensor | None = None,
    half_life: float | None = None,
    num_updates: int | None = None,
    num_random: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Continue training ``proxy``, in place, on fresh samples.

    A part of the fresh samples (``holdout_fraction``) is not trained on; if it has at least 20, it renews the
    calibration and the out-of-distribution score. With fewer the calibration stays, and what counts as strange is
    learnt from a fifth of the samples it was trained on beside them: otherwise the trunk's features, once they have
    moved, would make everything strange. False alarms are then somewhat more frequent than asked for. A linear proxy is
    solved again on fresh and replayed samples.

    Args:
        proxy: is changed in place; its parameters end frozen.
        dataset_or_latents: fresh samples, at least 8, in any form :func:`train_proxy` takes.
        rewards: with a latents tensor; must have the proxy's reward names.
        prompts: with a latents tensor.
        replay: earlier samples; None trains on the fresh ones only.
        replay_ages: ``[len(replay)]``, at least 0, in any unit, such as refreshes since; needed with a ``half_life``.
        half_life: age, in that unit, at which a replayed sample is drawn half as often as a new one; None draws all
            alike, and none twice before all were drawn.
        num_updates: updates of each member; None takes 24. 0 only evaluates and calibrates.
        num_random: the first so many fresh samples are a random draw, the rest was chosen (see
            :mod:`latent_rewards.proxies.acquire`): only the former are held out, and the accuracies before the update
            are theirs. None: all are a random draw.
        seed: root of the batch order; the same arguments give the same weights.

    Returns:
        ``num_fresh``, ``num_replay``, ``num_updates``, and per reward ``<name>/mae_before``, ``<name>/spearman_before``
        (all randomly drawn fresh samples, before any training: how good the proxy was where the policy is now) and
        ``<name>/mae_after``, ``<name>/spearman_after`` (fresh samples that were not trained on).

    Raises:
        DataError: other reward names or latent shape, missing prompts, fewer than 8 fresh samples, or ages that are not
            one per replayed sample.
        FingerprintMismatchError: fresh or replayed samples belong to another latent space or metric.
        ConfigError: ``num_updates`` is negative, ``num_random`` is not in [1, N], ages come without half life or the
            other way round, or the proxy was trained on preferences.
    """
    count = DEFAULT_UPDATES if num_updates is None else num_updates
    if count < 0:
        raise ConfigError(f"num_updates must not be negative; got {count}")
    if proxy.config.objective in PREFERENCE_OBJECTIVES:
        raise ConfigError(
            f"a proxy of preferences ({proxy.config.objective!r}) cannot be updated with scores, which have another "
            "unit; train a new one on the old and the new pairs"
        )
    if (replay_ages is None) != (half_life is None):
        raise ConfigError("replay_ages and half_life belong together; pass both, or neither to replay all alike")
    fresh = _matching(
        proxy,
        gather_samples(dataset_or_latents, rewards, prompts, in_memory_bytes=proxy.config.in_memory_bytes),
        "fresh",
    )
    number = len(fresh)
    if number < _MIN_FRESH:
        raise DataError(f"{number} fresh samples are too few for an update; give at least {_MIN_FRESH}")
    drawn = number if num_random is None else num_random
    if not 1 <= drawn <= number:
        raise ConfigError(f"num_random must lie in [1, {number}] for {number} fresh samples; got {num_random}")
    probabilities = None
    if replay is not None and replay_ages is not None and half_life is not None:
        probabilities = replay_probabilities(replay_ages, half_life, len(replay))
    replayed, old = _draw_replay(proxy, replay, probabilities, count, seed)
    reader = Reader(proxy, fresh if replayed is None else concatenate_samples(fresh, replayed))
    order = torch.randperm(drawn, generator=generator(seed, "proxy/update/split", 0))
    size = min(max(1, round(proxy.config.holdout_fraction * number)), drawn)
    heldout, training = order[:size], torch.cat([order[size:], torch.arange(drawn, number)])
    old = old + number

    logs: dict[str, float] = {"num_fresh": number, "num_replay": len(replay or ()), "num_updates": count}
    logs |= _accuracies(proxy, reader, fresh, order, "before")
    if count and proxy.is_linear:
        rows = torch.cat([training, old])
        fit_linear(proxy, reader, rows, torch.arange(len(rows)) % 10 == 0)
    elif count:
        _train(proxy, reader, training, old, count, seed)
    logs |= _accuracies(proxy, reader, fresh, heldout, "after")
    seen = torch.cat([training, old])
    if size >= _MIN_CALIBRATION:
        settle(proxy, reader, seen, heldout)
    elif count:
        _renew_strangeness(proxy, reader, seen.unique(), heldout, seed)
    return {key: float(value) for key, value in logs.items()}


def _renew_strangeness(proxy: RewardProxy, reader: Reader, seen: Tensor, heldout: Tensor, seed: int) -> None:
    order = torch.randperm(len(seen), generator=generator(seed, "proxy/update/strangeness", 0))
    rows = seen[order[:_STRANGENESS_ROWS]]
    fifth = len(rows) // 5
    settle_strangeness(proxy, reader, rows[fifth:], torch.cat([heldout, rows[:fifth]]))


def _train(proxy: RewardProxy, reader: Reader, fresh: Tensor, old: Tensor, count: int, seed: int) -> None:
    """Take ``count`` updates of every member; half of each batch is ``fresh`` and half ``old``, if there is any."""
    config = proxy.config
    half = max(1, config.batch_size // 2)

    def draw(source: torch.Generator) -> list[Tensor]:
        batches = shuffled_batches(fresh, half if len(old) else config.batch_size, count, source)
        if not len(old):
            return batches
        replayed = shuffled_batches(old, half, count, source)
        return [torch.cat(pair) for pair in zip(batches, replayed, strict=True)]

    continue_training(
        proxy,
        reader,
        draw,
        lambda member: generator(seed, "proxy/update/batches", 0, member),
        rate=LEARNING_RATE_FACTOR,
        redraw=True,
    )


def _accuracies(proxy: RewardProxy, reader: Reader, fresh: Samples, rows: Tensor, moment: str) -> dict[str, float]:
    mean, _ = reader.ensemble(rows)
    predicted = proxy.correct(mean.to(proxy.reward_std)).cpu() * proxy.reward_std.cpu() + proxy.reward_mean.cpu()
    logs: dict[str, float] = {}
    for i, name in enumerate(proxy.reward_names):
        scores = accuracy(predicted[:, i], fresh.rewards[rows][:, i])
        logs |= {f"{name}/mae_{moment}": scores["mae"], f"{name}/spearman_{moment}": scores["spearman"]}
    return logs


def _matching(proxy: RewardProxy, samples: Samples, kind: str) -> Samples:
    """Return the samples with the proxy's rewards in its order, and without prompts if the proxy reads none."""
    proxy.check_latent_space(samples.latent_space)
    proxy.check_metrics(samples.metric_fingerprints)
    missing = [name for name in proxy.reward_names if name not in samples.reward_names]
    if missing:
        raise DataError(f"the {kind} samples lack {missing}; they have {list(samples.reward_names)}")
    columns = [samples.reward_names.index(name) for name in proxy.reward_names]
    prompts = None if proxy.prompt_features.kind == "none" else samples.prompts
    return replace(samples, rewards=samples.rewards[:, columns], reward_names=proxy.reward_names, prompts=prompts)


def replay_probabilities(ages: Tensor, half_life: float, count: int) -> Tensor:
    """Return float64 ``[count]``, proportional to ``2^(-age / half_life)`` and of sum 1.

    Raises:
        DataError: the ages are not ``[count]``, or one is negative or not finite.
        ConfigError: the half life is not positive.
    """
    if not half_life > 0:
        raise ConfigError(f"half_life must be positive, or None; got {half_life}")
    ages = torch.as_tensor(ages).detach().to("cpu", torch.float64)
    if ages.shape != (count,):
        raise DataError(f"replay_ages has shape {tuple(ages.shape)}; expected [{count}], one per replayed sample")
    if not count:
        return ages
    if not bool((ages.isfinite() & (ages >= 0)).all()):
        worst = int((~(ages.isfinite() & (ages >= 0))).nonzero()[0])
        raise DataError(f"replay_ages[{worst}] is {float(ages[worst])}; ages must be finite and at least 0")
    weights = torch.exp2((ages.min() - ages) / half_life)
    return weights / weights.sum()


def _draw_replay(
    proxy: RewardProxy, replay: RewardDataset | None, probabilities: Tensor | None, count: int, seed: int
) -> tuple[Samples | None, Tensor]:
    """Return the replayed samples the update will use, at most as many as it needs, and its draws among them.

    With ``probabilities`` a sample may be drawn several times; it is read once.
    """
    if replay is None or not len(replay) or not count:
        return None, torch.arange(0)
    half = max(1, proxy.config.batch_size // 2)
    wanted = _LINEAR_ROWS if proxy.is_linear else half * count * len(proxy.members)
    source = generator(seed, "proxy/update/replay", 0)
    if probabilities is None:
        rows = torch.randperm(len(replay), generator=source)[:wanted].sort().values
        draws = torch.arange(len(rows))
    else:
        wanted = min(wanted, len(replay)) if proxy.is_linear else wanted
        ends = probabilities.cumsum(0)
        uniform = torch.rand(wanted, generator=source, dtype=torch.float64) * ends[-1]
        drawn = torch.searchsorted(ends, uniform, right=True).clamp(max=len(replay) - 1)
        rows, draws = drawn.unique(return_inverse=True)
    return _matching(
        proxy, gather_samples(replay.select(rows), None, None, in_memory_bytes=proxy.config.in_memory_bytes), "replayed"
    ), draws
