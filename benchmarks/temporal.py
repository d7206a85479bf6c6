"""What temporal terms do to motion: ``python -m benchmarks.temporal``.

VSD→CD on moving digits with no temporal term, with frame differences, with a teacher block's features and with soft
correspondence, all else equal. Judged on decoded video at 4 steps by real optical flow (DIS): the direction asked for,
smoothness, dynamic degree and the error of warping each frame to the next; beside them the benchmark's dimensions, and
the same metrics of real clips. A term is good where it brings a metric nearer to real clips, not where it raises it.

Each (term, seed) ends in ``results/temporal/<term>-seed<k>.json``; a killed run goes on. ``--summary`` only aggregates.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import distillation as ds
from benchmarks.ablation import Ablation, add_options
from benchmarks.provenance import provenance
from benchmarks.result_files import Cell, keep, read_results, seed_cells, write_summary
from benchmarks.seeds import mean_cell, over_seeds
from latent_rewards.contracts import ConfigError, unknown_name
from latent_rewards.metrics import create_metric
from recipes.moving_digits.evaluation import AT_ONCE, clip_prompts, real_clips

NUM_STEPS = 4
NONE = {"temporal_weight": 0.0, "feature_weight": 0.0, "correspondence_weight": 0.0}
TERMS: dict[str, dict[str, float]] = {
    "none": NONE,
    "difference": {**NONE, "temporal_weight": 0.1},
    "feature": {**NONE, "feature_weight": 10.0},
    "correspondence": {**NONE, "correspondence_weight": 2.0},
}
"""Weights that make each term roughly a tenth of VSD's loss, by a trial of six updates."""
METRICS = (
    "digits.direction",
    "motion.smoothness",
    "motion.dynamic_degree",
    "motion.warping_error",
    "quality.temporal_flickering",
)
DIMENSIONS = ("total", "quality", "semantic", "diversity")
REAL = "real"


class Terms(Ablation):
    """Trains VSD→CD with a temporal term and measures motion; arguments as of the base."""

    def trained_with(self, term: str) -> dict[str, Any]:
        """Return the settings of a term's results."""
        return {**self.measured_with(), **{f"distillation.{name}": weight for name, weight in TERMS[term].items()}}

    def motion(self, term: str, seed: int) -> dict[str, Any]:
        """Train (or continue) with a term, and return metrics, dimensions and the share of the terms in the loss.

        ``seconds`` are those of the training, without parts before a kill.
        """
        pipeline = self.pipeline(seed)
        config = pipeline.settings["distillation"]
        steps = {name: max(1, round(self.share * getattr(config, name))) for name in ("vsd_steps", "cd_steps")}
        section = self.settings(pipeline, self.runs / f"{term}-seed{seed}", **steps, **TERMS[term])
        student = ds.start_student(pipeline.teacher, section)
        trainer = ds.DistillationTrainer(pipeline.teacher, student, pipeline.distillation_data(), section)
        begun = time.perf_counter()
        history = trainer.train().history
        seconds = time.perf_counter() - begun
        benchmark = self.benchmark(pipeline, f"{term}-seed{seed}")
        clips, each = benchmark.sampled(pipeline.student_sampler(student, NUM_STEPS), NUM_STEPS)
        row = benchmark.add_clips(term, clips, each, network_evaluations=NUM_STEPS)
        return {
            "term": term,
            "seed": seed,
            "metrics": measured(clips, clip_prompts(benchmark.prompts)),
            "dimensions": {name: row.evaluation.scores[name] for name in DIMENSIONS},
            "shares": {stage: share_of_terms(entries, TERMS[term]) for stage, entries in history.items()},
            "seconds": seconds,
            "device": self.device_name,
            **provenance(),
        }

    def real(self) -> dict[str, Any]:
        """Return the metrics of real held-out clips, which are what motion should be like."""
        benchmark = self.benchmark(self.pipeline(0), REAL)
        clips = real_clips(benchmark.prompts)
        found = measured(clips, clip_prompts(benchmark.prompts))
        return {"term": REAL, "seed": 0, "metrics": found, "seconds": 0.0, "device": "cpu", **provenance()}


@torch.no_grad()
def measured(clips: torch.Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Return the mean of each metric over clips [N, T, 3, H, W]."""
    found = {}
    for name in METRICS:
        metric = create_metric(name)
        parts = [
            metric(clips[start : start + AT_ONCE], prompts[start : start + AT_ONCE])
            for start in range(0, len(clips), AT_ONCE)
        ]
        found[name] = float(torch.cat(parts).nanmean())
    return found


def share_of_terms(history: Sequence[Mapping[str, float]], weights: Mapping[str, float]) -> dict[str, float]:
    """Return weight times term over the loss it goes with, in the mean over a stage's first and last tenth."""
    tenth = max(1, len(history) // 10)
    shares = {}
    for when, entries in (("first", history[:tenth]), ("last", history[-tenth:])):
        terms = [
            sum(weights[f"{name}_weight"] * entry.get(f"{name}_loss", 0.0) for name in _KINDS) for entry in entries
        ]
        losses = [entry.get("vsd_loss", 0.0) + entry.get("cd_loss", 0.0) for entry in entries]
        shares[when] = sum(terms) / sum(losses)
    return shares


_KINDS = ("temporal", "feature", "correspondence")


def summarise(results: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    """Return, for each term, metrics and dimensions over seeds, and those of real clips; also as a Markdown table."""
    rows: dict[str, Any] = {}
    for term in (REAL, *TERMS):
        mine = [result for result in results if result["term"] == term]
        if mine:
            found = {name: over_seeds([result["metrics"][name] for result in mine]) for name in METRICS}
            kept = DIMENSIONS if term != REAL else ()
            found |= {name: over_seeds([result["dimensions"][name] for result in mine]) for name in kept}
            rows[term] = {"seeds": sorted(result["seed"] for result in mine), **found}
    columns = (*METRICS, *DIMENSIONS)
    lines = [f"| term | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for term, found in rows.items():
        cells = [
            mean_cell(found[name], digits=1 if name in DIMENSIONS else 4) if name in found else "–" for name in columns
        ]
        lines.append(f"| {term} | {' | '.join(cells)} |")
    return {"rows": rows, **provenance()}, "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, measure, aggregate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--terms", nargs="+", default=list(TERMS), help=f"default: {' '.join(TERMS)}")
    add_options(parser, "temporal")
    options = parser.parse_args()
    for name in options.terms:
        if name not in TERMS:
            raise ConfigError(unknown_name("term", name, TERMS))
    if not options.summary:
        race = Terms.of(options)
        cells = [Cell(options.results / f"{REAL}-seed0.json", race.judged_with(), race.real)]
        cells += seed_cells(options.results, options.terms, options.seeds, race.trained_with, race.motion, "metrics")
        keep(cells)
    write_summary(options.results, *summarise(read_results(options.results, "*-seed*.json")))


if __name__ == "__main__":
    main()
