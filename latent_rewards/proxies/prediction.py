"""What a proxy says of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latent_rewards.contracts import DataError, check_latents
from latent_rewards.dataset import RewardDataset
from latent_rewards.proxies.conformal import level_index
from latent_rewards.proxies.features import latent_statistics
from latent_rewards.proxies.members import combine_and_describe
from latent_rewards.proxies.text import Prompts
from latent_rewards.proxies.trunks.tiny_decoder import TinyDecoder

if TYPE_CHECKING:
    from latent_rewards.proxies.proxy import RewardProxy

_MOST_SAMPLES, _NUMBERS_ON_CPU, _NUMBERS_ELSEWHERE = 128, 5 * 2**14, 2**23
"""Samples, and latent numbers, that are read at once: on a CPU few, which stay in its caches and are small."""

_JUDGED = 2
"""Twice as many drawn clips are judged at once: what there is to see in one is far less than its frames."""


@dataclass(frozen=True)
class ProxyPrediction:
    """What a proxy says of B samples, each ``{reward name: [B]}``.

    Attributes:
        mean: predicted reward, in the metric's units.
        std: its calibrated standard deviation (see :mod:`latent_rewards.proxies.calibration`).
        ood: in [0, 1], how far the latents lie from the training data (see :mod:`latent_rewards.proxies.ood`); a
            property of the latents and prompts, so it is the same for every reward.
        ratios: ``{reward name: [999]}``, the held-out quantiles of ``|error| / std`` at levels k/1000.
    """

    mean: dict[str, Tensor]
    std: dict[str, Tensor]
    ood: dict[str, Tensor]
    ratios: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def interval(self, level: float = 0.9) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the ends ``{reward name: [B]}``, low and high, of split-conformal intervals (Vovk et al. 2005).

        On samples exchangeable with the n held-out ones they cover with at least probability ``level``, up to
        fitting two numbers of the standard deviation on the same n; a level above n / (n + 1) gives infinite ends.
        Networks that learnt from those n since (``ProxyConfig.refit_fraction``) err less and agree more than they did
        then, so the probability is about ``level`` only, and can be lower with few labels; with a ``refit_fraction`` of
        0 it holds.

        Raises:
            ConfigError: ``level`` lies outside (0, 0.999].
            DataError: the prediction has no ``ratios``.
        """
        index = level_index(level)
        if set(self.ratios) != set(self.mean):
            raise DataError("this prediction has no ratios of a proxy's calibration; make it by RewardProxy.predict")
        widths = {name: self.ratios[name][index - 1].to(std) * std for name, std in self.std.items()}
        low = {name: mean - widths[name] for name, mean in self.mean.items()}
        return low, {name: mean + widths[name] for name, mean in self.mean.items()}


def predict(
    proxy: RewardProxy, latents: Tensor | RewardDataset, prompts: Prompts | None, t: Tensor | float | None
) -> ProxyPrediction:
    """Return what ``proxy`` says of the latents; see :meth:`latent_rewards.proxies.proxy.RewardProxy.predict`."""
    if isinstance(latents, RewardDataset):
        proxy.check_latent_space(latents.latent_space)
        if prompts is not None:
            raise DataError("a RewardDataset brings its own prompts; pass them only with a latents tensor")
        prompts = latents.prompts
    else:
        check_latents(latents)
    levels = proxy.read_time(t, len(latents))
    features = proxy.raw_prompts(prompts, len(latents))
    # Made before the chunks, between whose large tensors small ones that stay would keep the heap from closing up.
    mean, variance = proxy.reward_mean.new_empty(2, len(latents), len(proxy.reward_names))
    distance = proxy.distance.mean.new_empty(len(latents))
    at_once = _at_once(proxy, latents)
    for rows in _spans(slice(0, len(latents)), at_once * (_JUDGED if isinstance(proxy.shared, TinyDecoder) else 1)):
        read = None if features is None else proxy.scale_prompts(features[rows])
        level = [values[rows] for values in levels]
        mean[rows], variance[rows], distance[rows] = _judge(proxy, latents, _spans(rows, at_once), read, level)
    dtype = torch.promote_types(torch.float32, latents.dtype)
    std = proxy.deviation(variance, *levels) * proxy.reward_std
    ood = _ood(proxy, distance, variance).to(dtype)
    return ProxyPrediction(
        proxy.by_name((proxy.correct(mean) * proxy.reward_std + proxy.reward_mean).to(dtype)),
        proxy.by_name(std.to(dtype)),
        {name: ood for name in proxy.reward_names},
        dict(zip(proxy.reward_names, proxy.calibration.ratios.clone(), strict=True)),
    )


def _at_once(proxy: RewardProxy, latents: Tensor | RewardDataset) -> int:
    shape = latents.latent_shape if isinstance(latents, RewardDataset) else latents.shape[1:]
    numbers = _NUMBERS_ON_CPU if proxy.reward_mean.device.type == "cpu" else _NUMBERS_ELSEWHERE
    return min(_MOST_SAMPLES, max(1, numbers // max(1, math.prod(shape))))


def _spans(rows: slice, most: int) -> list[slice]:
    """Return slices of at most ``most`` of ``rows``, of sizes as equal as can be: what is made for a size is kept."""
    count = rows.stop - rows.start
    size = math.ceil(count / math.ceil(count / most)) if count else 1
    return [slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]


def _judge(
    proxy: RewardProxy,
    latents: Tensor | RewardDataset,
    spans: list[slice],
    prompts: Tensor | None,
    level: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and variance ``[n, R]`` and distance ``[n]`` of the latents at ``spans``, which are read in turn."""
    # Faster, but a foreign backbone may keep tensors of the first call, and could not be trained with them later.
    ours = isinstance(proxy.shared, TinyDecoder)
    with torch.inference_mode() if ours else torch.no_grad():
        parts = [_read(proxy, latents, part, prompts, level, spans[0].start) for part in spans]
        seen, statistics = (torch.cat(each) if len(parts) > 1 else each[0] for each in zip(*parts, strict=True))
        del parts
        mean, variance, described = combine_and_describe(proxy, statistics, (seen, prompts, *level))
        return mean, variance, proxy.distance.distance(described)


def _read(
    proxy: RewardProxy,
    latents: Tensor | RewardDataset,
    rows: slice,
    prompts: Tensor | None,
    level: list[Tensor],
    first: int,
) -> tuple[Tensor, Tensor]:
    """Return what the members read of the latents at ``rows``, and statistics; the others begin at row ``first``."""
    if isinstance(latents, RewardDataset):
        normalised = proxy.normalise(check_latents(latents.latents(range(rows.start, rows.stop))))
    else:
        normalised = proxy.normalise(latents[rows])
    own = slice(rows.start - first, rows.stop - first)
    read = None if prompts is None else prompts[own]
    statistics = latent_statistics(normalised)
    return proxy.member_inputs(normalised, read, *(values[own] for values in level))[0], statistics


def _ood(proxy: RewardProxy, distance: Tensor, variance: Tensor) -> Tensor:
    if not int(proxy.ood_score.count):  # stored before disagreement was a part of it
        return proxy.distance.rank(distance)
    return proxy.ood_score(distance, variance.mean(dim=1))
