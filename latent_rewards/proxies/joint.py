"""Training the members that share a backbone or a tiny decoder: together, so that what is frozen runs once per batch.

The members' outputs stand side by side, and a member's targets are NaN, which weighs nothing, on the samples it leaves
out. Without adapters member m is judged on the samples of fold m, as separate members are, and where each reward has a
network of its own, that one by its own reward. Adapters learn from every member, so then fold 0 is left out by all and
judges them all, and member m leaves out another fold besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from latent_rewards.proxies.ensemble import Batch, BestWeights, Reader, train_member
from latent_rewards.proxies.heads import SeparateMember
from latent_rewards.proxies.objectives import Loss, regression_loss
from latent_rewards.proxies.proxy import RewardProxy
from latent_rewards.proxies.trunks.shared import SharedTrunk
from latent_rewards.proxies.trunks.tiny_decoder import TinyDecoder
from latent_rewards.training.randomness import generator

CONTINUED_WARMUP = 0.1
"""Part of the updates of a training that goes on in which the learning rate rises."""

_SCALE_ROWS = 512
_JUDGED_ROWS = 1024


class JointMember(nn.Module):
    """All members of a proxy as one network: ``[B, M O]``, the members' outputs side by side.

    Args:
        proxy: one whose members share something; they and its adapters become this module's parameters, the backbone
            does not.
        redraw: whether a tiny decoder's parameters do.
    """

    def __init__(self, proxy: RewardProxy, *, redraw: bool = False) -> None:
        super().__init__()
        if proxy.shared is None:
            raise TypeError("members that share nothing are trained one by one")
        self.members = proxy.members
        self.adapters = proxy.shared.adapters if isinstance(proxy.shared, SharedTrunk) else nn.ParameterDict()
        self.decoder = proxy.shared if redraw and isinstance(proxy.shared, TinyDecoder) else None
        self._inputs = proxy.member_inputs

    def forward(self, latents: Tensor, prompt_features: Tensor | None, *level: Tensor) -> Tensor:
        """Return ``[B, M O]`` for normalised latents, read prompts and, of a noisy proxy, t ``[B]``."""
        inputs = self._inputs(latents, prompt_features, *level)
        return torch.cat([member(*inputs) for member in self.members], dim=1)


class JointReader:
    """Reads batches for :class:`JointMember`.

    Args:
        reader: reads the samples.
        counted: bool ``[N, M]``, the samples each member is trained (or judged) on; None for all.
        num_members: M.
    """

    def __init__(self, reader: Reader, counted: Tensor | None, num_members: int) -> None:
        self._reader, self._counted, self._num_members = reader, counted, num_members

    def noised(self, source: torch.Generator) -> JointReader:
        """Return a reader that draws times and noise from ``source``; see :meth:`Reader.noised`."""
        reader = copy(self)
        reader._reader = self._reader.noised(source)
        return reader

    def __call__(self, indices: Tensor) -> Batch:
        """Return the batch at ``indices``, with targets ``[B, M R]``."""
        latents, prompts, _, *level = self._reader(indices)
        return latents, prompts, self.targets(indices), *level

    def map(self, function: Callable[..., Tensor], indices: Tensor) -> Tensor:
        """See :meth:`Reader.map`."""
        return self._reader.map(function, indices)

    def targets(self, indices: Tensor) -> Tensor:
        """Return the standardised rewards of each member in turn, NaN where a sample does not count for it."""
        targets = self._reader.targets(indices)
        repeated = targets[:, None].expand(-1, self._num_members, -1)
        if self._counted is not None:
            repeated = repeated.masked_fill(~self._counted[indices].to(targets.device)[..., None], math.nan)
        return repeated.flatten(1)


def joint_loss(proxy: RewardProxy) -> Loss:
    """Return the loss of the config's objective on the outputs ``[B, M O]`` and targets ``[B, M R]`` of all members."""
    loss = regression_loss(proxy.config.objective, proxy.config.huber_delta)
    number = len(proxy.members)

    def joint(outputs: Tensor, targets: Tensor) -> Tensor:
        return loss(*(values.unflatten(1, (number, -1)).flatten(0, 1) for values in (outputs, targets)))

    return joint


