"""The digits benchmark: the pipeline for several training seeds, evaluated in full; ``python -m benchmarks.digits``.

Each seed is a resumable run below ``runs/`` and ends in ``results/<name>/seed<k>.json``; a finished run, as that
of ``make demo``, is only read. ``--summary`` aggregates what is there into ``summary.json`` and ``summary.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.result_files import RESULTS, add_results, read_result, read_results, write_result, write_summary
from benchmarks.seeds import mean_cell, over_seeds
from latent_rewards.training.settings import read_settings
from recipes.dollar import SECTIONS, Dollar, counted
from recipes.moving_digits.benchmark import TUNED, DigitsBenchmark
from recipes.moving_digits.evaluation import compare

CONFIG = "recipes/configs/moving_digits_full.yaml"
TEACHER, DISTILLED = "teacher, 50 steps", "VSD→CD"
SCORES = ("total", "quality", "semantic", "diversity", "frechet", "accuracy/digit", TUNED)


def seeded(config: str, seed: int) -> dict[str, Any]:
    """Return the settings of one seed's run; the configuration's own seed keeps the configuration's name."""
    settings = read_settings(config, SECTIONS)
    run = settings["run"]
    name = run.name if seed == run.seed else f"{run.name}-seed{seed}"
    settings["run"] = dataclasses.replace(run, name=name, seed=seed)
    return settings


def run_seed(settings: dict[str, Any], picture: Path) -> dict[str, Any]:
    """Run (or resume) the pipeline; return rows, paired differences and the facts of tuning, and draw a picture."""
    pipeline = Dollar(settings)
    pipeline.run()
    benchmark = pipeline.benchmark()
    assert isinstance(benchmark, DigitsBenchmark)  # noqa: S101 - the configuration's world
    benchmark.load_rows()
    draw(benchmark, picture)
    differences = {
        f"{label} minus {base}": paired(benchmark, base, label)
        for base in (TEACHER, untuned(benchmark.rows))
        for label in benchmark.rows
        if label != base and label.startswith("VSD")
    }
    return {
        "seed": settings["run"].seed,
        "rows": told_rows(benchmark),
        "differences": differences,
        "proxy": json.loads((pipeline.folder.path / "proxy_report.json").read_text()),
        "tuning": {name: tuning_facts(pipeline.folder.path, name) for name in settings["run"].trainers},
        **provenance(),
    }


def untuned(rows: Iterable[str]) -> str:
    """Return the label of the student before its tuning, at the most steps that it is scored at."""
    counts = [int(label.split()[-2]) for label in rows if label.startswith(f"{DISTILLED}, ")]
    return f"{DISTILLED}, {counted(max(counts))}"


def tuned_by(trainer: str, label: str) -> str:
    """Return the label of what a trainer made of the student ``label``, at as many steps."""
    return label.replace(DISTILLED, f"{DISTILLED}→LRO ({trainer})")


def told_rows(benchmark: DigitsBenchmark) -> dict[str, Any]:
    """Return what results tell of rows, with the commit that measured each where it is known."""
    return {
        label: {
            "scores": row.evaluation.scores,
            "seconds": row.seconds,
            "network_evaluations": row.network_evaluations,
            **({"commit": row.commit} if row.commit else {}),
        }
        for label, row in benchmark.rows.items()
    }


