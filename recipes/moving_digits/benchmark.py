"""The digits benchmark as rows of a table: sample, decode, time, score and keep, one method at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latent_rewards.contracts import Codec, DataError, FingerprintMismatchError
from latent_rewards.metrics import create_metric
from latent_rewards.metrics.registry import metric_info
from latent_rewards.training.checkpoint import MANIFEST, commit_directory
from latent_rewards.training.ranks import current_ranks
from recipes.moving_digits import metrics as _register  # noqa: F401 - registers digits.*
from recipes.moving_digits.evaluation import (
    AT_ONCE,
    Evaluation,
    Reference,
    build_reference,
    clip_prompts,
    evaluate,
    evaluation_prompts,
    generate_clips,
    noise_clips,
    real_clips,
)
from recipes.moving_digits.judge import Judge
from recipes.moving_digits.world import draw_specs, render, write_prompt
from recipes.origin import commit_of
from recipes.prompted import Sampler

TUNED = "digits.legibility"
REAL_CLIPS = "reference.safetensors"
"""File with what the real clips and decoded noise are to judge and metrics; it is of the prompts and the codec."""
SHOWN = (TUNED, "digits.legibility_holdout", "digits.direction")
"""Values reported beside the benchmark's dimensions."""


@dataclass(frozen=True)
class Row:
    """One method's result.

    Attributes:
        label: name in tables.
        evaluation: scores and per-clip values.
        seconds: wall time per video of one process, sampling and decoding, in batches of 20; NaN for clips that are
            not sampled.
        network_evaluations: calls of the network per video; a guided teacher makes two per step.
        shown: the first clips of the first prompts ``[M, T, 3, H, W]``, for the report.
        commit: of the code that measured it, which may not be what reads it; None where that is not known.
    """

    label: str
    evaluation: Evaluation
    seconds: float
    network_evaluations: int
    shown: Tensor
    commit: str | None = None


