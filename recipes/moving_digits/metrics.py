"""Black-box metrics of the digits world, registered through the public registry.

``digits.legibility`` is what the benchmark tunes: a scikit-learn classifier that nobody can differentiate. It looks at
a few frames, cuts out what is brightest, and answers with the probability of the digit that the prompt names. Erased,
blurred and blended scans are taught as an eleventh class, so that a blot is not read as whatever it resembles most.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from torch import Tensor
from torch.nn import functional

from latent_rewards.metrics import register_metric
from latent_rewards.metrics.motion import dis_flow
from recipes.moving_digits.world import DIGIT_SIZE, DIRECTIONS, NUM_FRAMES, draw_specs, parse_prompt, render

UNREADABLE = 10
SAMPLED_FRAMES = range(0, 17, 2)


def cut_digits(frames: Tensor) -> Tensor:
    """Cut the 16 x 16 pixels around the centre of brightness out of frames and shrink them to 8 x 8.

    Args:
        frames: ``[N, 3, H, W]`` in [0, 1].

    Returns:
        ``[N, 64]`` float32, the brightest pixel of each cut scaled to 1 (unless the frame is nearly black).
    """
    bright = frames.amax(dim=1)
    height, width = bright.shape[-2:]
    # Squaring keeps dim haze from pulling the centre away from the digit.
    weight = bright.square() + 1e-6
    weight = weight / weight.sum(dim=(1, 2), keepdim=True)
    x = (weight.sum(dim=1) * (torch.arange(width).to(weight) + 0.5)).sum(dim=1)
    y = (weight.sum(dim=2) * (torch.arange(height).to(weight) + 0.5)).sum(dim=1)
    steps = torch.arange(8).to(weight) * (DIGIT_SIZE / 8) - DIGIT_SIZE / 2 + 1
    grid_x = ((x[:, None] + steps) * 2 / width - 1)[:, None, :].expand(-1, 8, -1)
    grid_y = ((y[:, None] + steps) * 2 / height - 1)[:, :, None].expand(-1, -1, 8)
    soft = functional.avg_pool2d(bright[:, None], 3, stride=1, padding=1, count_include_pad=False)
    cuts = functional.grid_sample(soft, torch.stack((grid_x, grid_y), dim=-1), align_corners=False).flatten(1)
    return cuts / cuts.amax(dim=1, keepdim=True).clamp_min(0.2)


def _training_cuts(seed: int, num_clips: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Return what a classifier learns from: held-in clips, clean and noisy, and some unreadable ones."""
    source = torch.Generator().manual_seed(seed)
    specs = draw_specs(num_clips, seed=seed + 100)
    shown = torch.randint(NUM_FRAMES, (num_clips, 1), generator=source)
    frames = render(specs, seed=seed + 100, frames=shown)[:, 0]
    noisy = (frames + 0.05 * torch.randn(frames.shape, generator=source)).clamp(0, 1)
    share = num_clips // 10
    blurred = functional.avg_pool2d(frames[:share], 7, stride=1, padding=3)
    keep = (torch.rand(share, 1, 8, 8, generator=source) > 0.55).float()
    erased = frames[share : 2 * share] * functional.interpolate(keep, scale_factor=4)
    blots = functional.interpolate(torch.rand(share, 3, 8, 8, generator=source), scale_factor=4, mode="bicubic")
    blots = functional.pad(blots[..., 8:24, 8:24], (8, 8, 8, 8)).clamp(0, 1)
    cuts = cut_digits(torch.cat([frames, noisy, blurred, erased, blots]))
    digits = torch.tensor([spec.digit for spec in specs])
    return cuts.numpy(), torch.cat([digits, digits, torch.full((3 * share,), UNREADABLE)]).numpy()


@cache
def legibility_classifier() -> MLPClassifier:
    """Return the classifier behind ``digits.legibility``, fitted on held-in scans in about a second.

    Its penalty is strong on purpose: a classifier that is sure of everything scores in steps, not in degrees.
    """
    cuts, classes = _training_cuts(seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # thirty passes are meant
        return MLPClassifier((64,), alpha=2.0, max_iter=30, random_state=0).fit(cuts, classes)


@cache
def holdout_classifier() -> ExtraTreesClassifier:
    """Return a classifier of another family, so that what fools the first need not fool this one."""
    cuts, classes = _training_cuts(seed=1)
    return ExtraTreesClassifier(200, min_samples_leaf=2, random_state=1, n_jobs=1).fit(cuts, classes)


def _probability_of_named_digit(classifier: Any, videos: Tensor, prompts: Sequence[str]) -> Tensor:  # noqa: ANN401
    frames = videos[:, [f for f in SAMPLED_FRAMES if f < videos.shape[1]]]
    cuts = cut_digits(frames.flatten(0, 1)).numpy()
    probabilities = classifier.predict_proba(cuts).reshape(len(videos), frames.shape[1], -1).mean(axis=1)
    digits = [parse_prompt(prompt).digit for prompt in prompts]
    return torch.from_numpy(probabilities[np.arange(len(videos)), digits]).float()


@register_metric("digits.legibility", version="1", value_range=(0, 1), needs_prompt=True)
def legibility(videos: Tensor, *, prompts: Sequence[str]) -> Tensor:
    """Probability that a frame shows the digit of the prompt, averaged over every other frame; a scikit-learn MLP."""
    return _probability_of_named_digit(legibility_classifier(), videos.cpu(), prompts)


@register_metric("digits.legibility_holdout", version="1", value_range=(0, 1), needs_prompt=True)
def legibility_holdout(videos: Tensor, *, prompts: Sequence[str]) -> Tensor:
    """Probability of the prompt's digit by randomised trees on other distortions: a guard, never optimised."""
    return _probability_of_named_digit(holdout_classifier(), videos.cpu(), prompts)


@register_metric("digits.direction", version="1", value_range=(0, 1), needs_prompt=True, minimum_frames=5)
def direction(videos: Tensor, *, prompts: Sequence[str]) -> Tensor:
    """Half of one plus the cosine between the prompt's direction and the brightness-weighted mean DIS flow."""
    scores = []
    for video, prompt in zip(videos.cpu(), prompts, strict=True):
        wanted = np.asarray(DIRECTIONS[parse_prompt(prompt).direction], dtype=np.float32)
        # Every fourth frame: displacements of pixels rather than fractions of one.
        frames = video[::4]
        flow = dis_flow(frames)
        weight = frames[:-1].amax(dim=1).numpy()[..., None]
        mean = (flow * weight).sum(axis=(0, 1, 2)) / max(float(weight.sum()), 1e-6)
        norm = float(np.linalg.norm(mean))
        cosine = float(mean @ wanted) / norm if norm > 0.2 else 0.0
        scores.append(0.5 + 0.5 * cosine)
    return torch.tensor(scores).clamp(0, 1)
