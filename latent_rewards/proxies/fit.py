"""Training a reward proxy: check, split, fit each member, calibrate, report, refit.

A held-out part of the data (``holdout_fraction``) is kept for calibration and report, before which it chooses no
weight. Each member leaves out another tenth of the rest (a fifth of small data), on which it stops early; with another
initialisation and batch order this is what makes the members disagree. In the end all learn from all of it
(:mod:`latent_rewards.proxies.refit`). Targets are standardised; an unknown (NaN) reward has no weight in the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from latent_rewards.contracts import Codec, ConfigError
from latent_rewards.dataset import RewardDataset
from latent_rewards.proxies.assess import add_learning_curves, assess
from latent_rewards.proxies.buckets import gather_buckets
from latent_rewards.proxies.config import ProxyConfig
from latent_rewards.proxies.distil_decoder import distil_decoder
from latent_rewards.proxies.ensemble import Reader, fit_members
from latent_rewards.proxies.features import linear_features
from latent_rewards.proxies.held import Given
from latent_rewards.proxies.heldout import halve, heldout_prompts
from latent_rewards.proxies.joint import fit_jointly, set_feature_scales
from latent_rewards.proxies.learning_curve import nested_parts
from latent_rewards.proxies.linear import LinearMember, fit_ridge
from latent_rewards.proxies.noise import Schedule
from latent_rewards.proxies.objectives import check_objective
from latent_rewards.proxies.preferences import Preferences, check_preferences, name_preferences
from latent_rewards.proxies.prompt_table import PromptTable
from latent_rewards.proxies.proxy import RewardProxy
from latent_rewards.proxies.refit import refit
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
from latent_rewards.proxies.selection import choose_trunk, remember
from latent_rewards.proxies.settle import settle
from latent_rewards.proxies.text import PromptEncoder, PromptFeatures, Prompts, real_tokens
from latent_rewards.proxies.trunks import AUTO, trunk_kind
from latent_rewards.proxies.trunks.backbone import VideoBackbone
from latent_rewards.training.devices import choose_device
from latent_rewards.training.randomness import derive_seed, generator

_SMALL = 200
_CHUNK = 128
_STATISTICS_ROWS = 4096
_BASELINE_ROWS = 2048
_MIN_BASELINE = 8
_ALIKE = 1e-3  # spread of prompts, in units of their size, at which they do not differ


def train_proxy(
    latents: Tensor | RewardDataset | Sequence[Tensor | RewardDataset],
    rewards: Rewards | Sequence[Rewards] | Preferences | Mapping[str, Preferences] | None = None,
    prompts: Prompts | Sequence[Prompts] | None = None,
    *,
    latent_space: str | None = None,
    config: ProxyConfig | Literal["auto"] | None = None,
    encode: PromptEncoder | None = None,
    backbone: VideoBackbone | None = None,
    codec: Codec | None = None,
    schedule: Schedule | None = None,
) -> RewardProxy:
    """Fit a proxy that predicts rewards from latents.

    Args:
        latents: ``[N, C, F, H, W]``, or a dataset (then without ``prompts``, and ``rewards`` only as preferences). A
            list of such, one for each frame count and resolution, trains one proxy for all of them; ``rewards`` and
            ``prompts`` are lists then. Each batch comes from one of them, chosen in proportion to their sizes; the
            trunk's stride is chosen for the first.
        rewards: ``[N]`` (named "reward"), ``[N, R]`` ("reward_0", ...) or ``{name: [N]}``; NaN: does not apply. Or
            :class:`Preferences` (named "preference") or ``{name: Preferences}``: the proxy then returns a score whose
            unit :mod:`latent_rewards.proxies.duels` states, and ``proxy.compare`` probabilities.
        prompts: N texts, embeddings ``[N, D]`` or ``[N, L, D]`` (zeros are padding), or None.
        latent_space: fingerprint of the codec; a dataset brings its own.
        config: settings; None takes the defaults (with a backbone its features, with a codec "pixels"; for preferences
            "bradley_terry");
            "auto" lets cross-validation choose the trunk, see :mod:`latent_rewards.proxies.selection`;
            ``proxy.selection`` says how it chose.
        encode: N texts -> embeddings, best those the policy was trained with: they know which words mean the same,
            which hashed words (the default) do not. Per token they take ``4 N L D`` bytes, pooled ones ``4 N D``.
            None takes the backbone's, if there is one.
        backbone: the frozen video transformer that the trunks "backbone" and "backbone_linear" read, e.g. a
            :class:`latent_rewards.proxies.trunks.backbone.WanBackbone`; ``latents`` must be in its model space. It is
            not saved: give it to ``from_pretrained`` again.
        codec: for the trunk "pixels": decodes up to ``decoder_clips`` of the latents, once, from which a tiny decoder
            learns to draw them small (see :mod:`latent_rewards.proxies.distil_decoder`); it is not needed again.
        schedule: t ``[B]`` -> (alpha, sigma), for ``noise_levels``; None is rectified flow, ``(1 - t, t)``.

    Returns:
        The proxy, with its ``report`` (with ``noise_levels`` that of the lowest level, and under "noise" Spearman, R2
        and MAE at five). On one CPU build and number of threads, the same data and seed give the same proxy bit for
        bit.

    Raises:
        DataError: the data cannot be used: NaN latents, infinite or constant rewards, too few samples, wrong shapes;
            pairs that compare different prompts, or only ties.
        ConfigError: the trunk needs a backbone or codec and there is none, or the other way round; the budget of "auto"
            is too small; several shapes for the linear trunk; the objective is one of scores and the rewards are
            preferences, or the other way round.
        DeviceError: ``config.device`` cannot be used.
        FingerprintMismatchError: the datasets of a list differ in latent space or metrics, or from ``latent_space``,
            or the codec is another's.
    """
    named = name_preferences(rewards)
    config = _settings(config, backbone is not None, codec is not None, schedule is not None, named is not None)
    encode = encode if encode is not None else getattr(backbone, "embed", None)
    check_objective(config.objective, named is not None)
    choose_device(config.device)  # refused now, and not after the latents were read
    if named is not None:
        texts = cast(Prompts | None, prompts)
        return _train_on_preferences(latents, *named, texts, latent_space, config, Given(encode, backbone))
    samples = gather_buckets(
        latents,
        cast(Rewards | Sequence[Rewards] | None, rewards),
        prompts,
        linear=config.trunk == "linear",
        latent_space=latent_space,
        use_prompts=config.use_prompts,
        in_memory_bytes=config.in_memory_bytes,
    )
    samples.latent_space = samples.latent_space or getattr(codec, "fingerprint", None)
    check_trainable(samples, config.min_samples)
    training, heldout = split_samples(samples, config.holdout_fraction, config.seed)
    parts = nested_parts(samples.rewards, samples.reward_names, training, config.seed) if config.learning_curve else []
    automatic = config.trunk == AUTO
    # No trunk draws noisy latents, so there "auto" has no use for a decoder.
    decoder = None if codec is None or config.noise_levels else distil_decoder(codec, samples, training, config)

    def fitted(settings: ProxyConfig, rows: Tensor, embed: PromptEncoder | None) -> tuple[RewardProxy, Reader]:
        given = Given(embed, backbone, schedule, decoder)
        return _fit(settings, rows, samples, given.read_by(trunk_kind(settings.trunk)) if automatic else given)

    remembered = None if encode is None else remember(encode)

    def judge(settings: ProxyConfig, rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        _, reader = fitted(settings, rows, remembered)
        return reader.ensemble(others)[0], reader.targets(others).cpu()

    selection: dict[str, Any] = {}
    if automatic:
        given = {"has_backbone": backbone is not None, "has_codec": decoder is not None}
        config, selection = choose_trunk(config, samples, training, judge, **given)
    proxy, reader = fitted(config, training, encode)
    proxy.selection = selection
    settle(proxy, reader, training, heldout, halve(heldout_prompts(samples, heldout)))
    ridge = None if config.trunk == "linear" else _baseline(reader, training, heldout, config)
    assess(proxy, reader, samples, training, heldout, ridge)
    if parts:
        add_learning_curves(proxy, samples, [*parts, training], heldout, lambda rows: fitted(config, rows, remembered))
    refit(proxy, reader, training, heldout)
    return proxy


def _settings(
    config: ProxyConfig | str | None, has_backbone: bool, has_codec: bool, has_schedule: bool, preferences: bool
) -> ProxyConfig:
    if isinstance(config, str):
        if config != AUTO:
            raise ConfigError(f"config must be a ProxyConfig, None or {AUTO!r}; got {config!r}")
        config = ProxyConfig(trunk=AUTO)
    objective = "bradley_terry" if preferences else "mse"
    trunk = "backbone" if has_backbone else "pixels" if has_codec else "conv3d"
    config = config or ProxyConfig(trunk=trunk, objective=objective)
    if has_codec and config.trunk != AUTO and not trunk_kind(config.trunk).needs_codec:
        raise ConfigError(f"trunk {config.trunk!r} reads no pixels; set trunk='pixels', or pass no codec")
    if has_schedule and config.noise_levels is None:
        raise ConfigError("a schedule was given without noise levels; set ProxyConfig(noise_levels=(low, high))")
    return config


def _folds(config: ProxyConfig, samples: Samples, training: Tensor) -> Tensor:
    num_folds = 10 if len(training) >= _SMALL else 5
    return split_folds(training, group_ids(samples.prompts, len(samples)), num_folds, config.seed)


def _fit(config: ProxyConfig, training: Tensor, samples: Samples, given: Given) -> tuple[RewardProxy, Reader]:
    """Return a proxy fitted on the rows ``training``, not yet calibrated, and what reads samples for it."""
    folds = _folds(config, samples, training)
    proxy = _make_proxy(config, samples, given)
    table = PromptTable(proxy, samples.read_prompts, len(samples))
    set_scales(proxy, samples, training, table)
    proxy.to(choose_device(config.device))
    reader = Reader(proxy, samples, table)
    set_feature_scales(proxy, reader, training)
    if proxy.is_linear:
        fit_linear(proxy, reader, training, folds == 0)
    elif proxy.shared is not None:
        fit_jointly(proxy, reader, training, folds)
    else:
        fit_members(proxy, reader, training, folds)
    return proxy, reader


def _check_plain(config: ProxyConfig, latents: object) -> None:
    """Raise ConfigError for what preferences cannot be combined with."""
    default = ProxyConfig()
    chosen = [
        name
        for name in ("noise_levels", "calibrate_mean", "learning_curve")
        if getattr(config, name) != getattr(default, name)
    ]
    if config.trunk == AUTO or trunk_kind(config.trunk).needs_backbone or trunk_kind(config.trunk).needs_codec:
        chosen.insert(0, f"trunk={config.trunk!r}")
    if not isinstance(latents, Tensor | RewardDataset):
        chosen.insert(0, "a list of latents")
    if chosen:
        raise ConfigError(
            f"preferences cannot be combined with {', '.join(chosen)}; give latents of one size, a trunk that reads "
            "them, and leave the others at their defaults"
        )


def _train_on_preferences(
    latents: object,
    name: str,
    preferences: Preferences,
    prompts: Prompts | None,
    latent_space: str | None,
    config: ProxyConfig,
    given: Given,
) -> RewardProxy:
    from latent_rewards.proxies.duels import fit_preferences

    _check_plain(config, latents)
    source = cast(Tensor | RewardDataset, latents)
    unknown = None if isinstance(source, RewardDataset) else torch.full((len(source),), math.nan)
    samples = gather_samples(
        source,
        unknown,
        prompts,
        latent_space=latent_space,
        use_prompts=config.use_prompts,
        in_memory_bytes=config.in_memory_bytes,
    )
    ids = prompt_ids(samples.prompts)
    check_preferences(preferences, len(samples), ids, config.min_samples)
    samples = replace(
        samples,
        rewards=torch.full((len(samples), 1), math.nan, dtype=torch.float64),
        reward_names=(name,),
        metric_fingerprints={},
    )
    proxy = _make_proxy(config, samples, given)
    table = PromptTable(proxy, samples.read_prompts, len(samples))
    set_scales(proxy, samples, preferences.pairs.unique(), table)
    proxy.reward_mean.zero_()
    proxy.reward_std.fill_(1.0)
    proxy.to(choose_device(config.device))
    reader = Reader(proxy, samples, table)
    training, heldout = fit_preferences(proxy, reader, preferences, ids)
    settle(proxy, reader, training, heldout)
    return proxy


def _make_proxy(config: ProxyConfig, samples: Samples, given: Given) -> RewardProxy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "proxy/init", 0))
        proxy = RewardProxy(
            config,
            samples.latent_shape,
            samples.reward_names,
            PromptFeatures.infer(samples.read_prompts, config.text_features, given.encode),
            latent_shapes=samples.latent_shapes,
            latent_space=samples.latent_space,
            metric_fingerprints=samples.metric_fingerprints,
            encode=given.encode,
            backbone=given.backbone,
            decoder=given.decoder,
            schedule=given.schedule,
        )
    for shape in samples.latent_shapes:
        proxy.check_shape((1, *shape))
    return proxy


def set_scales(proxy: RewardProxy, samples: Samples, training: Tensor, table: PromptTable) -> None:
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
    for _, chunk in samples.chunks(rows, _CHUNK):
        latents = samples.latents(chunk).double().cpu()
        total += latents.mean(dim=(2, 3, 4)).sum(dim=0)
        squares += latents.square().mean(dim=(2, 3, 4)).sum(dim=0)
    latent_mean = total / len(rows)
    spread = (squares / len(rows) - latent_mean**2).clamp(min=0).sqrt()
    proxy.latent_mean.copy_(latent_mean[:, None, None, None])
    proxy.latent_std.copy_(spread.clamp(min=1e-6 * float(spread.max()) + 1e-12)[:, None, None, None])
    chosen = table(rows)
    if chosen is not None:
        _set_prompt_scale(proxy, chosen.double().cpu())


def _set_prompt_scale(proxy: RewardProxy, chosen: Tensor) -> None:
    tokens = chosen.ndim == 3
    if tokens:
        chosen = chosen[real_tokens(chosen)]
    mean = chosen.mean(dim=0)
    spread, size = (values.square().mean().sqrt() for values in (chosen - mean, chosen))
    if spread <= _ALIKE * size:
        # Of other prompts nothing is known: they are read as these. A backbone wants its tokens back, though.
        spread = size if tokens else torch.tensor(math.inf)
    proxy.prompt_mean.copy_(mean)
    proxy.prompt_scale.copy_(1 / spread)


def fit_linear(proxy: RewardProxy, reader: Reader, training: Tensor, validation: Tensor) -> None:
    """Fit the ridge regression of a linear proxy on all of ``training``.

    Args:
        proxy: a linear one.
        reader: reads the samples.
        training: int64 ``[n]``.
        validation: bool ``[n]``, the samples that choose the penalty if the config names none.
    """
    features = reader.map(lambda *inputs: linear_features(*proxy.member_inputs(*inputs)[:2]), training)
    weight, intercept = fit_ridge(features, reader.targets(training), proxy.config.ridge_alpha, validation)
    member = cast(LinearMember, proxy.members[0])
    member.weight.copy_(weight)
    member.intercept.copy_(intercept)


def _baseline(reader: Reader, training: Tensor, heldout: Tensor, config: ProxyConfig) -> Tensor:
    """Return a ridge regression's predictions ``[n, R]`` for ``heldout``, fitted on at most 2,048 training samples.

    Each bucket has a regression of its own. A reward that fewer than 8 of a bucket's samples have is predicted by its
    mean over all there.
    """
    every = -(-len(training) // _BASELINE_ROWS)
    rows, validation = training[::every], _folds(config, reader.samples, training)[::every] == 0
    targets = reader.targets(rows)
    predicted = torch.zeros(len(heldout), targets.shape[1], dtype=torch.float64)
    owners, owners_heldout = reader.samples.buckets(rows), reader.samples.buckets(heldout)
    for bucket in owners_heldout.unique().tolist():
        mine, asked = owners == bucket, owners_heldout == bucket
        here = targets[mine.to(targets.device)]
        columns = ((~here.isnan()).sum(dim=0) >= _MIN_BASELINE).nonzero()[:, 0]
        if not len(columns):
            continue
        features = reader.map(_plain_features, rows[mine])
        weight, intercept = fit_ridge(features, here[:, columns], None, validation[mine])
        values = reader.map(_ridge_of(weight, intercept), heldout[asked]).cpu()
        predicted[asked.nonzero(), columns.cpu()] = values
    return predicted


def _ridge_of(weight: Tensor, intercept: Tensor) -> Callable[..., Tensor]:
    return lambda *inputs: _plain_features(*inputs).double() @ weight + intercept


def _plain_features(latents: Tensor, prompt_features: Tensor | None, *level: Tensor) -> Tensor:
    return linear_features(latents, prompt_features)
