"""Tune a student towards several metrics at once, each with its own weight.

    python -m recipes.multi_reward --metric digits.legibility=1 --metric quality.sharpness=0.3

One proxy predicts all rewards from latents; scores are standardised over each batch before they are weighed, so that
weights compare wishes and not units. A negative weight asks for less of a metric; without a weight it is 1, and -1 for
a metric of which less is better.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import latent_rewards as lr
from distillation.families.export import check_target, load_student
from latent_rewards.training.devices import choose_device
from recipes.moving_digits.benchmark import training_prompts  # also registers digits.*


def weighted_metric(text: str) -> tuple[str, float | None]:
    """Read ``name=weight``, or ``name`` alone."""
    name, _, weight = text.partition("=")
    try:
        return name, float(weight) if weight else None
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not name=weight with a number as weight") from error


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="runs/demo/student", help="folder of a student (default: %(default)s)")
    parser.add_argument("--output", default="runs/multi_reward", help="where the result goes (default: %(default)s)")
    parser.add_argument(
        "--metric",
        action="append",
        type=weighted_metric,
        metavar="NAME=WEIGHT",
        help="a metric and its weight (default: 1, and -1 where less is better); may be repeated (default: "
        "digits.legibility=1 and quality.sharpness=0.3)",
    )
    parser.add_argument("--queries", type=int, default=1024, help="true scores before tuning (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=100, help="updates of the student (default: %(default)s)")
    parser.add_argument("--device", help="such as cpu, cuda or cuda:1 (default: an accelerator if there is one)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and tune."""
    options = read_options(arguments)
    wanted: dict[str, float | None] = dict(options.metric or [("digits.legibility", 1), ("quality.sharpness", 0.3)])
    device = choose_device(options.device)
    check_target(Path(options.output))

    student = load_student(options.student, device=device)
    prompts = training_prompts(2048, seed=0)
    codec = student.exporter.codec
    oracle = lr.MetricOracle(codec, list(wanted))
    before = lr.collect_rewards(student, prompts, oracle, num_samples=options.queries, seed=0)
    proxy = lr.train_proxy(
        before,
        config=lr.ProxyConfig(trunk="pixels", device=options.device),
        encode=lambda texts: student.encode(texts).embeddings,
        codec=codec,
    )
    usual = {name: -1.0 if name in oracle.lower_is_better else 1.0 for name in wanted}
    weights = {name: usual[name] if weight is None else weight for name, weight in wanted.items()}

    trainer = lr.ReinforceTrainer(
        student,
        proxy,
        prompts,
        config=lr.LROConfig(num_updates=options.updates, learning_rate=5e-5, device=options.device),
        reward=lr.WeightedSum(weights, normalize="zscore"),
        oracle=oracle,
        dataset=before,
        holdout=lr.MetricOracle(codec, ["digits.legibility_holdout"]),
    )
    result = trainer.train()
    student.save_pretrained(options.output)
    print(f"student written to {options.output}, {result.num_queries} true scores while tuning")

    after = lr.collect_rewards(student, prompts, oracle, num_samples=options.queries, seed=1)
    for name, weight in weights.items():
        means = [float(dataset.rewards[name].nanmean()) for dataset in (before, after)]
        print(f"{name}, weight {weight:g}: true mean {means[0]:.4f} -> {means[1]:.4f}")


if __name__ == "__main__":
    main()