def network_errors(proxy: RewardProxy, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each network of :func:`networks_of` ``[n]``; arguments as those of :func:`joint_loss`."""
    loss = regression_loss(proxy.config.objective, proxy.config.huber_delta)
    number = len(proxy.members)
    outputs, targets = (values.unflatten(1, (number, -1)) for values in (outputs, targets))
    if not isinstance(proxy.members[0], SeparateMember):
        return torch.stack([loss(outputs[:, m], targets[:, m]) for m in range(number)])
    rewards = targets.shape[2]
    return torch.stack(
        [loss(outputs[:, m, r::rewards], targets[:, m, r, None]) for m in range(number) for r in range(rewards)]
    )


def networks_of(proxy: RewardProxy) -> list[nn.Module]:
    """Return the networks that learn nothing from one another: the members, or each member's one after the other."""
    return [
        network
        for member in proxy.members
        for network in (member.networks if isinstance(member, SeparateMember) else [member])
    ]


def left_out(folds: Tensor, num_members: int, adapters: bool) -> tuple[Tensor, Tensor]:
    """Return bool ``[n, M]`` twice: the samples each member is not trained on, and those that judge it."""
    number = int(folds.max()) + 1
    columns = torch.arange(num_members)
    if not adapters:
        judged = folds[:, None] == columns % number
        return judged, judged
    judged = (folds == 0)[:, None].expand(-1, num_members)
    return judged | (folds[:, None] == 1 + columns % (number - 1)), judged


def set_feature_scales(proxy: RewardProxy, reader: Reader, training: Tensor) -> None:
    """Set the mean and deviation of the backbone's features from at most 512 training samples."""
    shared = proxy.shared
    if not isinstance(shared, SharedTrunk):
        return
    every = -(-len(training) // _SCALE_ROWS)

    def features(*inputs: Any) -> Tensor:  # noqa: ANN401
        found = proxy.member_inputs(*inputs)[0]
        return found[:, None, :, 0, 0, 0] if proxy.is_linear else found

    shared.fit_scales(reader.map(features, training[::every]))


def fit_jointly(proxy: RewardProxy, reader: Reader, training: Tensor, folds: Tensor) -> None:
    """Train the members, and the adapters if there are any, from scratch.

    Each network's best weights are kept; with adapters, which all networks share, the best of all together.

    Args:
        proxy: one whose members share something.
        reader: reads the samples.
        training: int64 ``[n]``, the samples to train on.
        folds: int64 ``[n]``, their folds, numbered from 0.
    """
    config, joint = proxy.config, JointMember(proxy)
    number, adapted = len(proxy.members), bool(len(joint.adapters))
    skipped, judged = left_out(folds, number, adapted)
    counted = torch.zeros(2, int(training.max()) + 1, number, dtype=torch.bool)
    counted[0, training], counted[1, training] = ~skipped, judged
    rows = training[judged.any(dim=1)]
    rows = rows[:: -(-len(rows) // _JUDGED_ROWS)]
    used = training[~skipped.all(dim=1)]
    count = config.updates(len(training))
    with tqdm(total=count, desc="proxy", disable=not config.progress, dynamic_ncols=True) as bar:
        judge = cast(Reader, JointReader(reader, counted[1], number))
        networks = [joint] if adapted else networks_of(proxy)

        def errors() -> Tensor:
            judged = judge.map(joint, rows), judge.targets(rows)
            return joint_loss(proxy)(*judged)[None] if adapted else network_errors(proxy, *judged)

        keeper = BestWeights(networks, errors, config.patience, count, bar)
        source = generator(config.seed, "proxy/batches", 0, 0)
        batches = reader.batches(used, config.batch_size, count, source)
        _train(joint, JointReader(reader, counted[0], number).noised(source), batches, proxy, source, keeper)
        keeper.restore()


def continue_training(
    proxy: RewardProxy,
    reader: Reader,
    draw: Callable[[torch.Generator], Sequence[Tensor]],
    source_of: Callable[[int], torch.Generator],
    *,
    rate: float,
    redraw: bool,
) -> None:
    """Train the members further, every one on every batch it draws; those that share something together.

    Args:
        proxy: fitted.
        reader: reads the samples.
        draw: source -> the indices of each update.
        source_of: number of a member -> its generator of batches, input noise, and times and noise where the proxy
            reads noisy latents; members that share something have that of the first.
        rate: peak learning rate in units of the config's.
        redraw: whether a tiny decoder learns too: a policy may have moved to latents that it draws wrongly.
    """
    config = proxy.config
    if proxy.shared is not None:
        source = source_of(0)
        joined = JointReader(reader, None, len(proxy.members)).noised(source)
        joint = JointMember(proxy, redraw=redraw)
        _train(joint, joined, draw(source), proxy, source, _never, rate=rate, warmup=CONTINUED_WARMUP)
        return
    for number, member in enumerate(proxy.members):
        source = source_of(number)
        train_member(
            member,
            reader.noised(source),
            draw(source),
            learning_rate=rate * config.learning_rate,
            weight_decay=config.weight_decay,
            warmup=CONTINUED_WARMUP,
            stop=_never,
            input_noise=config.input_noise,
            source=source,
            loss=regression_loss(config.objective, config.huber_delta),
        )


def _never(number: int) -> bool:
    return False


def _train(
    joint: JointMember,
    reader: JointReader,
    batches: Sequence[Tensor],
    proxy: RewardProxy,
    source: torch.Generator,
    stop: Callable[[int], bool],
    *,
    rate: float = 1.0,
    warmup: float = 0.15,
) -> None:
    train_member(
        joint,
        reader,
        batches,
        learning_rate=rate * proxy.config.learning_rate,
        weight_decay=proxy.config.weight_decay,
        warmup=warmup,
        stop=stop,
        input_noise=proxy.config.input_noise,
        source=source,
        loss=joint_loss(proxy),
    )
