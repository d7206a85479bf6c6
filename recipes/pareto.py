"""One run, a whole Pareto front: a student that is told how much each of two metrics counts.

    python -m recipes.pareto --metric digits.legibility --metric quality.sharpness

While tuning, every prompt draws its own weights; the student sees them through small additions to its layers and is
rewarded with the same weights. Afterwards the weights are a dial: the page shows the front that turning it gives, and
``lr.WeightConditioned.from_pretrained(student, folder).at({"digits.legibility": 0.3, ...})`` is the student of any.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import latent_rewards as lr
from distillation.families.export import load_student
from latent_rewards.contracts import ConfigError
from latent_rewards.lro.pareto import WEIGHTS
from latent_rewards.report import Report
from latent_rewards.training.checkpoint import check_target
from latent_rewards.training.devices import choose_device
from latent_rewards.tuning_page import add_tuning
from recipes.moving_digits.benchmark import training_prompts  # also registers digits.*
from recipes.page import REPORT


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="runs/demo/student", help="folder of a student (default: %(default)s)")
    parser.add_argument("--output", default="runs/pareto", help="where the result goes (default: %(default)s)")
    parser.add_argument(
        "--metric", action="append", help="one of two (default: digits.legibility and motion.dynamic_degree)"
    )
    parser.add_argument("--points", type=int, default=5, help="points of the front shown (default: %(default)s)")
    parser.add_argument("--scored", type=int, default=128, help="samples scored per point (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=4, help="of each layer's addition (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=1024, help="true scores before tuning (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=150, help="updates of the student (default: %(default)s)")
    parser.add_argument("--device", help="such as cpu, cuda or cuda:1 (default: an accelerator if there is one)")
    options = parser.parse_args(arguments)
    options.metric = options.metric or ["digits.legibility", "motion.dynamic_degree"]
    if len(options.metric) != 2 or options.points < 2:
        parser.error("a front on a page has two metrics and at least two points")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and tune."""
    options = read_options(arguments)
    first, second = options.metric
    device = choose_device(options.device)
    check_target(options.output, WEIGHTS)

    student = load_student(options.student, device=device)
    prompts = training_prompts(2048, seed=0)
    codec = student.exporter.codec
    oracle = lr.MetricOracle(codec, options.metric)
    if falling := sorted(oracle.lower_is_better):
        raise ConfigError(
            f"--metric {falling[0]}: less of it is better, and a front is of metrics of which more is; take such a "
            "one, or register its negative as one of your own (recipes/custom_metric.py)"
        )
    before = lr.collect_rewards(student, prompts, oracle, num_samples=options.queries, seed=0)
    proxy = lr.train_proxy(
        before,
        config=lr.ProxyConfig(trunk="pixels", device=options.device),
        encode=lambda texts: student.encode(texts).embeddings,
        codec=codec,
    )

    # In standard deviations of the student's own samples, so that weights compare wishes and not units.
    units = {name: float(values[~values.isnan()].std()) for name, values in before.rewards.items()}
    policy = lr.WeightConditioned(student, options.metric, rank=options.rank)
    trainer = lr.ReinforceTrainer(
        policy,
        proxy,
        prompts,
        config=lr.LROConfig(num_updates=options.updates, learning_rate=1e-3, device=options.device),
        reward=lr.PreferredReward({name: units[name] for name in options.metric}),
        oracle=oracle,
        dataset=before,
    )
    result = trainer.train()
    policy.save_pretrained(options.output)

    def means(weights: dict[str, float]) -> list[float]:
        scored = lr.collect_rewards(policy.at(weights), prompts, oracle, num_samples=options.scored, seed=1)
        return [float(scored.rewards[name].nanmean()) for name in options.metric]

    shares = [i / (options.points - 1) for i in range(options.points)]
    front = [means({first: share, second: 1 - share}) for share in shares]
    start = [float(before.rewards[name].nanmean()) for name in options.metric]
    add_front(page := Report("One student, many wishes"), options, shares, front, start)
    add_tuning(page, "reinforce", dataclasses.asdict(result))
    print(f"additions written to {options.output}, report: {page.save(Path(options.output) / REPORT)}")


def add_front(
    page: Report,
    options: argparse.Namespace,
    shares: Sequence[float],
    front: Sequence[Sequence[float]],
    start: Sequence[float],
) -> None:
    """Add table and chart of a front: the true means of both metrics at shares of the first, and at the start."""
    first, second = options.metric
    kept = lr.non_dominated(front).tolist()
    volume = lr.hypervolume(front, start)
    rows: list[list[Any]] = [
        [f"{share:.2f}", *point, "yes" if best else "no"]
        for share, point, best in zip(shares, front, kept, strict=True)
    ]
    rows.append(["before tuning", *start, None])
    page.add_table(
        [f"weight of {first}", first, second, "on the front"],
        rows,
        f"True means of {options.scored} samples. What the front gains over the student before tuning (hypervolume): "
        f"{volume:.4g}.",
        decimals=3,
    )
    line = sorted(point for point, best in zip(front, kept, strict=True) if best)
    curves = {"front": tuple(zip(*line, strict=True)), "before tuning": ([start[0]], [start[1]])}
    page.add_curves("Pareto front", curves, first, second)
    print(f"hypervolume over the student before tuning: {volume:.4g}, {sum(kept)} of {len(kept)} points on the front")


if __name__ == "__main__":
    main()
