"""Which candidates to score with the true metrics next, when only some of them can be.

The strategies, of which a proxy that is optimised against needs more than one:

- ``"uncertain"``: the largest calibrated standard deviation, in units of each reward's spread, averaged over rewards.
- ``"top"``: the highest predicted reward. A policy that climbs the proxy goes there, so an error there costs most.
- ``"diverse"``: D^2 sampling, the seeding of k-means++ (Arthur & Vassilvitskii 2007; for acquisition Ash et al. 2020),
  on the features that the out-of-distribution score looks at, each standardised over the candidates.
- ``"random"``: uniform, without replacement. The only one whose samples tell how good the proxy is.
- ``"mixed"``: a quarter of each; what does not divide by four goes to uncertain, then top, then diverse. The random
  quarter is drawn first, from all candidates, and the others choose among the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latent_rewards.contracts import ConfigError, DataError, Reward, check_latents, unknown_name
from latent_rewards.training.randomness import derive_seed, generator

if TYPE_CHECKING:
    from latent_rewards.proxies.proxy import ProxyPrediction, RewardProxy
    from latent_rewards.proxies.text import Prompts

STRATEGIES = ("mixed", "uncertain", "top", "diverse", "random")
_CHUNK = 128


def acquire(
    proxy: RewardProxy,
    latents: Tensor,
    k: int,
    prompts: Prompts | None = None,
    *,
    strategy: str = "mixed",
    seed: int = 0,
    reward: Reward | None = None,
) -> Tensor:
    """Choose ``k`` of N candidates, without repeats.

    Args:
        proxy: judges them.
        latents: ``[N, C, F, H, W]``.
        k: how many, in [1, N].
        prompts: N, for a proxy that reads prompts.
        strategy: one of :data:`STRATEGIES`, see the module.
        seed: of "random", "diverse" and "mixed"; the same arguments give the same choice.
        reward: predicted means ``{name: [N]}`` -> ``[N]``, what "top" looks for; None takes the mean over rewards, each
            in units of its spread. A candidate for which it is NaN comes last.

    Returns:
        int64 ``[k]`` on the CPU, in the order of choice: the most uncertain, or highest, first.

    Raises:
        ConfigError: an unknown strategy, or ``k`` is not an integer of at least 1.
        DataError: fewer than ``k`` candidates; latents or prompts the proxy cannot read.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(unknown_name("acquisition strategy", strategy, STRATEGIES))
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ConfigError(f"k must be an integer of at least 1; got {k!r}")
    count = len(check_latents(latents))
    if k > count:
        raise DataError(f"{k} of {count} candidates cannot be chosen; give more candidates or a smaller k")
    mixed = {"random": k // 4, "uncertain": (k + 3) // 4, "top": (k + 2) // 4, "diverse": (k + 1) // 4}
    quotas = mixed if strategy == "mixed" else {strategy: k}
    prediction = proxy.predict(latents, prompts) if {"uncertain", "top"} & set(quotas) else None
    left, chosen = torch.arange(count), []
    for name, quota in quotas.items():
        if not quota:
            continue
        if name == "random":
            picked = torch.randperm(len(left), generator=generator(seed, "proxy/acquire", 0))[:quota]
        elif name == "diverse":
            rows = candidate_features(proxy, latents, prompts)[left]
            picked = spread_out(rows, quota, seed)
        else:
            assert prediction is not None  # noqa: S101 - these two strategies asked for it
            scores = _uncertainty(proxy, prediction) if name == "uncertain" else _value(proxy, prediction, reward)
            picked = scores[left].sort(descending=True, stable=True).indices[:quota]
        chosen.append(left[picked])
        left = left[~torch.isin(left, chosen[-1])]
    return torch.cat(chosen)


def _uncertainty(proxy: RewardProxy, prediction: ProxyPrediction) -> Tensor:
    spread = proxy.reward_std.cpu().double()
    columns = torch.stack([prediction.std[name].cpu().double() for name in proxy.reward_names], dim=1)
    return (columns / spread).mean(dim=1)


def _value(proxy: RewardProxy, prediction: ProxyPrediction, reward: Reward | None) -> Tensor:
    if reward is None:
        columns = torch.stack([prediction.mean[name].cpu().double() for name in proxy.reward_names], dim=1)
        values = ((columns - proxy.reward_mean.cpu()) / proxy.reward_std.cpu()).mean(dim=1)
    else:
        values = reward(prediction.mean).detach().cpu().double()
    return torch.where(values.isnan(), -torch.inf, values)


@torch.no_grad()
def candidate_features(proxy: RewardProxy, latents: Tensor, prompts: Prompts | None) -> Tensor:
    """Return float64 ``[N, K]``, what the out-of-distribution score looks at, each column of unit variance.

    Raises:
        DataError: latents or prompts the proxy cannot read.
    """
    read, level = proxy.read_prompts(prompts, len(latents)), proxy.read_time(None, len(latents))
    parts = []
    for start in range(0, len(latents), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        times = [t[chunk] for t in level]
        features = proxy.distance_features(
            proxy.normalise(latents[chunk]), None if read is None else read[chunk], *times
        )
        parts.append(features.cpu().double())
    features = torch.cat(parts)
    return (features - features.mean(dim=0)) / features.std(dim=0, unbiased=False).clamp(min=1e-12)


def spread_out(rows: Tensor, k: int, seed: int) -> Tensor:
    """Return int64 ``[k]``, indices of rows ``[n, K]`` drawn by D^2 sampling, without repeats.

    Where there are fewer than ``k`` distinct rows the rest is drawn at random.
    """
    from sklearn.cluster import kmeans_plusplus

    state = derive_seed(seed, "proxy/acquire/spread", 0) % 2**32
    _, drawn = kmeans_plusplus(rows.numpy(), k, random_state=state)
    fill = torch.randperm(len(rows), generator=generator(seed, "proxy/acquire/fill", 0)).tolist()
    return torch.tensor(list(dict.fromkeys([*drawn.tolist(), *fill]))[:k])