def draw(benchmark: DigitsBenchmark, path: Path, num_clips: int = 6, every: int = 4) -> None:
    """Write a picture of the main rows: some frames of the first clips, a row per method."""
    from matplotlib import pyplot

    chosen = [row for row in benchmark.rows.values() if not row.label.startswith(("VAE", "VSD, ", "teacher, 4"))]
    figure, axes = pyplot.subplots(len(chosen), 1, figsize=(9, 0.62 * len(chosen)), squeeze=False)
    for axis, row in zip(axes[:, 0], chosen, strict=True):
        frames = row.shown[:num_clips, ::every]
        axis.imshow(frames.permute(3, 0, 1, 4, 2).flatten(1, 3).clamp(0, 1).numpy())
        axis.set_axis_off()
        axis.text(-8, 16, row.label, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def paired(benchmark: DigitsBenchmark, base: str, label: str) -> dict[str, dict[str, float]]:
    """Return ``label`` minus ``base`` for the main scores, with 95 % intervals over prompts."""
    intervals = compare(benchmark.rows[base].evaluation, benchmark.rows[label].evaluation, benchmark.reference)
    return {name: dataclasses.asdict(intervals[name]) for name in SCORES}


def tuning_facts(folder: Path, name: str) -> dict[str, Any]:
    """Return queries, best update, seconds (without resumed parts) and the proxy-true gaps of a tuning run."""
    result = json.loads((folder / f"lro_{name}" / "result.json").read_text())
    kept = ("num_queries", "best_step", "stopped_early", "seconds", "true_curve", "holdout_curve")
    return {key: result[key] for key in kept}


def summarise(results: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    """Return what :func:`run_seed` returned, over seeds, as a summary and as Markdown tables.

    Rows and paired differences become mean and standard deviation over seeds; ``gap_closed`` is the share of the
    legibility between the untuned student and real clips that each trainer won.
    """
    rows = mean_scores([{label: row["scores"] for label, row in result["rows"].items()} for result in results])
    differences = mean_scores([point_differences(result["differences"]) for result in results])
    tuning = {name: _tuning(results, name) for name in results[0]["tuning"]}
    told = [result["proxy"][TUNED] for result in results]
    proxy = {key: over_seeds([entry[key] for entry in told]) for key in ("spearman", "r2", "mae")}
    proxy["ridge_spearman"] = over_seeds([entry["ridge"]["spearman"] for entry in told])
    summary = {"seeds": [result["seed"] for result in results], "rows": rows, "differences": differences}
    student = untuned(rows)
    mixed = f"{counted(1)} minus {student}" if student != f"{DISTILLED}, {counted(1)}" else None
    compared = {pair: values for pair, values in differences.items() if mixed is None or mixed not in pair}
    lines = [*score_table("method", rows), "", *score_table("difference", compared), "", *_tuning_table(tuning)]
    return {**summary, "tuning": tuning, "proxy": proxy, **provenance()}, "\n".join(lines) + "\n"


def mean_scores(tables: list[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the main scores of each row, mean and standard deviation over one table per training seed."""
    return {
        label: {score: over_seeds([table[label][score] for table in tables]) for score in SCORES} for label in tables[0]
    }


def point_differences(pairs: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Return what :func:`paired` gives for each pair, without the intervals."""
    return {pair: {score: told["difference"] for score, told in scores.items()} for pair, scores in pairs.items()}


def _tuning(results: Sequence[Mapping[str, Any]], name: str) -> dict[str, dict[str, float]]:
    """Return, over seeds, how far a trainer closed the gap, what it took, and how honest the proxy was at the end."""
    facts: dict[str, list[float]] = {}
    for result in results:
        student = untuned(result["rows"])
        labels = "real clips", student, tuned_by(name, student)
        real, before, after = (result["rows"][label]["scores"][TUNED] for label in labels)
        told = result["tuning"][name]
        last = told["true_curve"][-1]
        values = {
            "gap_closed": (after - before) / (real - before),
            "num_queries": told["num_queries"],
            "best_step": told["best_step"],
            "seconds": told["seconds"],
            "proxy_gap": last["proxy"][TUNED] - last["true"][TUNED],
            "proxy_mae": last["mae"][TUNED],
        }
        for key, value in values.items():
            facts.setdefault(key, []).append(value)
    return {key: over_seeds(values) for key, values in facts.items()}


def score_table(first: str, rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Return the lines of a Markdown table of the main scores; ``first`` heads the column of the rows' names."""
    titles = dict(
        zip(SCORES, ("total", "quality", "semantic", "diversity", "Fréchet", "digit", "legibility"), strict=True)
    )
    lines = [f"| {first} | " + " | ".join(titles.values()) + " |", "|---" * (len(titles) + 1) + "|"]
    for label, scores in rows.items():
        cells = [mean_cell(scores[score], 100 if score == TUNED else 1) for score in SCORES]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def _tuning_table(tuning: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    lines = ["| trainer | gap closed, % | queries | seconds | proxy − true | proxy error |", "|---" * 6 + "|"]
    for name, facts in tuning.items():
        scales = {"gap_closed": 100, "num_queries": 1, "seconds": 1, "proxy_gap": 1, "proxy_mae": 1}
        digits = {"proxy_gap": 3, "proxy_mae": 3}
        cells = [mean_cell(facts[key], scale, digits.get(key, 0)) for key, scale in scales.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def write_seed(path: Path, result: Mapping[str, Any]) -> None:
    """Write a seed's result, but for one that is there already: its provenance is that of its measurement."""
    if not (path.is_file() and _measured(read_result(path)) == _measured(result)):
        write_result(path, result)


def _measured(result: Mapping[str, Any]) -> str:
    """Return a result without its provenance, as text: NaN equals NaN."""
    made = provenance().keys()
    return json.dumps({key: value for key, value in result.items() if key not in made}, sort_keys=True)


def main() -> None:
    """Read the command line, run the seeds, aggregate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="training seeds (default: 0 1 2)")
    parser.add_argument("--config", default=CONFIG, help="settings of each run (default: %(default)s)")
    parser.add_argument("--summary", action="store_true", help="only aggregate the results that are there")
    add_results(parser, None, "where results are written (default: benchmarks/results/NAME, that of the settings)")
    options = parser.parse_args()
    results = options.results or RESULTS / read_settings(options.config, SECTIONS)["run"].name
    results.mkdir(parents=True, exist_ok=True)
    for seed in [] if options.summary else options.seeds:
        result = run_seed(seeded(options.config, seed), results / f"seed{seed}.png")
        write_seed(results / f"seed{seed}.json", result)
    write_summary(results, *summarise(read_results(results, "seed*.json")))


if __name__ == "__main__":
    main()
