"""Raise one metric while others keep their level: more legible digits that go on moving.

    python -m recipes.constrained --raise digits.legibility --keep motion.dynamic_degree=0.98

Tuning towards one metric alone often pays with another, motion above all: a still clip is easy to read. Here the other
metrics have floors, a share of what the student reached before tuning, and each floor has a price that is learnt: it
rises while true scores say that the floor is missed and falls back once it is kept. The page shows both. A metric of
which less is better is lowered as ``--raise``, and refused as ``--keep``.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import latent_rewards as lr
from distillation.families.export import check_target, load_student
from latent_rewards.contracts import ConfigError
from latent_rewards.report import Report
from latent_rewards.training.devices import choose_device
from latent_rewards.tuning_page import add_tuning
from recipes.moving_digits.benchmark import training_prompts  # also registers digits.*
from recipes.page import REPORT


def kept_metric(text: str) -> tuple[str, float]:
    """Read ``name=share``."""
    name, _, share = text.partition("=")
    try:
        return name, float(share or 0.98)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not name=share with a number as share") from error


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="runs/demo/student", help="folder of a student (default: %(default)s)")
    parser.add_argument("--output", default="runs/constrained", help="where the result goes (default: %(default)s)")
    parser.add_argument(
        "--raise", dest="raised", default="digits.legibility", help="the metric to improve (default: %(default)s)"
    )
    parser.add_argument(
        "--keep",
        action="append",
        type=kept_metric,
        metavar="NAME=SHARE",
        help="a metric and the share of its mean to keep; may be repeated (default: motion.dynamic_degree=0.98)",
    )
    parser.add_argument("--price-rate", type=float, default=0.1, help="how fast prices move (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=1024, help="true scores before tuning (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=100, help="updates of the student (default: %(default)s)")
    parser.add_argument("--device", help="such as cpu, cuda or cuda:1 (default: an accelerator if there is one)")
    return parser.parse_args(arguments)


def constraint(
    before: lr.RewardDataset, raised: str, kept: dict[str, float], *, price_rate: float, falls: bool
) -> lr.Lagrangian:
    """Return the reward: ``raised`` (its negative if it ``falls``), and floors at shares of the means of ``before``."""
    # In standard deviations of the student's own samples, so that prices compare wishes and not units.
    units = {name: float(values[~values.isnan()].std()) for name, values in before.rewards.items()}
    return lr.Lagrangian(
        lr.WeightedSum({raised: (-1 if falls else 1) / units[raised]}),
        lr.relative_floors(before, kept),
        units={name: units[name] for name in kept},
        baselines=lr.true_means(before, kept),
        initial=1.0,
        learning_rate=price_rate,
        damping=10 * price_rate,
        smoothing=0.5,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and tune."""
    options = read_options(arguments)
    kept = dict(options.keep or [("motion.dynamic_degree", 0.98)])
    device = choose_device(options.device)
    check_target(Path(options.output))

    student = load_student(options.student, device=device)
    prompts = training_prompts(2048, seed=0)
    names = [options.raised, *kept]
    codec = student.exporter.codec
    oracle = lr.MetricOracle(codec, names)
    if falling := sorted(oracle.lower_is_better & kept.keys()):
        raise ConfigError(
            f"--keep {falling[0]}: less of it is better, and a floor would hold it up; keep a metric of which more is "
            "better, or register its negative as one of your own (recipes/custom_metric.py)"
        )
    before = lr.collect_rewards(student, prompts, oracle, num_samples=options.queries, seed=0)
    proxy = lr.train_proxy(
        before,
        config=lr.ProxyConfig(trunk="pixels", device=options.device),
        encode=lambda texts: student.encode(texts).embeddings,
        codec=codec,
    )
    falls = options.raised in oracle.lower_is_better
    reward = constraint(before, options.raised, kept, price_rate=options.price_rate, falls=falls)
    trainer = lr.ReinforceTrainer(
        student,
        proxy,
        prompts,
        config=lr.LROConfig(
            num_updates=options.updates, learning_rate=5e-5, holdout_every=10, patience=None, device=options.device
        ),
        reward=reward,
        oracle=oracle,
        dataset=before,
        holdout=oracle,  # brings back the best student that keeps the floors; its scores come on top
    )
    result = trainer.train()
    student.save_pretrained(options.output)

    after = lr.collect_rewards(student, prompts, oracle, num_samples=options.queries, seed=1)
    rows = []
    for name in names:
        means = [float(dataset.rewards[name].nanmean()) for dataset in (before, after)]
        rows.append([name, *means, reward.floors.get(name), reward.multipliers.get(name)])
        print(f"{name}: true mean {means[0]:.4f} -> {means[1]:.4f}, floor {reward.floors.get(name)}")
    report = Report("Raise one, keep the others").add_table(
        ["metric", "before", "after", "floor", "price"], rows, f"True means of {options.queries} samples.", decimals=3
    )
    add_tuning(report, "reinforce", dataclasses.asdict(result))
    print(f"student written to {options.output}, report: {report.save(Path(options.output) / REPORT)}")


if __name__ == "__main__":
    main()
