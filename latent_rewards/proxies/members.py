"""The members of a proxy: what the registry's trunk and the settings make of them."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from latent_rewards.contracts import ConfigError
from latent_rewards.proxies.config import ProxyConfig
from latent_rewards.proxies.features import latent_statistics, linear_features
from latent_rewards.proxies.heads import NetworkMember, SeparateMember
from latent_rewards.proxies.linear import LinearMember
from latent_rewards.proxies.objectives import num_outputs, split_outputs
from latent_rewards.proxies.text import PromptFeatures, real_tokens
from latent_rewards.proxies.trunks import AUTO, trunk_kind
from latent_rewards.proxies.trunks.backbone import VideoBackbone
from latent_rewards.proxies.trunks.pixels import look
from latent_rewards.proxies.trunks.shared import PassThrough, SharedTrunk
from latent_rewards.proxies.trunks.tiny_decoder import TinyDecoder

Network = NetworkMember | SeparateMember

_DRAWN_ON_CPU = 5 * 2**14
"""Latent numbers that are drawn at once on a CPU: the frames take most of a proxy's memory, and are small then."""

if TYPE_CHECKING:
    from latent_rewards.proxies.proxy import RewardProxy


def make_shared(
    config: ProxyConfig,
    backbone: VideoBackbone | None,
    decoder: TinyDecoder | None,
    latent_shape: tuple[int, ...],
    prompts: PromptFeatures,
) -> SharedTrunk | TinyDecoder | None:
    """Return what the members share, or None for a trunk that reads latents; of ``decoder`` a copy.

    Raises:
        ConfigError: the trunk is "auto"; it reads a backbone (or a decoder) and there is none, or the other way round.
        DataError: the backbone cannot read such latents.
    """
    if config.trunk == AUTO:
        raise ConfigError("a proxy has one trunk; train_proxy(..., config='auto') chooses it")
    kind = trunk_kind(config.trunk)
    if kind.needs_codec != (decoder is not None):
        raise ConfigError(
            f"trunk {config.trunk!r} reads what a tiny decoder draws; pass codec= to train_proxy"
            if kind.needs_codec
            else f"trunk {config.trunk!r} reads no pixels; set trunk='pixels', or pass no codec"
        )
    if not kind.needs_backbone:
        if backbone is not None:
            raise ConfigError(f"trunk {config.trunk!r} reads no backbone; set trunk='backbone' or pass no backbone")
        return deepcopy(decoder)
    if backbone is None:
        raise ConfigError(
            f"trunk {config.trunk!r} reads a backbone; pass it, backbone=WanBackbone(transformer, ...), to train_proxy "
            "and to from_pretrained"
        )
    return SharedTrunk(backbone, latent_shape, prompts, config.adapter_rank)


def make_members(
    config: ProxyConfig,
    latent_shape: tuple[int, ...],
    prompts: PromptFeatures,
    num_rewards: int,
    shared: SharedTrunk | TinyDecoder | None,
) -> list[nn.Module]:
    """Return one ridge regression, or ``config.ensemble_size`` networks."""
    if trunk_kind(config.trunk).closed_form:
        shape = (shared.num_features, 1, 1, 1) if isinstance(shared, SharedTrunk) else latent_shape
        size = linear_features(torch.zeros(1, *shape), torch.zeros(1, prompts.dim)).shape[1]
        return [LinearMember(size, num_rewards)]
    build = trunk_kind(config.trunk).build
    if isinstance(shared, SharedTrunk):
        num_features = shared.num_features

        def build(*_: Any) -> nn.Module:  # noqa: ANN401
            return PassThrough(num_features)

    def network(rewards: int) -> NetworkMember:
        return NetworkMember(
            latent_shape,
            prompts,
            num_outputs(config.objective, rewards),
            width=config.width,
            depth=config.blocks,
            make_trunk=cast(Any, build),
            timed=config.noise_levels is not None,
        )

    if trunk_kind(config.trunk).network_per_reward and num_rewards > 1:
        return [SeparateMember([network(1) for _ in range(num_rewards)]) for _ in range(config.ensemble_size)]
    return [network(num_rewards) for _ in range(config.ensemble_size)]


