"""What a proxy is trained on, checked before any training, and how it is divided."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from latent_rewards.contracts import DataError, FingerprintMismatchError, check_latents, prompt_text
from latent_rewards.dataset import RewardDataset
from latent_rewards.proxies.text import Prompts
from latent_rewards.training.randomness import derive_seed, generator

_IN_MEMORY_BYTES = 2**30
_CHUNK = 256
MIN_GROUPS = 10
MIN_HELDOUT = 5

Rewards = Tensor | Mapping[str, Tensor]
"""``[N]``, ``[N, R]`` or ``{name: [N]}``."""


@dataclass
class Samples:
    """Latents, rewards and prompts of N samples.

    Attributes:
        latents: int64 ``[M]`` indices -> latents ``[M, C, F, H, W]``; of one bucket, where there are several.
        latent_shape: ``(C, F, H, W)``, of the first bucket.
        rewards: float64 ``[N, R]``, NaN where one does not apply.
        reward_names: R names.
        prompts: N texts, embeddings, or None; samples of one prompt are not divided.
        latent_space: fingerprint of the codec, or None.
        metric_fingerprints: ``{reward name: fingerprint}``, empty if unknown.
        bucket_shapes: the latent shape of each bucket; empty for a single one.
        bucket_starts: the first sample of each bucket.
        use_prompts: whether the proxy reads the prompts.
    """

    latents: Callable[[Tensor], Tensor]
    latent_shape: tuple[int, ...]
    rewards: Tensor
    reward_names: tuple[str, ...]
    prompts: Prompts | None
    latent_space: str | None
    metric_fingerprints: dict[str, str]
    bucket_shapes: tuple[tuple[int, ...], ...] = ()
    bucket_starts: tuple[int, ...] = (0,)
    use_prompts: bool = True

    def __len__(self) -> int:
        """Return N."""
        return len(self.rewards)

    @property
    def read_prompts(self) -> Prompts | None:
        """The prompts as the proxy reads them: None if it reads none."""
        return self.prompts if self.use_prompts else None

    @property
    def latent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The distinct latent shapes, the first bucket's first."""
        return tuple(dict.fromkeys(self.bucket_shapes or (self.latent_shape,)))

    def buckets(self, indices: Tensor) -> Tensor:
        """Return the bucket, counted from 0, of each of ``indices`` (int64 ``[M]``)."""
        return torch.searchsorted(torch.tensor(self.bucket_starts), indices.contiguous(), right=True) - 1

    def chunks(self, indices: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield positions in ``indices`` and the indices there, at most ``size`` and of one bucket at a time."""
        owners = self.buckets(indices)
        for bucket in range(len(self.bucket_starts)):
            places = (owners == bucket).nonzero()[:, 0]
            if len(places) or len(self.bucket_starts) == 1:
                for place in places.split(size):
                    yield place, indices[place]


def gather_samples(
    source: RewardDataset | Tensor,
    rewards: Rewards | None,
    prompts: Prompts | None,
    *,
    latent_space: str | None = None,
    use_prompts: bool = True,
    in_memory_bytes: int | None = None,
) -> Samples:
    """Bring every accepted form of data into one.

    A dataset of up to ``in_memory_bytes`` (None is 1 GiB) of latents is read into memory; a larger one on demand.

    Raises:
        DataError: wrong rank, length or type; NaN or infinite latents; infinite rewards.
        FingerprintMismatchError: ``latent_space`` is another than the dataset's; the message names both.
    """
    if isinstance(source, RewardDataset):
        if rewards is not None or prompts is not None:
            raise DataError("a RewardDataset brings its own rewards and prompts; pass them only with a latents tensor")
        columns, latent_shape = dict(source.rewards), source.latent_shape
        latents, prompts = _dataset_latents(source, in_memory_bytes), source.prompts
        if None not in (latent_space, source.latent_space) and latent_space != source.latent_space:
            raise FingerprintMismatchError(
                f"the dataset's latents belong to {source.latent_space!r} and latent_space says {latent_space!r}; "
                "leave latent_space out, or collect in that latent space"
            )
        latent_space = latent_space or source.latent_space
        fingerprints = source.metric_fingerprints
        count = len(source)
    else:
        check_latents(source)
        if rewards is None:
            raise DataError("rewards is missing; pass [N], [N, R] or {name: [N]} with the latents")
        tensor, count, latent_shape, fingerprints = source.detach(), len(source), tuple(source.shape[1:]), {}
        columns, latents = name_rewards(rewards), lambda indices: tensor[indices.to(tensor.device)]
    if prompts is not None and (isinstance(prompts, str) or len(prompts) != count):
        raise DataError(
            f"prompts must be one per sample: got {1 if isinstance(prompts, str) else len(prompts)} for {count}"
        )
    if isinstance(prompts, Tensor):
        if prompts.ndim not in (2, 3):
            raise DataError(f"prompt embeddings must be [N, D] or [N, L, D]; got shape {tuple(prompts.shape)}")
        prompts = prompts.detach()
    return Samples(
        latents,
        latent_shape,
        torch.stack([_reward_column(name, values, count) for name, values in columns.items()], dim=1),
        tuple(columns),
        prompts,
        latent_space,
        dict(fingerprints),
        use_prompts=use_prompts,
    )


def _dataset_latents(dataset: RewardDataset, in_memory_bytes: int | None) -> Callable[[Tensor], Tensor]:
    limit = _IN_MEMORY_BYTES if in_memory_bytes is None else in_memory_bytes
    values = len(dataset) * int(torch.tensor(dataset.latent_shape).prod())
    if values * dataset.dtype.itemsize <= limit:
        tensor = check_latents(dataset.latents())
        return lambda indices: tensor[indices.to(tensor.device)]
    for start in range(0, len(dataset), _CHUNK):
        check_latents(dataset.latents(range(start, min(start + _CHUNK, len(dataset)))), name=f"latents from {start}")
    return dataset.latents


def name_rewards(rewards: Rewards) -> dict[str, Tensor]:
    """Return ``{name: [N]}``: ``[N]`` is named "reward", the columns of ``[N, R]`` "reward_0", "reward_1", ...

    Raises:
        DataError: another rank, or no reward.
    """
    if isinstance(rewards, Mapping):
        columns = dict(rewards)
    else:
        tensor = _as_numbers("rewards", rewards)
        if tensor.ndim not in (1, 2):
            raise DataError(f"rewards must be [N], [N, R] or {{name: [N]}}; got shape {tuple(tensor.shape)}")
        named = {f"reward_{i}": column for i, column in enumerate(tensor.T)} if tensor.ndim == 2 else {}
        columns = named if tensor.ndim == 2 else {"reward": tensor}
    if not columns:
        raise DataError("rewards is empty; give at least one")
    return columns


def _as_numbers(what: str, values: Any) -> Tensor:  # noqa: ANN401 - whatever was given as rewards
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{what} must be numbers, NaN where a metric does not apply; {error}") from error
    if tensor.is_complex():
        raise DataError(f"{what} must be real numbers; got {tensor.dtype}")
    return tensor


def _reward_column(name: str, values: Tensor, count: int) -> Tensor:
    column = _as_numbers(f"reward {name!r}", values).detach().to("cpu", torch.float64)
    if column.shape != (count,):
        raise DataError(f"reward {name!r} has shape {tuple(column.shape)}; expected [{count}], one per sample")
    if bool(torch.isinf(column).any()):
        first = int(torch.isinf(column).nonzero()[0])
        raise DataError(f"reward {name!r} is infinite for sample {first}; drop or bound it (NaN: does not apply)")
    return column


def check_trainable(samples: Samples, min_samples: int) -> None:
    """Raise DataError, naming the reward, if there are too few samples or a reward has too few values or only one."""
    if len(samples) < min_samples:
        raise DataError(f"{len(samples)} samples are too few to fit a proxy; at least {min_samples} (min_samples)")
    for name, values in zip(samples.reward_names, samples.rewards.T, strict=True):
        known = values[~values.isnan()]
        if len(known) < min_samples:
            raise DataError(f"reward {name!r} applies to {len(known)} samples; at least {min_samples} (min_samples)")
        if float(known.max() - known.min()) <= 1e-9 * float(known.abs().max()):
            raise DataError(f"reward {name!r} is constant ({float(known[0]):g}); there is nothing to learn: drop it")


def prompt_ids(prompts: Prompts | None) -> Tensor | None:
    """Return int64 ``[N]``, numbers from 0 that are equal where prompts are, or None without prompts."""
    if prompts is None:
        return None
    if isinstance(prompts, Tensor):
        return prompts.detach().cpu().flatten(1).unique(dim=0, return_inverse=True)[1]
    known: dict[str, int] = {}
    return torch.tensor([known.setdefault(prompt_text(prompt), len(known)) for prompt in prompts])


def group_ids(prompts: Prompts | None, count: int) -> Tensor | None:
    """Return int64 ``[N]`` ids of equal prompts, or None where prompts do not repeat or are fewer than 10 distinct."""
    ids = prompt_ids(prompts)
    return ids if ids is not None and MIN_GROUPS <= int(ids.max()) + 1 < count else None


def split_samples(samples: Samples, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the sorted indices of the training and of the held-out samples.

    Samples of one prompt stay together where prompts repeat (at least 10 distinct ones), else the split is random.

    Raises:
        DataError: a reward has fewer than 5 values, or one constant value, in either part.
    """
    groups = group_ids(samples.prompts, len(samples))
    if groups is None:
        order = torch.randperm(len(samples), generator=generator(seed, "proxy/split", 0))
        size = max(MIN_HELDOUT, round(fraction * len(samples)))
        heldout, training = order[:size].sort().values, order[size:].sort().values
    else:
        from sklearn.model_selection import GroupShuffleSplit

        splitter = GroupShuffleSplit(1, test_size=fraction, random_state=derive_seed(seed, "proxy/split", 0) % 2**32)
        rows = next(splitter.split(groups.numpy(), groups=groups.numpy()))
        training, heldout = (torch.from_numpy(part).sort().values for part in rows)
    for part, indices in (("training", training), ("held-out", heldout)):
        for name, values in zip(samples.reward_names, samples.rewards[indices].T, strict=True):
            known = values[~values.isnan()]
            if len(known) < MIN_HELDOUT or float(known.max() - known.min()) == 0:
                raise DataError(
                    f"reward {name!r} has {len(known)} values, {len(known.unique())} of them distinct, in the {part} "
                    "part; collect more samples, use more prompts, or change holdout_fraction or seed"
                )
    return training, heldout


def split_folds(indices: Tensor, groups: Tensor | None, num_folds: int, seed: int) -> Tensor:
    """Return the fold in ``[0, num_folds)`` of each of ``indices``; samples of one group share a fold."""
    ids = torch.arange(len(indices)) if groups is None else groups[indices].unique(return_inverse=True)[1]
    order = torch.randperm(int(ids.max()) + 1, generator=generator(seed, "proxy/folds", 0))
    return order[ids] % num_folds


def concatenate_samples(first: Samples, second: Samples) -> Samples:
    """Return ``first`` followed by ``second``; both have the same rewards in the same order.

    Raises:
        DataError: latent shapes differ, or one has texts and the other embeddings or nothing.
    """
    if first.latent_shape != second.latent_shape:
        raise DataError(f"latents {first.latent_shape} cannot be trained on together with {second.latent_shape}")
    count = len(first)

    def latents(indices: Tensor) -> Tensor:
        early = indices < count
        if bool(early.all()):
            return first.latents(indices)
        late = second.latents(indices[~early] - count)
        gathered = late.new_empty(len(indices), *first.latent_shape)
        gathered[~early.to(late.device)] = late
        if bool(early.any()):
            gathered[early.to(late.device)] = first.latents(indices[early]).to(late)
        return gathered

    return Samples(
        latents,
        first.latent_shape,
        torch.cat([first.rewards, second.rewards]),
        first.reward_names,
        join_prompts([first.prompts, second.prompts]),
        first.latent_space,
        first.metric_fingerprints,
    )


def join_prompts(parts: Sequence[Prompts | None]) -> Prompts | None:
    """Return the prompts of all parts in one; token embeddings are padded with zeros to the longest.

    Raises:
        DataError: texts beside embeddings, or prompts beside none.
    """
    if all(part is None for part in parts):
        return None
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if any(part is None for part in parts) or len(tensors) not in (0, len(parts)):
        raise DataError("prompts must be of one kind in all that is trained on: texts, embeddings, or none")
    if not tensors:
        return [prompt for part in parts for prompt in (part or ())]
    if any(tensor.ndim != tensors[0].ndim or tensor.shape[-1] != tensors[0].shape[-1] for tensor in tensors):
        raise DataError(
            f"prompt embeddings must be of one kind and dimension; got {[tuple(tensor.shape) for tensor in tensors]}"
        )
    if tensors[0].ndim == 3:
        longest = max(tensor.shape[1] for tensor in tensors)
        tensors = [functional.pad(tensor, (0, 0, 0, longest - tensor.shape[1])) for tensor in tensors]
    return torch.cat(tensors)
