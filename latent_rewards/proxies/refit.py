"""The last updates of a proxy: all members learn from all samples, those held out too.

What is held out says how good a proxy is and calibrates it. After that it is worth more as labels, as are the samples
on which members stopped early: of 1,024 digits a member has seen 783. Report and calibration stay those of before, and
tell of a proxy that knew less. Networks that learnt nothing that holds on other samples are left alone.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from latent_rewards.proxies.ensemble import Reader
from latent_rewards.proxies.heads import SeparateMember
from latent_rewards.proxies.joint import continue_training
from latent_rewards.proxies.proxy import RewardProxy
from latent_rewards.proxies.settle import settle_strangeness
from latent_rewards.training.randomness import generator

LEARNING_RATE_FACTOR = 0.5
"""Peak learning rate of these updates in units of the config's."""

LEARNT_HELDOUT = (
    "In the end the networks learnt from the held-out samples too, unless they had learnt nothing before (R2 not above "
    "0): the numbers tell of them before, when they knew less, and could not be measured again. Members agree more "
    "since, so with few labels intervals may be too narrow."
)


def learnt_heldout(proxy: RewardProxy) -> bool:
    """Return whether networks of ``proxy``, which was assessed, learn from held-out samples in the end, or did."""
    if proxy.is_linear or proxy.judgement or not proxy.config.refit_fraction:
        return False
    return any(_learnt(proxy))


def refit(proxy: RewardProxy, reader: Reader, training: Tensor, heldout: Tensor) -> None:
    """Continue training ``proxy``, fitted and assessed, on all samples: ``refit_fraction`` of its updates, at least 1.

    Where its features moved to is learnt from the training samples anew, and what distance is usual from the held-out
    ones; how much members may disagree stays what it was while they had not seen them.

    Args:
        proxy: is changed in place; one solved in closed form, or that learnt no reward, is left as it is.
        reader: reads the samples.
        training: int64 ``[n]``.
        heldout: int64 ``[m]``.
    """
    if not learnt_heldout(proxy):
        return
    config = proxy.config
    rows = torch.cat([training, heldout]).sort().values
    count = max(1, round(config.refit_fraction * config.updates(len(rows))))
    _, variance = reader.ensemble(heldout)
    kept = [(network, deepcopy(network.state_dict())) for network in _ignorant(proxy)]
    continue_training(
        proxy,
        reader,
        lambda source: reader.batches(rows, config.batch_size, count, source),
        lambda member: generator(config.seed, "proxy/refit", 0, member),
        rate=LEARNING_RATE_FACTOR,
        redraw=False,
    )
    for network, weights in kept:
        network.load_state_dict(weights)
    settle_strangeness(proxy, reader, training, heldout, variance)


def _ignorant(proxy: RewardProxy) -> list[nn.Module]:
    """Return the networks of rewards of which held-out samples show that nothing was learnt, an R2 not above 0.

    They would learn their labels by heart. A network that rewards share knows something if one of them was learnt.
    """
    return [
        network
        for member in proxy.members
        if isinstance(member, SeparateMember)
        for network, knows in zip(member.networks, _learnt(proxy), strict=True)
        if not knows
    ]


def _learnt(proxy: RewardProxy) -> list[bool]:
    return [proxy.report[name]["r2"] > 0 for name in proxy.reward_names]
