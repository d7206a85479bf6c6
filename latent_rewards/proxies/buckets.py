"""Latents of several frame counts and resolutions: a bucket for each shape, and every batch from one bucket.

The conv3d trunk reads any size, so one network learns from all of them. A batch is stacked into one tensor, though, and
therefore has one shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.dataset import RewardDataset, check_same_fingerprint
from latent_rewards.proxies.samples import Rewards, Samples, gather_samples, join_prompts
from latent_rewards.proxies.text import Prompts

MIN_BUCKET = 8
"""Fewest samples of one shape beside others."""

Source = Tensor | RewardDataset
Shape = tuple[int, ...]


def gather_buckets(
    sources: Source | Sequence[Source],
    rewards: Rewards | Sequence[Rewards] | None,
    prompts: Prompts | Sequence[Prompts] | None,
    *,
    linear: bool = False,
    latent_space: str | None = None,
    use_prompts: bool = True,
    in_memory_bytes: int | None = None,
) -> Samples:
    """Bring one source, or a list of one source per bucket, into one form.

    Args:
        sources: ``[N, C, F, H, W]`` or a dataset, or a list of such that may differ in F, H and W.
        rewards: for tensors; with a list of sources a list, of the same reward names.
        prompts: the same, all of one kind.
        linear: the trunk reads one shape only.
        latent_space: fingerprint of the codec; datasets bring their own.
        use_prompts: whether the proxy reads the prompts.
        in_memory_bytes: see :func:`gather_samples`; of each dataset.

    Raises:
        ConfigError: several shapes for a linear trunk.
        DataError: lists of other lengths, channels or reward names that differ, a bucket of fewer than 8 samples; and
            what :func:`gather_samples` raises.
        FingerprintMismatchError: sources differ in latent space or metrics.
    """
    options = {"latent_space": latent_space, "use_prompts": use_prompts, "in_memory_bytes": in_memory_bytes}
    if isinstance(sources, Tensor | RewardDataset):
        return gather_samples(sources, rewards, prompts, **options)  # type: ignore[arg-type]
    _check_sources(sources, linear)
    columns, texts = (
        _one_each(name, part, len(sources)) for name, part in (("rewards", rewards), ("prompts", prompts))
    )
    parts = [gather_samples(*triple, **options) for triple in zip(sources, columns, texts, strict=True)]  # type: ignore[arg-type]
    return _joined(parts) if len(parts) > 1 else parts[0]


def _shape(source: Source) -> Shape:
    return source.latent_shape if isinstance(source, RewardDataset) else tuple(source.shape[1:])


def _check_sources(sources: Sequence[Source], linear: bool) -> None:
    if not isinstance(sources, Sequence) or isinstance(sources, str) or not len(sources):
        raise DataError(
            f"latents must be [N, C, F, H, W], a RewardDataset or a list of such; got {type(sources).__name__}"
        )
    if not isinstance(sources, Tensor) and isinstance(sources[0], Tensor) and sources[0].ndim == 4:
        raise DataError(
            f"latents is a list of [C, F, H, W], such as {list(sources[0].shape)}; stack those of one shape: "
            "torch.stack(latents), or a list of one such stack for each shape"
        )
    for number, source in enumerate(sources):
        if not isinstance(source, Tensor | RewardDataset):
            raise DataError(f"bucket {number} is a {type(source).__name__}; give a tensor or a RewardDataset")
        if len(sources) > 1 and len(source) < MIN_BUCKET:
            raise DataError(
                f"bucket {number} has {len(source)} samples; give at least {MIN_BUCKET} of a shape, or leave it out"
            )
        if _shape(source)[:1] != _shape(sources[0])[:1]:
            raise DataError(
                f"bucket {number} has latents {_shape(source)} and bucket 0 {_shape(sources[0])}: the channels must "
                "agree, since they come from one codec"
            )
    shapes = dict.fromkeys(_shape(source) for source in sources)
    if linear and len(shapes) > 1:
        raise ConfigError(
            f"the linear trunk has one weight per latent value and reads one shape; got {list(shapes)}: use "
            "trunk='conv3d', or train a proxy for each shape"
        )


def _one_each(name: str, values: object, count: int) -> Sequence[object]:
    if values is None:
        return [None] * count
    if not isinstance(values, list | tuple) or len(values) != count:
        got = f"{len(values)}" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
        raise DataError(f"{name} must be a list of one entry for each of the {count} buckets; got {got}")
    return values


def _joined(parts: Sequence[Samples]) -> Samples:
    first = parts[0]
    for part in parts[1:]:
        check_same_fingerprint("latent space", first.latent_space, part.latent_space)
        if set(part.reward_names) != set(first.reward_names):
            raise DataError(f"buckets must have the same rewards; got {first.reward_names} and {part.reward_names}")
        for name in first.reward_names:
            mine, theirs = (samples.metric_fingerprints.get(name) for samples in (first, part))
            check_same_fingerprint(f"metric of reward {name!r}", mine, theirs)
    starts = torch.tensor([0, *(len(part) for part in parts[:-1])]).cumsum(0)

    def latents(indices: Tensor) -> Tensor:
        owners = torch.searchsorted(starts, indices.cpu(), right=True) - 1
        owner = int(owners[0])
        if bool((owners != owner).any()):
            raise DataError("latents of two buckets cannot be read as one tensor; read each bucket's on its own")
        return parts[owner].latents(indices - int(starts[owner]))

    order = [[part.reward_names.index(name) for name in first.reward_names] for part in parts]
    return Samples(
        latents,
        first.latent_shape,
        torch.cat([part.rewards[:, columns] for part, columns in zip(parts, order, strict=True)]),
        first.reward_names,
        join_prompts([part.prompts for part in parts]),
        first.latent_space,
        first.metric_fingerprints,
        bucket_shapes=tuple(part.latent_shape for part in parts),
        bucket_starts=tuple(starts.tolist()),
        use_prompts=first.use_prompts,
    )


def check_readable(shape: Shape, known: Sequence[Shape], any_size: bool, smallest_side: int) -> None:
    """Raise unless a proxy can read latents ``[B, C, F, H, W]`` of this shape.

    Args:
        shape: of the batch.
        known: ``(C, F, H, W)`` it was trained on.
        any_size: whether other F, H and W are accepted too.
        smallest_side: of H and W, what its trunk can read.

    Raises:
        DataError: it cannot; the message names the shapes it reads.
    """
    size = tuple(shape[1:])
    if len(shape) == 5 and (size in known or (any_size and size[:1] == known[0][:1])):
        if min(size[1:]) >= 1 and min(size[2:]) >= smallest_side:
            return
        raise DataError(
            f"latents {size} are too small for this proxy's trunk, which reads sides of at least {smallest_side}; its "
            f"stride follows the first shape it was trained on, {known[0]}: train it with the smallest shape first"
        )
    trained = " or ".join(f"[B, {', '.join(map(str, each))}]" for each in known)
    several = ", the shapes it was trained on" if len(known) > 1 else ""
    raise DataError(
        f"this proxy reads latents {trained}{several}; got {tuple(shape)}"
        + (f" ({known[0][0]} channels, any size)" if any_size else "; train it with any_size=True to read other sizes")
    )
