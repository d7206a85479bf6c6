"""Distillation alone, for several training seeds, scored in full: ``python -m benchmarks.distillation``.

The first two stages (VSD, then CD) under a configuration of the digits world, at the steps it names and at one, beside
the 50-step teacher. Runs are those of :mod:`benchmarks.digits`, which continues from them. Each seed ends in
``results/distillation/<name>/seed<k>.json``; ``--summary`` only aggregates what is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.digits import TEACHER, mean_scores, paired, point_differences, score_table, seeded, write_seed
from benchmarks.provenance import provenance
from benchmarks.result_files import RESULTS, add_results, read_results, write_summary
from latent_rewards.training.settings import read_settings
from recipes.dollar import SECTIONS, Dollar, counted
from recipes.moving_digits.benchmark import DigitsBenchmark

ONE_STEP = "recipes/configs/moving_digits_one_step.yaml"


def run_seed(settings: dict[str, Any]) -> dict[str, Any]:
    """Distil (or load), score and compare one training seed."""
    pipeline = Dollar(settings)
    pipeline.folder.remember(pipeline.remembered())
    students = {"VSD": pipeline.distil("student_vsd", cd_steps=0), "VSD→CD": pipeline.distil("student")}
    benchmark = pipeline.benchmark()
    assert isinstance(benchmark, DigitsBenchmark)  # noqa: S101 - the configuration's world
    guidance = float(settings["run"].guidance_scale)
    benchmark.add(TEACHER, pipeline.teacher_sampler(50, guidance), num_steps=1, network_evaluations=100)
    for label, student in students.items():
        for steps in sorted({1, settings["run"].num_steps}, reverse=True):
            sampler = pipeline.student_sampler(student, steps)
            benchmark.add(f"{label}, {counted(steps)}", sampler, num_steps=steps, network_evaluations=steps)
    commits = {label: row.commit for label, row in benchmark.rows.items() if row.commit}
    return {
        "seed": settings["run"].seed,
        "rows": {label: row.evaluation.scores for label, row in benchmark.rows.items()},
        **({"commits": commits} if commits else {}),
        "differences": {
            f"{label} minus {TEACHER}": paired(benchmark, TEACHER, label)
            for label in benchmark.rows
            if label.startswith("VSD")
        },
        **provenance(),
    }


def summarise(results: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    """Return mean and standard deviation over seeds of rows and paired differences, and the same as Markdown."""
    rows = mean_scores([result["rows"] for result in results])
    differences = mean_scores([point_differences(result["differences"]) for result in results])
    lines = [*score_table("method", rows), "", *score_table("difference", differences)]
    summary = {"seeds": [result["seed"] for result in results], "rows": rows, "differences": differences}
    return {**summary, **provenance()}, "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, run the seeds, aggregate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="training seeds (default: 0 1 2)")
    parser.add_argument("--config", default=ONE_STEP, help="settings of each run (default: %(default)s)")
    parser.add_argument("--summary", action="store_true", help="only aggregate the results that are there")
    add_results(parser, None, "where results are written (default: below benchmarks/results/distillation)")
    options = parser.parse_args()
    results = options.results or RESULTS / "distillation" / read_settings(options.config, SECTIONS)["run"].name
    for seed in [] if options.summary else options.seeds:
        write_seed(results / f"seed{seed}.json", run_seed(seeded(options.config, seed)))
    write_summary(results, *summarise(read_results(results, "seed*.json")))


if __name__ == "__main__":
    main()
