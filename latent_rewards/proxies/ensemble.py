"""Training the members of a proxy: reading batches, one member's loop, and stopping early."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from latent_rewards.proxies.noise import Draw, fixed_draws, fresh_draws
from latent_rewards.proxies.objectives import Loss, masked_error, regression_loss
from latent_rewards.proxies.prompt_table import PromptTable
from latent_rewards.proxies.proxy import RewardProxy
from latent_rewards.proxies.samples import Samples
from latent_rewards.training.randomness import generator

EVALUATE_EVERY = 25
"""Fewest updates between evaluations on a member's left-out fold."""

_CHUNK = 128
_MOST_EVALUATIONS = 24
_EVALUATION_ROWS = 2048
"""Most samples of a fold that stop a member early; more would cost large data sets more than their training."""

Batch = tuple[Any, ...]
"""Normalised latents ``[B, C, F, H, W]``, read prompts ``[B, D]`` or None, standardised rewards ``[B, R]`` with NaN;
and t ``[B]``, for a proxy of noisy latents."""


class BatchReader(Protocol):
    """What training a member needs: batches, targets and outputs by the number of what it learns from."""

    def __call__(self, indices: Tensor) -> Batch:
        """Return the batch at ``indices``."""
        ...

    def targets(self, indices: Tensor) -> Tensor:
        """Return the targets of ``indices``."""
        ...

    def map(self, function: Callable[..., Tensor], indices: Tensor) -> Tensor:
        """Return the outputs of ``function`` over all of ``indices``, without gradient."""
        ...

    def noised(self, source: torch.Generator) -> BatchReader:
        """Return a reader that draws times and noise from ``source``; itself for clean latents."""
        ...

    def batches(self, indices: Tensor, batch_size: int, count: int, source: torch.Generator) -> list[Tensor]:
        """Return the indices of ``count`` batches of at most ``batch_size``, shuffled."""
        ...