def member_inputs(
    proxy: RewardProxy, latents: Tensor, prompt_features: Tensor | None, *level: Tensor
) -> tuple[Any, ...]:
    """Return what the members take for normalised latents, read prompts and, of a noisy proxy, t ``[B]``.

    With a backbone its frozen blocks run here, once for all members, on what they were trained on, latents and prompts
    before scaling; the first entry becomes their features ``[B, F', K]``, for a ridge regression ``[B, K, 1, 1, 1]``,
    their mean over frames. With a tiny decoder the first entry becomes what there is to see in the frames it draws,
    ``[B, T, 161]``.
    """
    if proxy.shared is None:
        return latents, prompt_features, *level
    if isinstance(proxy.shared, TinyDecoder):
        return _seen(proxy, proxy.shared, latents), prompt_features, *level
    tokens = prompt_features
    if tokens is not None and tokens.ndim == 3:
        tokens = (tokens / proxy.prompt_scale + proxy.prompt_mean) * real_tokens(tokens)[..., None]
    features = proxy.shared(latents * proxy.latent_std + proxy.latent_mean, tokens, *level)
    if proxy.is_linear:
        features = features.mean(dim=1)[:, :, None, None, None]
    return features, prompt_features, *level


def _seen(proxy: RewardProxy, decoder: TinyDecoder, latents: Tensor) -> Tensor:
    size = len(latents)
    if latents.device.type == "cpu" and not torch.is_grad_enabled():
        size = max(1, _DRAWN_ON_CPU // max(1, math.prod(latents.shape[1:])))
    scale = proxy.latent_mean, proxy.latent_std
    parts = [look(decoder(part, scale)) for part in latents.split(max(1, size))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def outputs_of(proxy: RewardProxy, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    """Return every member's means ``[M, B, R]``, and the mean ``[B, R]`` of the variances they predict, if any."""
    return _split(proxy, [member(*inputs) for member in proxy.members])


def _split(proxy: RewardProxy, outputs: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    means, log_variances = split_outputs(torch.stack(outputs), len(proxy.reward_names))
    return means, None if log_variances is None else log_variances.exp().mean(dim=0)


def combine(proxy: RewardProxy, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Return mean and variance ``[B, R]`` of the members' outputs.

    With the "gaussian" objective the variance is that of the members' mixture (Lakshminarayanan et al. 2017): their
    disagreement plus the mean of the variances they predict.
    """
    return _moments(proxy, *outputs_of(proxy, inputs))


def combine_and_describe(
    proxy: RewardProxy, statistics: Tensor, inputs: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`combine` and :func:`describe` return; the first member's trunk, which both need, runs once.

    Args:
        proxy: whose members.
        statistics: :func:`~latent_rewards.proxies.features.latent_statistics` ``[B, 3 C]`` of the normalised latents.
        inputs: what :func:`member_inputs` made of them.
    """
    first = proxy.members[0]
    if isinstance(first, LinearMember):
        return *combine(proxy, inputs), statistics
    judged, features = cast(Network, first).judge(*inputs)
    outputs = [judged, *(member(*inputs) for member in list(proxy.members)[1:])]
    return *_moments(proxy, *_split(proxy, outputs)), _description(statistics, features)


def _moments(proxy: RewardProxy, means: Tensor, predicted: Tensor | None) -> tuple[Tensor, Tensor]:
    mean = means.mean(dim=0)
    variance = (means - mean).square().sum(dim=0) / max(1, len(means) - 1)
    if predicted is not None and proxy.config.objective == "gaussian":
        variance = variance + predicted
    return mean, variance


def describe(member: nn.Module, latents: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    """Return ``[B, K]``: statistics of the latents, and the frame mean of a network's trunk features for ``inputs``."""
    statistics = latent_statistics(latents)
    if isinstance(member, LinearMember):
        return statistics
    return _description(statistics, cast(Network, member).judge(*inputs)[1])


def _description(statistics: Tensor, features: Tensor) -> Tensor:
    return torch.cat([statistics, features.mean(dim=1)], dim=1)


def description_size(member: nn.Module, channels: int) -> int:
    """Return K of :func:`describe`."""
    return 3 * channels + (0 if isinstance(member, LinearMember) else cast(Network, member).num_features)
