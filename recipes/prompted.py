"""Evaluation where there is no embedded world: the run's own metrics on prompts kept for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distillation.prompts import PromptsError, read_prompts
from latent_rewards.contracts import Codec
from latent_rewards.oracle import ScoresVideos
from latent_rewards.training.checkpoint import MANIFEST, commit_directory
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

    Rows are kept in ``folder``. One is computed again if it is of other prompts, noise, metrics or steps.

    Args:
        codec: latents -> videos.
        latent_shape: (C, F, H, W).
        folder: where rows are kept.
        prompts: evaluation prompts.
        metrics: of the table's columns; of two with one name the last counts.
        seed: of the noise.
        batch_size: videos sampled and scored at once; fewer where that gives each process of a launch some.
        num_shown: prompts whose clips are kept for the report; all others are dropped as soon as they are scored.
    """

    def __init__(
        self,
        codec: Codec,
        latent_shape: Sequence[int],
        folder: str | Path,
        prompts: list[str],
        metrics: Sequence[ScoresVideos],
        *,
        seed: int,
        batch_size: int = 1,
        num_shown: int = 4,
    ) -> None:
        self.codec, self.latent_shape, self.folder = codec, tuple(latent_shape), Path(folder)
        self.prompts, self.seed, self.batch_size = prompts, seed, batch_size
        self.metrics = {metric.name: metric for metric in metrics}
        self.shown_prompts = prompts[:num_shown]
        self.rows: list[list[str | float | int]] = []
        self.shown: dict[str, Tensor] = {}

    def add(self, label: str, sample: Sampler, *, num_steps: int, network_evaluations: int) -> None:
        """Sample, decode and score; the processes of a launch share the prompts. A row there is is read instead."""
        folder, ranks = self.folder / label.replace(" ", "_").replace("/", "-"), current_ranks()
        facts = {
            "label": label,
            "prompts": self.prompts,
            "num_shown": len(self.shown_prompts),
            "metrics": {name: metric.fingerprint for name, metric in self.metrics.items()},
            "latent_space": self.codec.fingerprint,
            "seed": self.seed,
            "num_steps": num_steps,
            "network_evaluations": network_evaluations,
        }
        if not ranks.agree(_kept(folder) == facts):
            begun = time.perf_counter()
            tensors = self._scored(label, sample, num_steps)
            seconds = ranks.count * (time.perf_counter() - begun) / len(self.prompts)
            if ranks.index == 0:
                with commit_directory(folder) as temporary:
                    save_file(tensors, temporary / "row.safetensors")
                    (temporary / "row.json").write_text(json.dumps({**facts, "seconds": seconds}))
            ranks.wait()
        tensors, told = load_file(folder / "row.safetensors"), json.loads((folder / "row.json").read_text())
        # NaN is "does not apply to this sample"; a metric that applies to none stays NaN.
        means = [float(tensors[f"metric/{name}"].nanmean()) for name in self.metrics]
        self.rows.append([label, *means, network_evaluations, told["seconds"]])
        self.shown[label] = tensors["clips"]

    def _scored(self, label: str, sample: Sampler, num_steps: int) -> dict[str, Tensor]:
        """Return each metric of every prompt, float64 ``[P]``, and the shown clips, uint8 as a video stores them."""
        ranks, count = current_ranks(), len(self.prompts)
        size = min(self.batch_size, -(-count // ranks.count))  # so that each process has some

        @torch.no_grad()
        def score(start: int) -> tuple[list[Tensor], Tensor]:
            texts = self.prompts[start : start + size]
            rows = range(start, start + len(texts))
            steps = [sample_noise(self.seed, "evaluation", k, rows, self.latent_shape) for k in range(num_steps)]
            videos = self.codec.decode(sample(texts, torch.stack(steps))).float().cpu()
            shown = videos[: max(0, len(self.shown_prompts) - start)]
            pixels = (255 * shown.clamp(0, 1)).round().byte()
            return [metric(videos, texts).double().cpu() for metric in self.metrics.values()], pixels

        scored = ranks.share(range(0, count, size), score, label)
        columns = zip(*(values for values, _ in scored), strict=True)
        values = {f"metric/{name}": torch.cat(column) for name, column in zip(self.metrics, columns, strict=True)}
        return {**values, "clips": torch.cat([pixels for _, pixels in scored]).contiguous()}

    def table(self) -> tuple[list[str], list[list[str | float | int]]]:
        """Return headers and rows: the metrics' means, network evaluations and seconds per video."""
        return ["method", *self.metrics, "evaluations", "s / video"], self.rows

    def videos(self) -> dict[str, Tensor]:
        """Return the kept clips."""
        return {label: clips.float() / 255 for label, clips in self.shown.items()}


def split_prompts(path: str, num_eval: int) -> tuple[list[str], list[str]]:
    """Return training and evaluation prompts of a text file with one prompt a line; the last ``num_eval`` are kept.

    Raises:
        PromptsError: the file is missing, is no text, is empty, or leaves no prompt for training.
    """
    prompts = read_prompts(path)
    if len(prompts) <= num_eval:
        raise PromptsError(f"{path} holds {len(prompts)} prompts and {num_eval} are kept for evaluation; add prompts")
    return prompts[: len(prompts) - num_eval], prompts[len(prompts) - num_eval :]


def _kept(folder: Path) -> dict[str, Any] | None:
    """Return what a kept row says of itself, but for its seconds; None if there is none that can be read."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        facts = dict(json.loads((folder / "row.json").read_text()))
    except (OSError, ValueError):
        return None
    return {name: fact for name, fact in facts.items() if name != "seconds"}