class Reader:
    """Reads batches of samples as the members of a proxy want them.

    For a proxy of noisy latents every sample has a time and a noise that follow from its index, unless the reader is
    one that :meth:`noised` or :meth:`at` returned.

    Args:
        proxy: its scales and device are used.
        samples: what is read.
        prompts: the features of their prompts, if they were made before.
    """

    def __init__(self, proxy: RewardProxy, samples: Samples, prompts: PromptTable | None = None) -> None:
        self._proxy, self.samples = proxy, samples
        self._prompts = prompts or PromptTable(proxy, samples.read_prompts, len(samples))
        mean, scale = proxy.reward_mean.to("cpu", torch.float64), proxy.reward_std.to("cpu", torch.float64)
        self.rewards = ((samples.rewards - mean) / scale).to(proxy.reward_mean)
        self._draw: Draw | None = None
        if proxy.noise is not None:
            self._draw = fixed_draws(proxy.config.seed, proxy.noise.bounds)

    def noised(self, source: torch.Generator) -> Reader:
        """Return a reader that draws times and noise from ``source``, for training; itself for clean latents."""
        return self._drawing(lambda bounds: fresh_draws(source, bounds))

    def at(self, level: float) -> Reader:
        """Return a reader whose every sample is at time ``level``; itself for clean latents."""
        return self._drawing(lambda bounds: fixed_draws(self._proxy.config.seed, bounds, level))

    def _drawing(self, make: Callable[[tuple[float, float]], Draw]) -> Reader:
        if self._proxy.noise is None:
            return self
        reader = copy(self)
        reader._draw = make(self._proxy.noise.bounds)
        return reader

    def inputs(self, indices: Tensor) -> tuple[Any, ...]:
        """Return a batch without its rewards: what the members take."""
        raw = self._prompts(indices)
        prompts = None if raw is None else self._proxy.scale_prompts(raw)
        latents = self.samples.latents(indices)
        if self._draw is None or self._proxy.noise is None:
            return self._proxy.normalise(latents), prompts
        latents = latents.to(self._proxy.latent_mean)
        t, noise = self._draw(indices, tuple(latents.shape[1:]))
        t = t.to(latents)
        return self._proxy.normalise(self._proxy.noise.corrupt(latents, t, noise)), prompts, t

    def __call__(self, indices: Tensor) -> Batch:
        """Return the batch at ``indices`` (int64 ``[B]``, on the CPU, of one bucket)."""
        latents, prompts, *level = self.inputs(indices)
        return latents, prompts, self.targets(indices), *level

    def batches(self, indices: Tensor, batch_size: int, count: int, source: torch.Generator) -> list[Tensor]:
        """Return batches of one bucket each; see :func:`bucketed_batches`."""
        return bucketed_batches(indices, self.samples.buckets(indices), batch_size, count, source)

    def targets(self, indices: Tensor) -> Tensor:
        """Return the standardised rewards ``[B, R]`` at ``indices``."""
        return self.rewards[indices.to(self.rewards.device)]

    @torch.no_grad()
    def map(self, function: Callable[..., Tensor], indices: Tensor) -> Tensor:
        """Return ``function(latents, prompts[, t])`` over all of ``indices``, in chunks and without gradient."""
        places, parts = [], []
        for place, chunk in self.samples.chunks(indices, _CHUNK):
            places.append(place)
            parts.append(function(*self.inputs(chunk)))
        values = torch.cat(parts)
        return values if len(self.samples.bucket_starts) == 1 else values[torch.cat(places).argsort().to(values.device)]

    def ensemble(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ensemble's means and variances ``[B, R]``, standardised, on the CPU."""
        both = self.map(lambda *inputs: torch.stack(self._proxy.ensemble(*inputs), dim=1), indices)
        return both[:, 0].cpu(), both[:, 1].cpu()


def shuffled_batches(indices: Tensor, batch_size: int, count: int, source: torch.Generator) -> list[Tensor]:
    """Return ``count`` batches of at most ``batch_size`` of ``indices``, reshuffled at every pass."""
    size = min(batch_size, len(indices))
    passes = -(-count * size // len(indices))
    order = torch.cat([indices[torch.randperm(len(indices), generator=source)] for _ in range(passes)])
    return list(order[: count * size].split(size))


def bucketed_batches(
    indices: Tensor, buckets: Tensor, batch_size: int, count: int, source: torch.Generator
) -> list[Tensor]:
    """Return ``count`` batches of ``indices``, each from one bucket and of at most ``batch_size``.

    A bucket of n of N indices gets ``count n / N`` batches, rounded up or down so that this is their expectation
    (systematic sampling), in random order. Within a bucket the indices are reshuffled at every pass.

    Args:
        indices: int64 ``[n]``.
        buckets: int64 ``[n]``, the bucket of each.
        batch_size: most indices in a batch; a smaller bucket gives smaller batches.
        count: number of batches.
        source: CPU generator.
    """
    numbers, sizes = buckets.unique(return_counts=True)
    if len(numbers) == 1:
        return shuffled_batches(indices, batch_size, count, source)
    ends = sizes.double().cumsum(0) / len(indices)
    positions = (torch.arange(count) + torch.rand((), generator=source, dtype=torch.float64)) / count
    owners = torch.searchsorted(ends, positions, right=True).clamp(max=len(numbers) - 1)
    owners = owners[torch.randperm(count, generator=source)]
    batches: list[Tensor] = [indices] * count
    for owner in owners.unique().tolist():
        turns = (owners == owner).nonzero()[:, 0].tolist()
        mine = indices[buckets == numbers[owner]]
        for turn, batch in zip(turns, shuffled_batches(mine, batch_size, len(turns), source), strict=True):
            batches[turn] = batch
    return batches


def train_member(
    member: nn.Module,
    reader: Callable[[Tensor], Batch],
    batches: Sequence[Tensor],
    *,
    learning_rate: float,
    weight_decay: float,
    warmup: float,
    stop: Callable[[int], bool],
    input_noise: float = 0.0,
    source: torch.Generator | None = None,
    loss: Loss = masked_error,
) -> None:
    """Train one member by AdamW with a one-cycle schedule (Smith & Topin 2017), then freeze it again.

    Args:
        member: the network.
        reader: indices -> batch.
        batches: the indices of each update.
        learning_rate: the peak.
        weight_decay: of AdamW.
        warmup: part of the updates in which the learning rate rises.
        stop: called with the number of each finished update; True ends the training.
        input_noise: standard deviation of Gaussian noise added to the normalised latents.
        source: CPU generator of that noise.
        loss: of the member's outputs and the targets.
    """
    member.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(member.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps = len(batches) + 1
    # A rise of exactly one step is a division by zero in OneCycleLR.
    rise = warmup if warmup * steps != 1 else 0.99 * warmup
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=rise)
    with torch.enable_grad():
        for number, indices in enumerate(batches):
            latents, prompts, target, *level = reader(indices)
            if input_noise:
                noise = torch.randn(latents.shape, generator=source, dtype=latents.dtype)
                latents = latents + input_noise * noise.to(latents.device)
            value = loss(member(latents, prompts, *level), target)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(member.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if stop(number):
                break
    optimizer.zero_grad(set_to_none=True)
    member.requires_grad_(False).eval()


def fit_members(
    proxy: RewardProxy,
    reader: BatchReader,
    training: Tensor,
    folds: Tensor,
    networks: Sequence[tuple[nn.Module, Loss]] | None = None,
) -> None:
    """Train every member from scratch; member m stops early on the samples of fold m, which it never trains on.

    Args:
        proxy: whose members and settings.
        reader: reads the samples.
        training: int64 ``[n]``, the samples (or pairs) to train on.
        folds: int64 ``[n]``, their folds, numbered from 0; ``[n, 2]`` for pairs, left out where one of the two is.
        networks: what is trained, each with its loss; None takes the members with the loss of the config's objective.
    """
    config = proxy.config
    count = config.updates(len(training))
    if networks is None:
        networks = [(member, regression_loss(config.objective, config.huber_delta)) for member in proxy.members]
    with tqdm(total=count * len(networks), desc="proxy", disable=not config.progress, dynamic_ncols=True) as bar:
        for number, (member, loss) in enumerate(networks):
            left_out = (folds == number % (int(folds.max()) + 1)).reshape(len(training), -1).any(dim=1)
            judged = training[left_out]
            if len(judged) > _EVALUATION_ROWS:
                order = torch.randperm(len(judged), generator=generator(config.seed, "proxy/evaluation", 0, number))
                judged = judged[order[:_EVALUATION_ROWS]]
            keeper = BestWeights([member], _error_of(member, reader, judged, loss), config.patience, count, bar)
            source = generator(config.seed, "proxy/batches", 0, number)
            train_member(
                member,
                reader.noised(source),
                reader.batches(training[~left_out], config.batch_size, count, source),
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
                warmup=0.15,
                stop=keeper,
                input_noise=config.input_noise,
                source=source,
                loss=loss,
            )
            keeper.restore()
            bar.update(count * (number + 1) - bar.n)


def _error_of(member: nn.Module, reader: BatchReader, rows: Tensor, loss: Loss) -> Callable[[], Tensor]:
    return lambda: loss(reader.map(member, rows), reader.targets(rows))[None]


class BestWeights:
    """Evaluates networks now and then, keeps the best weights of each, and says when patience with all is over.

    Args:
        networks: n modules.
        errors: returns their errors ``[n]`` as they are now.
        patience: evaluations without improvement after which a network's best is settled.
        num_updates: most that will be made; there are about 24 evaluations, or one in 25 updates if that is fewer.
        bar: shows updates and the mean error.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        errors: Callable[[], Tensor],
        patience: int,
        num_updates: int,
        bar: tqdm,
    ) -> None:
        self._networks, self._errors, self._bar = networks, errors, bar
        self._patience, self._num_updates = patience, num_updates
        self._every = max(EVALUATE_EVERY, num_updates // _MOST_EVALUATIONS)
        self._best, self._waited = [math.inf] * len(networks), [0] * len(networks)
        self._weights = [deepcopy(network.state_dict()) for network in networks]

    def __call__(self, number: int) -> bool:
        """Count update ``number`` and return whether it was the last that is worth making."""
        self._bar.update()
        if (number + 1) % self._every and number + 1 != self._num_updates:
            return False
        errors = self._errors().tolist()
        for place, (network, error) in enumerate(zip(self._networks, errors, strict=True)):
            self._waited[place] += 1
            if error <= self._best[place]:
                self._best[place], self._waited[place] = error, 0
                self._weights[place] = deepcopy(network.state_dict())
        told = {"error": f"{sum(errors) / len(errors):.3g}", "best": f"{sum(self._best) / len(errors):.3g}"}
        self._bar.set_postfix(told, refresh=False)
        return min(self._waited) >= self._patience

    def restore(self) -> None:
        """Give every network its best weights."""
        for network, weights in zip(self._networks, self._weights, strict=True):
            network.load_state_dict(weights)
