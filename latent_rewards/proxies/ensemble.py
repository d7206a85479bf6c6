"""Training the members of a proxy: reading batches, one member's loop, and stopping early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from latent_rewards.proxies.objectives import Loss, masked_error, regression_loss
from latent_rewards.proxies.proxy import RewardProxy
from latent_rewards.proxies.samples import Samples
from latent_rewards.training.randomness import generator

EVALUATE_EVERY = 25
"""Updates between evaluations on a member's left-out fold."""

_CHUNK = 128

Batch = tuple[Tensor, Tensor | None, Tensor]
"""Normalised latents ``[B, C, F, H, W]``, read prompts ``[B, D]``, standardised rewards ``[B, R]`` with NaN."""


class BatchReader(Protocol):
    """What training a member needs: batches, targets and outputs by the number of what it learns from."""

    def __call__(self, indices: Tensor) -> Batch:
        """Return the batch at ``indices``."""
        ...

    def targets(self, indices: Tensor) -> Tensor:
        """Return the targets of ``indices``."""
        ...

    def map(self, function: Callable[[Tensor, Tensor | None], Tensor], indices: Tensor) -> Tensor:
        """Return the outputs of ``function`` over all of ``indices``, without gradient."""
        ...


class Reader:
    """Reads batches of samples as the members of a proxy want them.

    Args:
        proxy: its scales and device are used.
        samples: what is read.
    """

    def __init__(self, proxy: RewardProxy, samples: Samples) -> None:
        self._proxy, self._samples = proxy, samples
        self._prompts = proxy.read_prompts(samples.prompts, len(samples))
        mean, scale = proxy.reward_mean.to("cpu", torch.float64), proxy.reward_std.to("cpu", torch.float64)
        self.rewards = ((samples.rewards - mean) / scale).to(proxy.reward_mean)

    def __call__(self, indices: Tensor) -> Batch:
        """Return the batch at ``indices`` (int64 ``[B]``, on the CPU)."""
        prompts = None if self._prompts is None else self._prompts[indices.to(self._prompts.device)]
        return self._proxy.normalise(self._samples.latents(indices)), prompts, self.targets(indices)

    def targets(self, indices: Tensor) -> Tensor:
        """Return the standardised rewards ``[B, R]`` at ``indices``."""
        return self.rewards[indices.to(self.rewards.device)]

    @torch.no_grad()
    def map(self, function: Callable[[Tensor, Tensor | None], Tensor], indices: Tensor) -> Tensor:
        """Return ``function(latents, prompts)`` over all of ``indices``, in chunks and without gradient."""
        return torch.cat([function(*self(chunk)[:2]) for chunk in indices.split(_CHUNK)])

    def ensemble(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ensemble's means and variances ``[B, R]``, standardised, on the CPU."""
        both = self.map(lambda latents, prompts: torch.stack(self._proxy.ensemble(latents, prompts), dim=1), indices)
        return both[:, 0].cpu(), both[:, 1].cpu()


def shuffled_batches(indices: Tensor, batch_size: int, count: int, source: torch.Generator) -> list[Tensor]:
    """Return ``count`` batches of at most ``batch_size`` of ``indices``, reshuffled at every pass."""
    size = min(batch_size, len(indices))
    passes = -(-count * size // len(indices))
    order = torch.cat([indices[torch.randperm(len(indices), generator=source)] for _ in range(passes)])
    return list(order[: count * size].split(size))


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
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=len(batches) + 1, pct_start=warmup
    )
    with torch.enable_grad():
        for number, indices in enumerate(batches):
            latents, prompts, target = reader(indices)
            if input_noise:
                noise = torch.randn(latents.shape, generator=source, dtype=latents.dtype)
                latents = latents + input_noise * noise.to(latents.device)
            value = loss(member(latents, prompts), target)
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
            keeper = _BestWeights(member, reader, training[left_out], config.patience, count, bar, loss)
            source = generator(config.seed, "proxy/batches", 0, number)
            train_member(
                member,
                reader,
                shuffled_batches(training[~left_out], config.batch_size, count, source),
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


class _BestWeights:
    """Evaluates a member now and then, keeps its best weights, and says when patience is over."""

    def __init__(
        self,
        member: nn.Module,
        reader: BatchReader,
        rows: Tensor,
        patience: int,
        num_updates: int,
        bar: tqdm,
        loss: Loss = masked_error,
    ) -> None:
        self._loss = loss
        self._member, self._reader, self._rows, self._bar = member, reader, rows, bar
        self._patience, self._num_updates = patience, num_updates
        self._best, self._waited = float("inf"), 0
        self._weights = deepcopy(member.state_dict())

    def __call__(self, number: int) -> bool:
        self._bar.update()
        if (number + 1) % EVALUATE_EVERY and number + 1 != self._num_updates:
            return False
        error = self._loss(self._reader.map(self._member, self._rows), self._reader.targets(self._rows)).item()
        self._waited += 1
        if error <= self._best:
            self._best, self._waited, self._weights = error, 0, deepcopy(self._member.state_dict())
        self._bar.set_postfix({"error": f"{error:.3g}", "best": f"{self._best:.3g}"}, refresh=False)
        return self._waited >= self._patience

    def restore(self) -> None:
        self._member.load_state_dict(self._weights)