class DigitsBenchmark:
    """Scores methods on fixed prompts and noise; rows are kept in ``folder`` and not computed twice.

    Args:
        codec: of the teacher.
        latent_shape: (C, F, H, W).
        folder: where rows and the real reference are kept.
        num_prompts: the first so many of the 200 evaluation prompts, four clips each.
        num_shown: prompts whose first clip the report shows.
        metrics: names of further metrics that the table shows beside the benchmark's dimensions, such as what a run is
            tuned towards; those it shows anyway may be among them.

    Raises:
        DataError: what ``folder`` holds is of other prompts.
        FingerprintMismatchError: it is of another codec.
    """

    def __init__(
        self,
        codec: Codec,
        latent_shape: Sequence[int],
        folder: str | Path,
        *,
        num_prompts: int = 200,
        num_shown: int = 6,
        metrics: Sequence[str] = (),
    ) -> None:
        self.codec, self.latent_shape, self.folder = codec, tuple(latent_shape), Path(folder)
        self.prompts = evaluation_prompts(num_prompts)
        self.shown_prompts = self.prompts[:num_shown]
        self.columns = [name for name in dict.fromkeys(metrics) if name != TUNED]
        self.judge = Judge.load()
        self.rows: dict[str, Row] = {}
        stored, ranks = self.folder / REAL_CLIPS, current_ranks()
        if ranks.agree(stored.is_file()):
            self.reference = Reference.load(stored)
            self._check(stored, self.reference.prompts, self.reference.fingerprints.get("codec"))
        else:
            built = build_reference(self.prompts, self.judge, noise_clips(codec, self.latent_shape))
            self.reference = replace(built, fingerprints={**built.fingerprints, "codec": codec.fingerprint})
            if ranks.index == 0:
                self.reference.save(stored)
            ranks.wait()

    def add_ceilings(self) -> None:
        """Add real held-out clips, and their reconstruction by the VAE."""
        self._add("real clips", lambda: (real_clips(self.prompts), float("nan")), 0)
        self._add("VAE reconstruction", lambda: (self._reconstruct(real_clips(self.prompts)), float("nan")), 0)

    def add(self, label: str, sample: Sampler, *, num_steps: int, network_evaluations: int) -> Row:
        """Score a sampler on the fixed prompts and noise; returns its row."""
        return self._add(label, lambda: self.sampled(sample, num_steps), network_evaluations)

    def add_clips(self, label: str, clips: Tensor, seconds: float, *, network_evaluations: int) -> Row:
        """Score what :meth:`sampled` returned, which other metrics may read too; returns its row."""
        return self._add(label, lambda: (clips, seconds), network_evaluations)

    def sampled(self, sample: Sampler, num_steps: int) -> tuple[Tensor, float]:
        """Return a sampler's clips ``[4 P, T, 3, H, W]`` of the fixed prompts and noise, and the seconds of one."""
        begun = time.perf_counter()
        clips = generate_clips(
            lambda prompts, noise: self.codec.decode(sample(prompts, noise)),
            self.prompts,
            self.latent_shape,
            num_steps=num_steps,
        )
        return clips, current_ranks().count * (time.perf_counter() - begun) / len(clips)

    def _add(self, label: str, make: Callable[[], tuple[Tensor, float]], network_evaluations: int) -> Row:
        folder = self.folder / label.replace(" ", "_").replace("/", "-")
        ranks = current_ranks()
        if not ranks.agree((folder / MANIFEST).is_file()):
            clips, seconds = make()
            texts = clip_prompts(self.prompts)
            metrics = {name: create_metric(name) for name in dict.fromkeys((*SHOWN, *self.columns))}

            def measure(start: int) -> Tensor:
                part = slice(start, start + AT_ONCE)
                return torch.stack([metric(clips[part], texts[part]) for metric in metrics.values()])

            measured = torch.cat(ranks.share(range(0, len(clips), AT_ONCE), measure), dim=1)
            values = dict(zip(metrics, measured, strict=True))
            evaluation = evaluate(clips, self.prompts, self.reference, self.judge, extra=values)
            if ranks.index == 0:
                facts = {"label": label, "seconds": seconds, "network_evaluations": network_evaluations}
                facts["commit"] = commit_of(Path(__file__).parent)
                self._store(folder, facts, evaluation, clips)
            ranks.wait()
        return self._load(folder)

    def _store(self, folder: Path, facts: dict[str, Any], evaluation: Evaluation, clips: Tensor) -> None:
        every = len(clips) // len(self.prompts)
        with commit_directory(folder) as temporary:
            evaluation.save(temporary / "evaluation.safetensors")
            shown = clips[: every * len(self.shown_prompts) : every].contiguous()
            save_file({"clips": shown}, temporary / "clips.safetensors")
            told = {**facts, "codec": self.codec.fingerprint, "scores": evaluation.scores}
            (temporary / "row.json").write_text(json.dumps(told))

    def _load(self, folder: Path) -> Row:
        facts = json.loads((folder / "row.json").read_text())
        evaluation = Evaluation.load(folder / "evaluation.safetensors")
        self._check(folder, evaluation.prompts, facts.get("codec"))
        shown = load_file(folder / "clips.safetensors")["clips"]
        known = (facts["label"], evaluation, facts["seconds"], facts["network_evaluations"], shown)
        row = Row(*known, facts.get("commit"))
        self.rows[row.label] = row
        return row

    def _check(self, stored: Path, prompts: list[str], codec: str | None) -> None:
        """Check that what is stored is of these prompts and this codec; older files do not tell theirs (None)."""
        remedy = f"give another folder, or remove {self.folder} to measure again"
        if prompts != self.prompts:
            raise DataError(
                f"{stored} is of {len(prompts)} prompts, not of the {len(self.prompts)} evaluated now; {remedy}"
            )
        if codec not in (None, self.codec.fingerprint):
            raise FingerprintMismatchError(
                f"{stored} was measured with codec {codec}, the one now is {self.codec.fingerprint}; {remedy}"
            )

    def load_rows(self) -> None:
        """Load every row that ``folder`` holds, oldest first.

        Raises:
            DataError: a row is of other prompts.
            FingerprintMismatchError: a row is of another codec.
        """
        for file in sorted(self.folder.glob("*/row.json"), key=lambda file: file.stat().st_mtime):
            self._load(file.parent)

    def _reconstruct(self, clips: Tensor) -> Tensor:
        @torch.no_grad()
        def reconstruct(part: Tensor) -> Tensor:
            return self.codec.decode(self.codec.encode(part)).cpu()

        return torch.cat(current_ranks().share(clips.split(AT_ONCE), reconstruct, "reconstruct clips"))

    def videos(self) -> dict[str, Tensor]:
        """Return the shown clips of every row."""
        return {label: row.shown for label, row in self.rows.items()}

    def table(self) -> tuple[list[str], list[list[str | float | int]]]:
        """Return headers and rows: dimensions, metrics, network evaluations, seconds and speed-up.

        Metrics between 0 and 1 are times 100. One that a stored row was not measured by is NaN there.
        """
        headers = ["method", "total", "quality", "semantic", "diversity", "Fréchet", "legibility", *self.columns]
        scales = {name: 100 if metric_info(name).value_range == (0, 1) else 1 for name in (TUNED, *self.columns)}
        teacher = next((row.seconds for row in self.rows.values() if row.label.startswith("teacher, 50")), float("nan"))
        rows: list[list[str | float | int]] = []
        for row in self.rows.values():
            scores = row.evaluation.scores
            cells = [scores[name] for name in ("total", "quality", "semantic", "diversity", "frechet")]
            cells += [scale * scores.get(name, float("nan")) for name, scale in scales.items()]
            rows.append([row.label, *cells, row.network_evaluations, row.seconds, teacher / row.seconds])
        return [*headers, "evaluations", "s / video", "speed-up"], rows


def training_prompts(count: int, *, seed: int) -> list[str]:
    """Return ``count`` training prompts: held-in combinations in training phrasings."""
    return [write_prompt(spec, seed=seed, index=i) for i, spec in enumerate(draw_specs(count, seed=seed))]


def training_latents(
    codec: Codec, count: int, *, seed: int, folder: Path, batch_size: int = 32
) -> tuple[Tensor, list[str]]:
    """Return latents ``[count, C, F, H, W]`` of training clips and their prompts, encoded once."""
    ranks = current_ranks()
    if not ranks.agree((folder / MANIFEST).is_file()):
        specs = draw_specs(count, seed=seed)

        @torch.no_grad()
        def encode(first: int) -> Tensor:
            return codec.encode(render(specs[first : first + batch_size], seed=seed, start_index=first)).cpu()

        chunks = ranks.share(range(0, count, batch_size), encode, "encode clips")
        if ranks.index == 0:
            with commit_directory(folder) as temporary:
                save_file({"latents": torch.cat(chunks).contiguous()}, temporary / "latents.safetensors")
        ranks.wait()
    return load_file(folder / "latents.safetensors")["latents"], training_prompts(count, seed=seed)
