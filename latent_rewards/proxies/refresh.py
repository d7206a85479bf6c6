"""Continued training of a proxy on fresh samples, with replay of what it has seen.

While a policy is optimised against a proxy its samples drift away from the proxy's training data. A refresh scores some
of them with the true metrics and continues from the current weights; half of each batch is fresh and half replayed, so
that the proxy learns where the policy is without forgetting where it was.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.dataset import RewardDataset
from latent_rewards.proxies.ensemble import Reader, shuffled_batches, train_member
from latent_rewards.proxies.fit import fit_linear, settle
from latent_rewards.proxies.objectives import PREFERENCE_OBJECTIVES, regression_loss
from latent_rewards.proxies.proxy import RewardProxy
from latent_rewards.proxies.report import accuracy
from latent_rewards.proxies.samples import Rewards, Samples, concatenate_samples, gather_samples
from latent_rewards.proxies.text import Prompts
from latent_rewards.training.randomness import generator

DEFAULT_UPDATES = 24
LEARNING_RATE_FACTOR = 0.4
"""Peak learning rate of a refresh in units of the config's."""

_MIN_FRESH = 8
_MIN_CALIBRATION = 20
_LINEAR_ROWS = 4096


def update_proxy(
    proxy: RewardProxy,
    dataset_or_latents: RewardDataset | Tensor,
    rewards: Rewards | None = None,
    prompts: Prompts | None = None,
    *,
    replay: RewardDataset | None = None,
    num_updates: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Continue training ``proxy``, in place, on fresh samples.

    A part of the fresh samples (``holdout_fraction``) is not trained on; if it has at least 20, it renews the
    calibration and the out-of-distribution score. A linear proxy is solved again on fresh and replayed samples.

    Args:
        proxy: is changed in place; its parameters end frozen.
        dataset_or_latents: fresh samples, at least 8, in any form :func:`train_proxy` takes.
        rewards: with a latents tensor; must have the proxy's reward names.
        prompts: with a latents tensor.
        replay: earlier samples; None trains on the fresh ones only.
        num_updates: updates of each member; None takes 24. 0 only evaluates and calibrates.
        seed: root of the batch order; the same arguments give the same weights.

    Returns:
        ``num_fresh``, ``num_replay``, ``num_updates``, and per reward ``<name>/mae_before``, ``<name>/spearman_before``
        (all fresh samples, before any training: how good the proxy was where the policy is now) and
        ``<name>/mae_after``, ``<name>/spearman_after`` (fresh samples that were not trained on).

    Raises:
        DataError: other reward names or latent shape, missing prompts, or fewer than 8 fresh samples.
        FingerprintMismatchError: fresh or replayed samples belong to another latent space or metric.
        ConfigError: ``num_updates`` is negative, or the proxy was trained on preferences.
    """
    count = DEFAULT_UPDATES if num_updates is None else num_updates
    if count < 0:
        raise ConfigError(f"num_updates must not be negative; got {count}")
    if proxy.config.objective in PREFERENCE_OBJECTIVES:
        raise ConfigError(
            f"a proxy of preferences ({proxy.config.objective!r}) cannot be updated with scores, which have another "
            "unit; train a new one on the old and the new pairs"
        )
    fresh = _matching(proxy, gather_samples(dataset_or_latents, rewards, prompts), "fresh")
    number = len(fresh)
    if number < _MIN_FRESH:
        raise DataError(f"{number} fresh samples are too few for an update; give at least {_MIN_FRESH}")
    replayed = _draw_replay(proxy, replay, count, seed)
    reader = Reader(proxy, fresh if replayed is None else concatenate_samples(fresh, replayed))
    order = torch.randperm(number, generator=generator(seed, "proxy/update/split", 0))
    size = max(1, round(proxy.config.holdout_fraction * number))
    heldout, training = order[:size], order[size:]
    old = torch.arange(number, number + (len(replayed) if replayed is not None else 0))

    logs: dict[str, float] = {"num_fresh": number, "num_replay": len(replay or ()), "num_updates": count}
    logs |= _accuracies(proxy, reader, fresh, order, "before")
    if count and proxy.is_linear:
        rows = torch.cat([training, old])
        fit_linear(proxy, reader, rows, torch.arange(len(rows)) % 10 == 0)
    elif count:
        _train(proxy, reader, training, old, count, seed)
    logs |= _accuracies(proxy, reader, fresh, heldout, "after")
    if size >= _MIN_CALIBRATION:
        settle(proxy, reader, torch.cat([training, old]), heldout)
    return {key: float(value) for key, value in logs.items()}


def _train(proxy: RewardProxy, reader: Reader, fresh: Tensor, old: Tensor, count: int, seed: int) -> None:
    """Take ``count`` updates of every member; half of each batch is ``fresh`` and half ``old``, if there is any."""
    config = proxy.config
    half = max(1, config.batch_size // 2)
    for index, member in enumerate(proxy.members):
        source = generator(seed, "proxy/update/batches", 0, index)
        batches = shuffled_batches(fresh, half if len(old) else config.batch_size, count, source)
        if len(old):
            replayed = shuffled_batches(old, half, count, source)
            batches = [torch.cat(pair) for pair in zip(batches, replayed, strict=True)]
        train_member(
            member,
            reader,
            batches,
            learning_rate=LEARNING_RATE_FACTOR * config.learning_rate,
            weight_decay=config.weight_decay,
            warmup=0.1,
            stop=lambda number: False,
            input_noise=config.input_noise,
            source=source,
            loss=regression_loss(config.objective, config.huber_delta),
        )


def _accuracies(proxy: RewardProxy, reader: Reader, fresh: Samples, rows: Tensor, moment: str) -> dict[str, float]:
    mean, _ = reader.ensemble(rows)
    predicted = mean * proxy.reward_std.cpu() + proxy.reward_mean.cpu()
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


def _draw_replay(proxy: RewardProxy, replay: RewardDataset | None, count: int, seed: int) -> Samples | None:
    """Return at most as many replayed samples as the update will use."""
    if replay is None or not len(replay) or not count:
        return None
    half = max(1, proxy.config.batch_size // 2)
    wanted = _LINEAR_ROWS if proxy.is_linear else half * count * len(proxy.members)
    order = torch.randperm(len(replay), generator=generator(seed, "proxy/update/replay", 0))[:wanted]
    return _matching(proxy, gather_samples(replay.select(order.sort().values), None, None), "replayed")
