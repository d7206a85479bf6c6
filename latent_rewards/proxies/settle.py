"""What held-out samples set in a fitted proxy: its calibration, and what it takes for strange."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rewards.proxies.calibration import calibrate
from latent_rewards.proxies.ensemble import Reader
from latent_rewards.proxies.proxy import RewardProxy
from latent_rewards.training.randomness import generator

_DISTANCE_ROWS = 2048
_REFERENCE_ROWS = 4096


def settle(proxy: RewardProxy, reader: Reader, training: Tensor, heldout: Tensor, halves: Tensor | None = None) -> None:
    """Set the calibration and the out-of-distribution score from ``heldout`` samples; ``halves`` cross-fit the mean."""
    mean, variance = reader.ensemble(heldout)
    if halves is None:
        halves = torch.arange(len(heldout)) % 2 == 0
    calibrate(proxy.calibration, proxy.monotone, mean, variance, reader.targets(heldout).cpu(), halves)
    if proxy.noise is not None:
        moments = [reader.at(level).ensemble(heldout) for level in proxy.noise.levels.tolist()]
        device = proxy.reward_mean.device
        proxy.noise.fit(
            [level[0] - reader.targets(heldout).cpu() for level in moments],
            [proxy.calibration(level[1].to(device)).cpu() for level in moments],
        )
    settle_strangeness(proxy, reader, training, heldout, variance)


def settle_strangeness(
    proxy: RewardProxy, reader: Reader, training: Tensor, heldout: Tensor, variance: Tensor | None = None
) -> None:
    """Set the out-of-distribution score from ``heldout`` samples and the variance of the members' outputs on them."""
    if variance is None:
        variance = reader.ensemble(heldout)[1]
    order = torch.randperm(len(training), generator=generator(proxy.config.seed, "proxy/distance", 0))
    features = reader.map(proxy.distance_features, training[order[:_DISTANCE_ROWS]])
    if len(heldout) > _REFERENCE_ROWS:  # enough for the quantiles the score is made of
        chosen = torch.randperm(len(heldout), generator=generator(proxy.config.seed, "proxy/reference", 0))
        heldout, variance = heldout[chosen[:_REFERENCE_ROWS]], variance[chosen[:_REFERENCE_ROWS]]
    reference = reader.map(proxy.distance_features, heldout)
    proxy.distance.fit(features, reference)
    distance = proxy.distance.distance(reference)
    disagreement = variance.mean(dim=1).to(distance) if len(proxy.members) > 1 else None
    proxy.ood_score.fit(distance, disagreement)
