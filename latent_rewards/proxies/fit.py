"""Training a reward proxy: check, split, fit each member, calibrate, report.

A held-out part of the data (``holdout_fraction``) is kept for calibration and report and never chooses a weight. Each
member leaves out another tenth of the rest (a fifth of small data), on which it stops early; with another
initialisation and batch order this is what makes the members disagree. Targets are standardised; an unknown (NaN)
reward has no weight in the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from latent_rewards.dataset import RewardDataset
from latent_rewards.proxies.calibration import crossfit_coverage
from latent_rewards.proxies.config import ProxyConfig
from latent_rewards.proxies.ensemble import Reader, fit_members
from latent_rewards.proxies.features import linear_features
from latent_rewards.proxies.linear import LinearMember, fit_ridge
from latent_rewards.proxies.objectives import check_objective
from latent_rewards.proxies.preferences import Preferences, check_preferences, name_preferences
from latent_rewards.proxies.proxy import RewardProxy
from latent_rewards.proxies.report import evaluate
from latent_rewards.proxies.samples import (
    Rewards,
    Samples,
    check_trainable,
    gather_samples,
    group_ids,
    prompt_ids,
    split_folds,
    split_samples,
)
from latent_rewards.proxies.text import PromptEncoder, PromptFeatures, Prompts, real_tokens
from latent_rewards.training.randomness import derive_seed, generator

_SMALL = 200
_CHUNK = 128
_STATISTICS_ROWS = 4096
_BASELINE_ROWS = 2048
_DISTANCE_ROWS = 2048


def train_proxy(
    latents: Tensor | RewardDataset,
    rewards: Rewards | Preferences | Mapping[str, Preferences] | None = None,
    prompts: Prompts | None = None,
    *,
    latent_space: str | None = None,
    config: ProxyConfig | None = None,
    encode: PromptEncoder | None = None,
) -> RewardProxy:
    """Fit a proxy that predicts rewards from latents.

    Args:
        latents: ``[N, C, F, H, W]``, or a dataset (then without ``prompts``, and ``rewards`` only as preferences).
        rewards: ``[N]`` (named "reward"), ``[N, R]`` ("reward_0", ...) or ``{name: [N]}``; NaN: does not apply. Or
            :class:`Preferences` (named "preference") or ``{name: Preferences}``: the proxy then returns a score whose
            unit :mod:`latent_rewards.proxies.duels` states, and ``proxy.compare`` probabilities.
        prompts: N texts, embeddings ``[N, D]`` or ``[N, L, D]`` (zeros are padding), or None.
        latent_space: fingerprint of the codec; a dataset brings its own.
        config: settings; None takes the defaults, with "bradley_terry" for preferences.
        encode: N texts -> embeddings, best those the policy was trained with: they know which words mean the same,
            which hashed words (the default) do not. Per token they take ``4 N L D`` bytes, pooled ones ``4 N D``.

    Returns:
        The proxy, with its ``report``. On one CPU build and number of threads, the same data and seed give the same
        proxy bit for bit.

    Raises:
        DataError: the data cannot be used: NaN latents, infinite or constant rewards, too few samples, wrong shapes;
            pairs that compare different prompts, or only ties.
        ConfigError: the objective is one of scores and the rewards are preferences, or the other way round.
    """
    named = name_preferences(rewards)
    config = config or ProxyConfig(objective="mse" if named is None else "bradley_terry")
    check_objective(config.objective, named is not None)
    if named is not None:
        return _train_on_preferences(latents, *named, prompts, latent_space, config, encode)
    rewards = cast(Rewards | None, rewards)
    samples = gather_samples(latents, rewards, prompts, latent_space=latent_space, use_prompts=config.use_prompts)
    check_trainable(samples, config.min_samples)
    training, heldout = split_samples(samples, config.holdout_fraction, config.seed)
    num_folds = 10 if len(training) >= _SMALL else 5
    folds = split_folds(training, group_ids(samples.prompts, len(samples)), num_folds, config.seed)

    proxy = _make_proxy(config, samples, encode)
    set_scales(proxy, samples, training)
    proxy.to(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    reader = Reader(proxy, samples)
    if proxy.is_linear:
        fit_linear(proxy, reader, training, folds == 0)
    else:
        fit_members(proxy, reader, training, folds)
    settle(proxy, reader, training, heldout)

    predicted, variance = reader.ensemble(heldout)
    ridge = predicted if proxy.is_linear else _baseline(reader, training, folds == 0, heldout)
    coverage = crossfit_coverage(predicted - reader.targets(heldout).cpu(), variance)
    centre, scale = proxy.reward_mean.cpu(), proxy.reward_std.cpu()
    num_train = (~samples.rewards[training].isnan()).sum(dim=0)
    proxy.report = evaluate(
        proxy.reward_names,
        predicted * scale + centre,
        ridge * scale + centre,
        samples.rewards[heldout],
        coverage,
        num_train,
    )
    return proxy


def _train_on_preferences(
    latents: Tensor | RewardDataset,
    name: str,
    preferences: Preferences,
    prompts: Prompts | None,
    latent_space: str | None,
    config: ProxyConfig,
    encode: PromptEncoder | None,
) -> RewardProxy:
    from latent_rewards.proxies.duels import fit_preferences

    unknown = None if isinstance(latents, RewardDataset) else torch.full((len(latents),), math.nan)
    samples = gather_samples(latents, unknown, prompts, latent_space=latent_space)
    ids = None if samples.prompts is None else prompt_ids(samples.prompts)
    check_preferences(preferences, len(samples), ids, config.min_samples)
    samples = replace(
        samples,
        rewards=torch.full((len(samples), 1), math.nan, dtype=torch.float64),
        reward_names=(name,),
        metric_fingerprints={},
        prompts=samples.prompts if config.use_prompts else None,
    )
    proxy = _make_proxy(config, samples, encode)
    set_scales(proxy, samples, preferences.pairs.unique())
    proxy.reward_mean.zero_()
    proxy.reward_std.fill_(1.0)
    proxy.to(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    reader = Reader(proxy, samples)
    training, heldout = fit_preferences(proxy, reader, preferences, ids)
    settle(proxy, reader, training, heldout)
    return proxy


def _make_proxy(config: ProxyConfig, samples: Samples, encode: PromptEncoder | None) -> RewardProxy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "proxy/init", 0))
        return RewardProxy(
            config,
            samples.latent_shape,
            samples.reward_names,
            PromptFeatures.infer(samples.prompts, config.text_features, encode),
            latent_space=samples.latent_space,
            metric_fingerprints=samples.metric_fingerprints,
            encode=encode,
        )


def set_scales(proxy: RewardProxy, samples: Samples, training: Tensor) -> None:
    """Set the means and scales of latents, prompts and rewards from the training samples.

    The linear proxy keeps latents and prompts as they are, so that its penalty is scikit-learn's.
    """
    values = samples.rewards[training]
    mean = values.nanmean(dim=0)
    proxy.reward_mean.copy_(mean)
    proxy.reward_std.copy_((values - mean).square().nanmean(dim=0).sqrt())
    if proxy.is_linear:
        return
    order = torch.randperm(len(training), generator=generator(proxy.config.seed, "proxy/scales", 0))
    rows = training[order[:_STATISTICS_ROWS]]
    total, squares = torch.zeros(2, samples.latent_shape[0], dtype=torch.float64)
    for chunk in rows.split(_CHUNK):
        latents = samples.latents(chunk).double().cpu()
        total += latents.mean(dim=(2, 3, 4)).sum(dim=0)
        squares += latents.square().mean(dim=(2, 3, 4)).sum(dim=0)
    latent_mean = total / len(rows)
    spread = (squares / len(rows) - latent_mean**2).clamp(min=0).sqrt()
    proxy.latent_mean.copy_(latent_mean[:, None, None, None])
    proxy.latent_std.copy_(spread.clamp(min=1e-6 * float(spread.max()) + 1e-12)[:, None, None, None])
    prompts = proxy.raw_prompts(samples.prompts, len(samples))
    if prompts is not None:
        chosen = prompts[rows.to(prompts.device)].double().cpu()
        if chosen.ndim == 3:
            chosen = chosen[real_tokens(chosen)]
        centred = chosen - chosen.mean(dim=0)
        proxy.prompt_mean.copy_(chosen.mean(dim=0))
        proxy.prompt_scale.copy_(1 / centred.square().mean().sqrt().clamp(min=1e-6))


def fit_linear(proxy: RewardProxy, reader: Reader, training: Tensor, validation: Tensor) -> None:
    """Fit the ridge regression of a linear proxy on all of ``training``.

    Args:
        proxy: a linear one.
        reader: reads the samples.
        training: int64 ``[n]``.
        validation: bool ``[n]``, the samples that choose the penalty if the config names none.
    """
    features = reader.map(linear_features, training)
    weight, intercept = fit_ridge(features, reader.targets(training), proxy.config.ridge_alpha, validation)
    member = cast(LinearMember, proxy.members[0])
    member.weight.copy_(weight)
    member.intercept.copy_(intercept)


def _baseline(reader: Reader, training: Tensor, validation: Tensor, heldout: Tensor) -> Tensor:
    """Return a ridge regression's predictions ``[n, R]`` for ``heldout``, fitted on at most 2,048 training samples."""
    every = -(-len(training) // _BASELINE_ROWS)
    rows, validation = training[::every], validation[::every]
    weight, intercept = fit_ridge(reader.map(linear_features, rows), reader.targets(rows), None, validation)
    return (reader.map(linear_features, heldout).double() @ weight + intercept).to(weight).cpu()


def settle(proxy: RewardProxy, reader: Reader, training: Tensor, heldout: Tensor) -> None:
    """Set the calibration and the out-of-distribution score from ``heldout`` samples."""
    mean, variance = reader.ensemble(heldout)
    proxy.calibration.fit(mean - reader.targets(heldout).cpu(), variance)
    order = torch.randperm(len(training), generator=generator(proxy.config.seed, "proxy/distance", 0))
    features = reader.map(proxy.distance_features, training[order[:_DISTANCE_ROWS]])
    proxy.distance.fit(features, reader.map(proxy.distance_features, heldout))
