"""Evaluation where there is no embedded world: the run's own metrics on prompts kept for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from distillation.prompts import PromptsError, read_prompts
from latent_rewards.contracts import Codec
from latent_rewards.metrics import create_metric
from latent_rewards.training.randomness import sample_noise
from latent_rewards.training.ranks import current_ranks

Sampler = Callable[[list[str], Tensor], Tensor]
"""Prompts and a noise stack ``[num_steps, B, C, F, H, W]`` -> latents."""


class Benchmark(Protocol):
    """What the pipeline needs of an evaluation."""

    shown_prompts: list[str]

    def add(self, label: str, sample: Sampler, *, num_steps: int, network_evaluations: int) -> object:
        """Score a sampler; rows keep the order in which they were added."""
        ...

    def table(self) -> tuple[list[str], list[list[str | float | int]]]:
        """Return headers and rows."""
        ...

    def videos(self) -> dict[str, Tensor]:
        """Return clips ``[M, T, 3, H, W]`` of the shown prompts for each row."""
        ...


class PromptBenchmark:
    """Means of metrics over prompts; one video per prompt, the same noise for every row.

    Args:
        codec: latents -> videos.
        latent_shape: (C, F, H, W).
        prompts: evaluation prompts.
        metrics: names of metrics.
        seed: of the noise.
        num_shown: prompts whose clips are kept for the report; all others are dropped as soon as they are scored.
    """

    def __init__(
        self,
        codec: Codec,
        latent_shape: Sequence[int],
        prompts: list[str],
        metrics: Sequence[str],
        seed: int,
        num_shown: int = 4,
    ) -> None:
        self.codec, self.latent_shape, self.prompts, self.seed = codec, tuple(latent_shape), prompts, seed
        self.metrics = {name: create_metric(name) for name in dict.fromkeys(metrics)}
        self.shown_prompts = prompts[:num_shown]
        self.rows: list[list[str | float | int]] = []
        self.shown: dict[str, Tensor] = {}

    def add(self, label: str, sample: Sampler, *, num_steps: int, network_evaluations: int) -> None:
        """Sample, decode and score one video at a time; the processes of a launch share the prompts."""

        @torch.no_grad()
        def score(index: int) -> tuple[list[float], Tensor | None]:
            texts = [self.prompts[index]]
            steps = [sample_noise(self.seed, "evaluation", k, [index], self.latent_shape) for k in range(num_steps)]
            video = self.codec.decode(sample(texts, torch.stack(steps))).float().cpu()
            values = [float(metric(video, texts)) for metric in self.metrics.values()]
            return values, video if index < len(self.shown_prompts) else None

        ranks, begun, count = current_ranks(), time.perf_counter(), len(self.prompts)
        scored = ranks.share(range(count), score, label)
        seconds = ranks.count * (time.perf_counter() - begun) / count
        means = [sum(column) / count for column in zip(*(values for values, _ in scored), strict=True)]
        self.rows.append([label, *means, network_evaluations, seconds])
        self.shown[label] = torch.cat([video for _, video in scored if video is not None])

    def table(self) -> tuple[list[str], list[list[str | float | int]]]:
        """Return headers and rows: the metrics' means, network evaluations and seconds per video."""
        return ["method", *self.metrics, "evaluations", "s / video"], self.rows

    def videos(self) -> dict[str, Tensor]:
        """Return the kept clips."""
        return self.shown


def split_prompts(path: str, num_eval: int) -> tuple[list[str], list[str]]:
    """Return training and evaluation prompts of a text file with one prompt a line; the last ``num_eval`` are kept.

    Raises:
        PromptsError: the file is missing, is no text, is empty, or leaves no prompt for training.
    """
    prompts = read_prompts(path)
    if len(prompts) <= num_eval:
        raise PromptsError(f"{path} holds {len(prompts)} prompts and {num_eval} are kept for evaluation; add prompts")
    return prompts[: len(prompts) - num_eval], prompts[len(prompts) - num_eval :]
