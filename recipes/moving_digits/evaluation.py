"""The digits benchmark, version 1: how clips are scored and compared, fixed before any result.

Every score is 0-100. With W1 the Wasserstein-1 distance, the closeness of a per-clip pixel metric x is
``100 (1 - W1(x, x_real) / W1(x_noise, x_real))``, clipped: a metric can be missed on either side but not overshot.

    quality   = mean closeness of five pixel metrics        semantic = mean accuracy of the judge against the prompt
    diversity = coverage of real clips (Naeem et al. 2020)   total    = 0.4 quality + 0.4 semantic + 0.2 diversity

The real reference has a fixed number of clips for each prompt, so that real and generated clips show the same
attributes and an interval can resample prompts with all that belongs to them.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from latent_rewards.contracts import DataError, FingerprintMismatchError
from latent_rewards.metrics import create_metric
from latent_rewards.training.ranks import current_ranks
from recipes.moving_digits.evaluation_set import (
    AT_ONCE,
    DEMO_PROMPTS,
    FULL_PROMPTS,
    SEEDS,
    clip_prompts,
    evaluation_noise,
    evaluation_prompts,
    generate_clips,
    noise_clips,
    real_clips,
    selection_prompts,
)
from recipes.moving_digits.judge import ATTRIBUTES, Judge
from recipes.moving_digits.scores import (
    Interval,
    UndefinedError,
    Weights,
    closeness,
    frechet_distance,
    interval,
    resample_weights,
    weighted_mean,
    within_neighbourhood,
)
from recipes.moving_digits.world import labels, parse_prompt, render

__all__ = [
    "AT_ONCE",
    "BENCHMARK_VERSION",
    "DEMO_PROMPTS",
    "FULL_PROMPTS",
    "PIXEL_METRICS",
    "SEEDS",
    "Evaluation",
    "Interval",
    "Reference",
    "build_reference",
    "clip_prompts",
    "compare",
    "evaluate",
    "evaluation_noise",
    "evaluation_prompts",
    "generate_clips",
    "noise_clips",
    "pixel_values",
    "real_clips",
    "selection_prompts",
]

BENCHMARK_VERSION = 1
PIXEL_METRICS = (
    "quality.sharpness",
    "quality.temporal_flickering",
    "motion.smoothness",
    "motion.dynamic_degree",
    "quality.colourfulness",
)
REFERENCE_CLIPS_PER_PROMPT = 10
"""2,000 real clips for the full benchmark, 400 for the demo."""
NEIGHBOURS = 5
_REFERENCE_SEED = 20261


@dataclass(frozen=True)
class Reference:
    """What clips are compared with; compute it once with :func:`build_reference`.

    Args:
        prompts: the P evaluation prompts.
        metrics: values of the pixel metrics on the R = P x m real clips, each float64 ``[R]``, prompt by prompt.
        features: the judge's features of the real clips ``[R, D]``.
        noise_metrics: values of the pixel metrics on decoded noise.
        fingerprints: of the judge and of each pixel metric, by name; where it is known also of the codec that drew the
            noise, under "codec".
    """

    prompts: list[str]
    metrics: dict[str, Tensor]
    features: Tensor
    noise_metrics: dict[str, Tensor]
    fingerprints: dict[str, str]

    def save(self, path: Path | str) -> None:
        """Write the reference to one safetensors file."""
        real = {f"real/{name}": values for name, values in self.metrics.items()}
        noise = {f"noise/{name}": values for name, values in self.noise_metrics.items()}
        header = {"prompts": self.prompts, "fingerprints": self.fingerprints}
        _store(path, {**real, **noise, "features": self.features}, header)

    @classmethod
    def load(cls, path: Path | str) -> Reference:
        """Read what :meth:`save` wrote; raises :class:`DataError` for another benchmark version."""
        tensors, header = _fetch(path)
        return cls(
            prompts=header["prompts"],
            metrics=_under("real/", tensors),
            features=tensors["features"],
            noise_metrics=_under("noise/", tensors),
            fingerprints=header["fingerprints"],
        )


@dataclass(frozen=True)
class Evaluation:
    """Scores of one method, with the per-clip values that a paired comparison resamples.

    Args:
        scores: ``total``, ``quality``, ``semantic``, ``diversity``, ``frechet``, ``closeness/<metric>``,
            ``accuracy/<attribute>``, ``semantic/heldin`` and ``semantic/heldout`` (by combination), and the mean of
            each extra value.
        prompts: the P prompts; N = 4 P clips.
        metrics: pixel metrics, each float64 ``[N]``.
        correct: whether the judge reads what the prompt asks, ``{attribute: float64 [N]}`` of 0 and 1.
        extra: other per-clip values (the tuned metric), each ``[N]``.
        features: the judge's features ``[N, D]``.
        covered: whether a clip of prompt p covers real clip r, bool ``[R, P]``.
    """

    scores: dict[str, float]
    prompts: list[str]
    metrics: dict[str, Tensor]
    correct: dict[str, Tensor]
    extra: dict[str, Tensor]
    features: Tensor
    covered: Tensor

    def save(self, path: Path | str) -> None:
        """Write scores and per-clip values to one safetensors file, for comparisons in another run."""
        groups = {"metric": self.metrics, "correct": self.correct, "extra": self.extra}
        tensors = {f"{group}/{name}": values for group, members in groups.items() for name, values in members.items()}
        header = {"scores": self.scores, "prompts": self.prompts}
        _store(path, {**tensors, "features": self.features, "covered": self.covered}, header)

    @classmethod
    def load(cls, path: Path | str) -> Evaluation:
        """Read what :meth:`save` wrote; raises :class:`DataError` for another benchmark version."""
        tensors, header = _fetch(path)
        metrics, correct, extra = (_under(f"{group}/", tensors) for group in ("metric", "correct", "extra"))
        return cls(
            header["scores"], header["prompts"], metrics, correct, extra, tensors["features"], tensors["covered"]
        )


def build_reference(
    prompts: Sequence[str],
    judge: Judge,
    noise_videos: Tensor,
    *,
    clips_per_prompt: int = REFERENCE_CLIPS_PER_PROMPT,
    progress: bool = True,
) -> Reference:
    """Render and measure the real clips of ``prompts`` (held-out scans), and measure ``noise_videos``.

    Raises:
        DataError: ``clips_per_prompt`` leaves a prompt fewer than k + 1 real clips.
    """
    if clips_per_prompt <= NEIGHBOURS:
        raise DataError(f"clips_per_prompt must exceed k = {NEIGHBOURS} for coverage; got {clips_per_prompt}")
    specs = [parse_prompt(text) for text in prompts for _ in range(clips_per_prompt)]

    def measure(start: int) -> tuple[dict[str, Tensor], Tensor]:
        clips = render(specs[start : start + AT_ONCE], seed=_REFERENCE_SEED, split="heldout", start_index=start)
        return pixel_values(clips), judge.read(clips)[0]

    ranks, starts = current_ranks(), range(0, len(specs), AT_ONCE)
    measured = ranks.share(starts, measure, "real clips" if progress else None)
    noise = ranks.share(noise_videos.split(AT_ONCE), pixel_values)
    features = torch.cat([features for _, features in measured])
    return Reference(
        list(prompts), _joined([values for values, _ in measured]), features, _joined(noise), _fingerprints(judge)
    )


def pixel_values(videos: Tensor) -> dict[str, Tensor]:
    """Return the five pixel metrics of clips ``[N, T, 3, H, W]``, each float64 ``[N]``."""
    metrics = {name: create_metric(name) for name in PIXEL_METRICS}
    return {name: torch.cat([score(b) for b in videos.split(100)]).double() for name, score in metrics.items()}


def evaluate(
    videos: Tensor,
    prompts: Sequence[str],
    reference: Reference,
    judge: Judge,
    *,
    extra: dict[str, Tensor] | None = None,
) -> Evaluation:
    """Score clips ``[4 P, T, 3, H, W]`` in [0, 1] of P prompts, in the order of :func:`clip_prompts`.

    The processes of a launch share the work; each must give all clips.

    Raises:
        DataError: the clips are not four per prompt, or the prompts are not the reference's.
        FingerprintMismatchError: the reference was measured with another judge or another version of a metric.
    """
    if list(prompts) != reference.prompts:
        raise DataError(f"the reference was built for {len(reference.prompts)} other prompts; build one for these")
    if len(videos) != len(prompts) * len(SEEDS):
        raise DataError(f"{len(prompts)} prompts need {len(prompts) * len(SEEDS)} clips; got {len(videos)}")
    for name, fingerprint in _fingerprints(judge).items():
        if fingerprint != (stored := reference.fingerprints.get(name)):
            raise FingerprintMismatchError(
                f"the reference was measured with {name} {stored}, the clips with {fingerprint}; rebuild the reference"
            )
    specs = [parse_prompt(text) for text in clip_prompts(prompts)]
    read = current_ranks().share(videos.split(AT_ONCE), lambda clips: (*judge.read(clips), pixel_values(clips)))
    features = torch.cat([features for features, _, _ in read])
    predicted = _joined([predicted for _, predicted, _ in read])
    wanted = labels(specs)
    kinds = _digit_and_colour(prompts)
    per_prompt = len(reference.features) // len(prompts)
    inside = within_neighbourhood(
        reference.features, features, kinds.repeat_interleave(per_prompt), kinds.repeat_interleave(len(SEEDS))
    )
    values = Evaluation(
        scores={},
        prompts=list(prompts),
        metrics=_joined([values for _, _, values in read]),
        correct={name: (predicted[name] == wanted[name]).double() for name in ATTRIBUTES},
        extra={name: v.detach().cpu().double() for name, v in (extra or {}).items()},
        features=features,
        covered=inside.unflatten(1, (len(prompts), len(SEEDS))).any(dim=2),
    )
    values.scores.update(_score(values, reference, np.ones(len(prompts))))
    return values


def compare(
    a: Evaluation, b: Evaluation, reference: Reference, *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, Interval]:
    """Return ``b - a`` for every score both have, with intervals that resample prompts and recompute the scores.

    Pairs share prompt and seed. A resample takes a prompt's clips of both methods and its real clips together. Where it
    leaves a score without a value (real clips that a metric cannot tell from noise, no held-out prompt), the interval
    of that score leaves it out, and a warning says how many.

    Raises:
        DataError: the evaluations or the reference are of different prompts.
    """
    if not a.prompts == b.prompts == reference.prompts:
        raise DataError("a paired comparison needs two evaluations and a reference of the same prompts")
    draws = resample_weights(len(a.prompts), resamples=resamples, seed=seed)
    resampled = [[_score(values, reference, weights, resampled=True) for values in (a, b)] for weights in draws]
    names = [name for name in a.scores if name in b.scores]
    differences = {name: np.array([y.get(name, np.nan) - x.get(name, np.nan) for x, y in resampled]) for name in names}
    undefined = {name: int(np.isnan(values).sum()) for name, values in differences.items()}
    if told := ", ".join(f"{name} {count}" for name, count in undefined.items() if count):
        warnings.warn(f"of {resamples} resamples, intervals leave out those without a value: {told}", stacklevel=2)
    return {name: interval(b.scores[name] - a.scores[name], differences[name], level=level) for name in names}


def _score(
    values: Evaluation, reference: Reference, prompt_weights: Weights, *, resampled: bool = False
) -> dict[str, float]:
    """Compute every score with prompt p counted ``prompt_weights[p]`` times; ``resampled``, NaN is no error."""
    weights = prompt_weights.repeat(len(SEEDS))
    real_weights = prompt_weights.repeat(len(reference.features) // len(prompt_weights))
    close = {}
    for name, v in values.metrics.items():
        real, noise = reference.metrics[name], reference.noise_metrics[name]
        try:
            near = closeness(v, real, noise, weights=weights, real_weights=real_weights)
        except UndefinedError:
            if not resampled:
                raise
            near = np.nan
        close[f"closeness/{name}"] = near
    accuracy = {f"accuracy/{name}": 100 * weighted_mean(v, weights) for name, v in values.correct.items()}
    covered = values.covered.numpy()[:, prompt_weights > 0].any(axis=1)
    quality, semantic = float(np.mean([*close.values()])), float(np.mean([*accuracy.values()]))
    diversity = 100 * weighted_mean(covered, real_weights)
    scores = {
        "total": 0.4 * quality + 0.4 * semantic + 0.2 * diversity,
        "quality": quality,
        "semantic": semantic,
        "diversity": diversity,
        "frechet": frechet_distance(values.features, reference.features, weights=weights, real_weights=real_weights),
    }
    per_clip = torch.stack([*values.correct.values()]).mean(dim=0).numpy()
    heldout = np.array([parse_prompt(text).is_heldout for text in values.prompts]).repeat(len(SEEDS))
    for name, chosen in (("semantic/heldin", ~heldout), ("semantic/heldout", heldout)):
        if (weights[chosen] > 0).any():
            scores[name] = 100 * weighted_mean(per_clip[chosen], weights[chosen])
    extra = {name: weighted_mean(v, weights) for name, v in values.extra.items()}
    return {**scores, **close, **accuracy, **extra}


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _fingerprints(judge: Judge) -> dict[str, str]:
    return {"judge": judge.fingerprint, **{name: create_metric(name).fingerprint for name in PIXEL_METRICS}}


def _digit_and_colour(prompts: Sequence[str]) -> Tensor:
    named = labels([parse_prompt(text) for text in prompts])
    return named["digit"] * ATTRIBUTES["colour"] + named["colour"]


def _store(path: Path | str, tensors: dict[str, Tensor], header: Mapping[str, object]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    settings = json.dumps({"benchmark_version": BENCHMARK_VERSION, **header})
    save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata={"settings": settings})
    os.replace(partial, path)


def _fetch(path: Path | str) -> tuple[dict[str, Tensor], dict]:
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get("settings", "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the handle is no mapping)
    if header.get("benchmark_version") != BENCHMARK_VERSION:
        raise DataError(
            f"{path} is of benchmark version {header.get('benchmark_version')}, this is {BENCHMARK_VERSION}; rerun it"
        )
    return tensors, header


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
