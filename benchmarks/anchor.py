"""What the anchor does without a reward: ``python -m benchmarks.anchor``.

During reward optimisation the anchor goes on distilling at a falling rate, which by itself changes the student. Here
a finished run of the digits benchmark is tuned again with every reward capped to the same value, so that only anchor
and KL are left; the result is compared with the student it starts from and with the one that was tuned on the reward.
"""

from __future__ import annotations

import argparse
import dataclasses

from benchmarks.digits import CONFIG, paired, seeded, tuned_by, untuned
from benchmarks.provenance import provenance
from benchmarks.result_files import RESULTS, add_results, write_result
from latent_rewards.training.run_folder import RunFolder
from recipes.dollar import Dollar, counted
from recipes.moving_digits.benchmark import DigitsBenchmark

TRAINER = "differentiable"


def main() -> None:
    """Tune without a reward, score, compare, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of a run that benchmarks.digits finished (default: 0)")
    add_results(parser, RESULTS / "anchor.json", "file that the result is written into")
    parser.add_argument("--config", default=CONFIG, help="settings of that run (default: %(default)s)")
    options = parser.parse_args()
    settings = seeded(options.config, options.seed)
    pipeline = Dollar(settings)
    pipeline.folder.remember(pipeline.remembered())
    student = pipeline.load_student(pipeline.folder.path / "student")
    dataset = pipeline.collect(student)
    proxy = pipeline.fit(dataset)
    benchmark = pipeline.benchmark()
    assert isinstance(benchmark, DigitsBenchmark)  # noqa: S101 - the configuration's world
    benchmark.load_rows()
    # Scores lie about [0, 1]: capped far below they are all alike. Without a holdout, nothing is rolled back.
    pipeline.settings = {**settings, "lro": dataclasses.replace(settings["lro"], reward_cap=-10.0)}
    pipeline.holdout, pipeline.folder = None, RunFolder(pipeline.folder.path / "anchor_alone")
    pipeline.folder.remember(pipeline.remembered())
    benchmark.folder = pipeline.folder.path / "evaluation"  # the run's own table stays as it is
    anchored, _ = pipeline.tune(TRAINER, student, proxy, dataset)
    steps = settings["run"].num_steps
    alone, before = f"anchor alone, {counted(steps)}", untuned(benchmark.rows)
    tuned = tuned_by(TRAINER, before)
    benchmark.add(alone, pipeline.student_sampler(anchored, steps), num_steps=steps, network_evaluations=steps)
    result = {
        "seed": options.seed,
        "scores": {label: benchmark.rows[label].evaluation.scores for label in (before, alone, tuned)},
        "anchor alone minus student": paired(benchmark, before, alone),
        "tuned minus anchor alone": paired(benchmark, alone, tuned),
        **provenance(),
    }
    write_result(options.results, result)
    print(f"written to {options.results}")


if __name__ == "__main__":
    main()
