"""The contract of a metric as a public test.

A metric makes promises when it is registered: that it is deterministic, that videos do not influence one another, that
it stays in its range, that it uses the prompt it asks for. Rewards are stored, cached and compared on the strength of
those promises, so they are worth testing once before anything is collected.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from latent_rewards.contracts import ConfigError, MetricError, Prompt
from latent_rewards.metrics.metric import Metric
from latent_rewards.metrics.registry import create_metric

TOLERANCE = 1e-4
"""Relative difference that arithmetic in another order may make between a batch and its samples scored one by one."""


def check_metric(
    metric: str | Callable[..., object] | Metric,
    *,
    num_samples: int = 4,
    seed: int = 0,
    videos: Tensor | None = None,
    prompts: Sequence[Prompt] | None = None,
) -> None:
    """Test everything a metric promises.

    Args:
        metric: what :func:`create_metric` takes.
        num_samples: how many videos to score; at least 2. They are moving textures 8 x 3 x 32 x 32 (longer where the
            metric needs it); still, grey and noise clips are scored as well.
        seed: of the videos.
        videos: float32 ``[num_samples, T, C, H, W]`` to score instead, for a metric that needs real content.
        prompts: as many prompts instead of invented ones, at least two of them different.

    Raises:
        MetricError: lists every promise that is broken.
        ConfigError: fewer than two samples.
    """
    made = create_metric(metric)
    if videos is None:
        videos = moving_textures(num_samples, num_frames=max(8, made.minimum_frames), seed=seed)
    count = len(videos)
    if count < 2:
        raise ConfigError(f"check_metric needs at least 2 samples; got {count}")
    texts = list(prompts) if prompts is not None else [f"a {_SUBJECTS[i % len(_SUBJECTS)]}" for i in range(count)]
    broken: list[str] = []

    def score(what: str, clips: Tensor, words: Sequence[Prompt]) -> Tensor | None:
        before = clips.clone()
        try:
            values = made(clips, words if made.needs_prompt else None)
        except MetricError as error:
            broken.append(f"{what}: {error}")
            values = None
        if not torch.equal(before, clips):
            broken.append(f"{what}: it changes the videos it is given")
            clips.copy_(before)
        return values

    first = score("a batch", videos, texts)
    if first is not None:
        if made.deterministic and not _equal(first, score("the same batch again", videos, texts)):
            broken.append("it says deterministic, and the same videos got other values")
        if made.batch_invariant:
            alone = [score(f"sample {i} alone", videos[i : i + 1], texts[i : i + 1]) for i in range(count)]
            broken.extend(_compare_alone(first, alone) if made.deterministic else [])
        if made.needs_prompt and made.deterministic:
            moved = texts[1:] + texts[:1]
            if _equal(first, score("other prompts", videos, moved)):
                broken.append("it says needs_prompt, and other prompts changed no value")
        if made.differentiable:
            broken.extend(_check_gradient(made, videos, texts))
    for kind, clips in cheating_clips(videos, seed=seed).items():
        score(f"{kind} clips", clips, texts)
    score(f"clips of {made.minimum_frames} frame(s)", videos[:, : made.minimum_frames].clone(), texts)
    if broken:
        unique = list(dict.fromkeys(broken))
        raise MetricError(f"metric {made.name!r} breaks its contract:\n" + "\n".join(f"- {line}" for line in unique))


def warn_if_cheatable(metrics: Iterable[object], *, stacklevel: int = 2) -> None:
    """Warn when the only reward is a metric that a clip nobody wants maximises.

    Args:
        metrics: of all rewards; what has no ``cheats`` (see :class:`~latent_rewards.metrics.metric.MetricInfo`) is
            taken to have none.
        stacklevel: of the warning; 2 is the caller of this function.
    """
    listed = list(metrics)
    if len(listed) != 1 or not (cheats := tuple(getattr(listed[0], "cheats", ()))):
        return
    remedies = {_REMEDIES[kind]: None for kind in cheats}
    warnings.warn(
        f"metric {getattr(listed[0], 'name', listed[0])!r} is the only reward, and a {' or a '.join(cheats)} clip is "
        f"as good as any to it: optimisation would find that; add {' and '.join(remedies)} as another reward",
        stacklevel=stacklevel,
    )


def moving_textures(count: int, *, num_frames: int = 8, size: int = 32, seed: int = 0) -> Tensor:
    """Return ``[count, num_frames, 3, size, size]``: smooth coloured textures, each drifting at a speed of its own."""
    from latent_rewards.training.randomness import generator, sample_uniform  # slow to import, and needed only here

    draws = sample_uniform(seed, "metric-check", 0, range(count))
    speeds = 0.2 + 1.8 * draws
    steps = torch.arange(num_frames, dtype=torch.float64)[None, :] * speeds[:, None]
    y, x = torch.meshgrid(*[torch.arange(size, dtype=torch.float64)] * 2, indexing="ij")
    across = x - steps[..., None, None]
    clips = []
    for channel in range(3):
        clip = torch.zeros_like(across)
        for sample in range(count):
            source = generator(seed, "metric-check-texture", channel, sample)
            waves = 1.6 * torch.rand(6, 2, generator=source, dtype=torch.float64) - 0.8
            phases = 6.28 * torch.rand(6, generator=source, dtype=torch.float64)
            for (u, v), phase in zip(waves.tolist(), phases.tolist(), strict=True):
                clip[sample] += torch.cos(u * across[sample] + v * y + phase)
        clips.append(clip)
    return (0.5 + torch.stack(clips, dim=2) / 12).clamp(0, 1).float()


def cheating_clips(videos: Tensor, *, seed: int = 0) -> dict[str, Tensor]:
    """Return clips shaped like ``videos`` that a composite of metrics must not love: still, grey and noise."""
    from latent_rewards.training.randomness import generator

    still = videos[:, :1].expand_as(videos).clone()
    noise = torch.stack(
        [torch.rand(clip.shape, generator=generator(seed, "noise-clip", 0, i)) for i, clip in enumerate(videos)]
    )
    return {"still": still, "grey": torch.full_like(videos, 0.5), "noise": noise.to(videos)}


_SEMANTIC = "a metric that reads the prompt"
_REMEDIES = {
    "still": f"motion.dynamic_degree or {_SEMANTIC}",
    "grey": f"motion.dynamic_degree or {_SEMANTIC}",
    "noise": _SEMANTIC,
}
"""What a cheating clip does not win."""

_SUBJECTS = ("red ball rolling left", "blue boat", "green bird flying up", "dog", "storm over the sea")


def _equal(first: Tensor, second: Tensor | None) -> bool:
    return second is not None and torch.equal(first.nan_to_num(nan=-1e30), second.nan_to_num(nan=-1e30))


def _compare_alone(batch: Tensor, alone: Sequence[Tensor | None]) -> list[str]:
    for index, value in enumerate(alone):
        if value is None:
            continue
        if not torch.allclose(batch[index : index + 1], value, rtol=TOLERANCE, atol=1e-6, equal_nan=True):
            return [
                f"it says batch_invariant, and sample {index} got {float(batch[index]):g} in a batch "
                f"and {float(value):g} alone"
            ]
    return []


def _check_gradient(metric: Metric, videos: Tensor, texts: Sequence[Prompt]) -> list[str]:
    leaf = videos.clone().requires_grad_()
    try:
        values = metric.score(leaf, prompts=texts) if metric.needs_prompt else metric.score(leaf)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    except Exception as error:  # any failure is the finding
        return [f"it says differentiable, and its gradient failed: {type(error).__name__}: {error}"]
    return [] if bool(gradient.isfinite().all()) else ["it says differentiable, and its gradient is not finite"]
