"""The last updates of a proxy: all members learn from all samples, those held out too.

What is held out says how good a proxy is and calibrates it. After that it is worth more as labels, as are the samples
on which members stopped early: of 1,024 digits a member has seen 783. Report and calibration stay those of before, so
they tell of a proxy that knew less, and err on the safe side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rewards.proxies.ensemble import Reader
from latent_rewards.proxies.joint import continue_training
from latent_rewards.proxies.proxy import RewardProxy
from latent_rewards.proxies.settle import settle_strangeness
from latent_rewards.training.randomness import generator

LEARNING_RATE_FACTOR = 0.5
"""Peak learning rate of these updates in units of the config's."""

LEARNT_HELDOUT = (
    "In the end the networks learnt from the held-out samples too: the numbers tell of them before, when they knew "
    "less, and could not be measured again."
)


def learnt_heldout(proxy: RewardProxy) -> bool:
    """Return whether ``proxy`` is of the kind that learns from held-out samples in the end."""
    return not (proxy.is_linear or proxy.judgement or not proxy.config.refit_fraction)


def refit(proxy: RewardProxy, reader: Reader, training: Tensor, heldout: Tensor) -> None:
    """Continue training ``proxy``, fitted and assessed, on all samples for ``refit_fraction`` of its updates.

    Where its features moved to is learnt from the training samples anew, and what distance is usual from the held-out
    ones; how much members may disagree stays what it was while they had not seen them.

    Args:
        proxy: is changed in place; one solved in closed form is left as it is.
        reader: reads the samples.
        training: int64 ``[n]``.
        heldout: int64 ``[m]``.
    """
    config = proxy.config
    rows = torch.cat([training, heldout]).sort().values
    count = round(config.refit_fraction * config.updates(len(rows)))
    if not learnt_heldout(proxy) or not count:
        return
    _, variance = reader.ensemble(heldout)
    continue_training(
        proxy,
        reader,
        lambda source: reader.batches(rows, config.batch_size, count, source),
        lambda member: generator(config.seed, "proxy/refit", 0, member),
        rate=LEARNING_RATE_FACTOR,
        redraw=False,
    )
    settle_strangeness(proxy, reader, training, heldout, variance)
