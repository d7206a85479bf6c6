"""Tune a student towards several metrics at once, each with its own weight.

    python -m recipes.multi_reward --metric digits.legibility=1 --metric quality.sharpness=0.3

One proxy predicts all rewards from latents; scores are standardised over each batch before they are weighed, so that
weights compare wishes and not units. A negative weight asks for less of a metric.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import distillation as ds
import latent_rewards as lr
from recipes.moving_digits.benchmark import training_prompts  # also registers digits.*


def weighted_metric(text: str) -> tuple[str, float]:
    """Read ``name=weight``."""
    name, _, weight = text.partition("=")
    try:
        return name, float(weight or 1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not name=weight with a number as weight") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and tune."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="runs/demo/student", help="folder of a student (default: %(default)s)")
    parser.add_argument("--output", default="runs/multi_reward", help="where the result goes (default: %(default)s)")
    parser.add_argument(
        "--metric",
        action="append",
        type=weighted_metric,
        metavar="NAME=WEIGHT",
        help="a metric and its weight; may be repeated (default: digits.legibility=1 and quality.sharpness=0.3)",
    )
    parser.add_argument("--queries", type=int, default=1024, help="true scores before tuning (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=100, help="updates of the student (default: %(default)s)")
    options = parser.parse_args(arguments)
    weights = dict(options.metric or [("digits.legibility", 1.0), ("quality.sharpness", 0.3)])

    student = ds.FewStepStudent.from_pretrained(options.student)
    prompts = training_prompts(2048, seed=0)
    codec = student.exporter.codec
    oracle = lr.MetricOracle(codec, list(weights))
    dataset = lr.collect_rewards(student, prompts, oracle, num_samples=options.queries, seed=0)
    proxy = lr.train_proxy(dataset, encode=lambda texts: student.encode(texts).embeddings, codec=codec)

    trainer = lr.ReinforceTrainer(
        student,
        proxy,
        prompts,
        config=lr.LROConfig(num_updates=options.updates, learning_rate=5e-5),
        reward=lr.WeightedSum(weights, normalize="zscore"),
        oracle=oracle,
        dataset=dataset,
        holdout=lr.MetricOracle(codec, ["digits.legibility_holdout"]),
    )
    result = trainer.train()
    first, last = result.true_curve[0]["true"], result.true_curve[-1]["true"]
    for name in weights:
        print(f"{name}: true mean {first[name]:.4f} -> {last[name]:.4f} ({result.num_queries} queries while tuning)")
    student.save_pretrained(options.output)
    print(f"student written to {options.output}")


if __name__ == "__main__":
    main()
