"""Two rewards: a floor, and a front; ``python -m benchmarks.constraints --student runs/demo/student``.

``digits.legibility`` is raised while ``motion.dynamic_degree`` should not fall below the untuned student's, less 2 %:
once without a floor, once with a floor whose price is learnt (:class:`latent_rewards.Lagrangian`), each with all
weights and with LoRA adapters. And both are raised, once by one student that is told how much each counts
(:class:`latent_rewards.WeightConditioned`), and once by a sweep of students, one for each weighting, with as many
updates in all and nearly as many true scores. What is told is true means on samples of prompts whose combinations of
attributes nothing was trained on.

Each (part, seed) is one file below ``results/constraints/``; a killed run goes on. ``--summary`` makes a table.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import latent_rewards as lr
from benchmarks.provenance import provenance
from benchmarks.result_files import keep, read_results, seed_cells, write_summary
from benchmarks.seeds import over_seeds
from benchmarks.tuning import NUM_STEPS, Method, TuningWorld, add_options, open_samples
from latent_rewards.contracts import ConfigError, unknown_name
from recipes.moving_digits.benchmark import TUNED

GUARDED = "motion.dynamic_degree"
SEEDS = (0, 1, 2)
LABELS = 512
SHARE = 0.98
"""Of the student's mean of the guarded reward, the floor."""
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the tuned reward along the front; the guarded one has the rest."""
HELDIN = "heldin"
"""Key of a point's means on held-in prompts, by which a weight may be chosen."""
MARGIN = 0.1
"""The corner that hypervolumes are measured from lies so much below the student in both rewards."""
RATES = {
    "free": 1.5e-4,
    "floor": 1.5e-4,
    "free_adapters": 1e-3,
    "floor_adapters": 7e-4,
    "sweep": 1.5e-4,
    "front": 1e-3,
}
PARTS = tuple(RATES)
RANK = 8
"""Of the adapters, and of what the weights of rewards add to a layer along the front."""


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        updates: of each part in all.
        judged: samples of held-out prompts for each mean.
        refresh_every: updates between refreshes.
    """

    updates: int = 100
    judged: int = 400
    refresh_every: int = 4


class Trade:
    """Tunes a student on two rewards.

    Args:
        world: with both rewards.
        sizes: see :class:`Sizes`.
    """

    def __init__(self, world: TuningWorld, sizes: Sizes) -> None:
        self.world, self.sizes = world, sizes

    def measured_with(self, part: str) -> dict[str, Any]:
        """Return the settings of a part's results."""
        own = {"learning_rate": RATES[part], "floor": SHARE, "weights": WEIGHTS, "rank": RANK, "labels": LABELS}
        return {**self.world.measured_with(), **vars(self.sizes), **own}

    def measure(self, part: str, seed: int) -> dict[str, Any]:
        """Return the points of a part, each with the true means of both rewards."""
        begun = time.perf_counter()
        dataset = self.world.dataset(seed, LABELS)
        units = {name: float(values.std()) for name, values in dataset.rewards.items()}
        floors = lr.relative_floors(dataset, {GUARDED: SHARE})
        points = {
            "free": lambda: [self._tuned(part, seed, lr.WeightedSum({TUNED: 1 / units[TUNED]}))],
            "floor": lambda: [self._tuned(part, seed, self._lagrangian(floors, units, dataset))],
            "sweep": lambda: self._sweep(seed, units),
            "front": lambda: self._front(seed, units),
        }[part.removesuffix("_adapters")]()
        return {
            "part": part,
            "seed": seed,
            "student": {**self._means(self.world.student), HELDIN: self._means(self.world.student, heldin=True)},
            "points": points,
            "share": SHARE,
            "seconds": time.perf_counter() - begun,
            "device": self.world.device_name,
            **provenance(),
        }

    @staticmethod
    def _lagrangian(
        floors: Mapping[str, float], units: Mapping[str, float], dataset: lr.RewardDataset
    ) -> lr.Lagrangian:
        return lr.Lagrangian(
            lr.WeightedSum({TUNED: 1 / units[TUNED]}),
            floors,
            units={name: units[name] for name in floors},
            baselines=lr.true_means(dataset, floors),
            initial=1.0,
            learning_rate=0.1,
            damping=2.0,
            smoothing=0.5,
        )

    def _sweep(self, seed: int, units: Mapping[str, float]) -> list[dict[str, float]]:
        """Tune a student for each weighting, with a share of the updates each."""
        points = []
        for weight in WEIGHTS:
            reward = lr.WeightedSum({TUNED: weight / units[TUNED], GUARDED: (1 - weight) / units[GUARDED]})
            points.append({"weight": weight, **self._tuned(f"sweep-{weight:g}", seed, reward, len(WEIGHTS))})
        return points

    def _front(self, seed: int, units: Mapping[str, float]) -> list[dict[str, float]]:
        """Tune one student for all weightings."""
        policy = lr.WeightConditioned(copy.deepcopy(self.world.student), (TUNED, GUARDED), rank=RANK, seed=seed)
        policy.to(self.world.device)
        self._train("front", seed, policy, lr.PreferredReward({TUNED: units[TUNED], GUARDED: units[GUARDED]}))
        points = []
        for weight in WEIGHTS:
            at = policy.at({TUNED: weight, GUARDED: 1 - weight})
            points.append({"weight": weight, **self._means(at), HELDIN: self._means(at, heldin=True)})
        return points

    def _tuned(self, name: str, seed: int, reward: Any, parts: int = 1) -> dict[str, float]:  # noqa: ANN401 - a Reward
        policy = copy.deepcopy(self.world.student)
        self._train(name, seed, policy, reward, parts)
        return self._means(policy)

    def _train(self, name: str, seed: int, policy: Any, reward: Any, parts: int = 1) -> None:  # noqa: ANN401
        method = Method("LRO, gradient", "refreshed", LABELS, {"estimator": "pathwise"})
        config = lr.LROConfig(
            estimator="pathwise",
            num_updates=self.sizes.updates // parts,
            learning_rate=RATES[name.partition("-")[0]],
            adapter_rank=RANK if name.endswith("_adapters") else None,
            prompts_per_update=6,
            num_generations=4,
            step_counts=[NUM_STEPS],
            head_std=0.3,
            reward_cap=1.0,
            refresh_every=self.sizes.refresh_every,
            refresh_queries=64,
            refresh_steps=16,
            seed=seed,
            output_dir=str(self.world.folder / f"{name}-{self.sizes.updates}-seed{seed}" / "lro"),
            checkpoint_every=20,
            device=self.world.device,
            progress=False,
        )
        self.world.trainer(method, policy, config, reward=reward).train()

    def _means(self, policy: Any, *, heldin: bool = False) -> dict[str, float]:  # noqa: ANN401 - any policy
        prompts = (self.world.heldin_prompts if heldin else self.world.heldout_prompts)(self.sizes.judged)
        return self.world.true_scores(policy, prompts, "constraints")


def chosen(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the point of a part: the only one, or on a front the best that keeps the floor on held-in prompts.

    None where that is not known, or none keeps it.
    """
    points: list[Mapping[str, Any]] = result["points"]
    if len(points) == 1:
        return points[0]
    if HELDIN not in points[0]:
        return None
    floor = result["share"] * result["student"][HELDIN][GUARDED]
    kept = [point for point in points if point[HELDIN][GUARDED] >= floor]
    return max(kept, key=lambda point: point[HELDIN][TUNED], default=None)


def told(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what one seed's parts say; a part that is missing leaves its numbers out.

    Returns:
        Of each way to tune (``free``, ``floor``, and both with ``_adapters``) that is not the first, ``<way>_gain``:
        its gain in the tuned reward over that of all weights without a floor; of those without a floor
        ``<way>_change``: the relative change of the guarded reward; of those with one ``<way>_violation``: by what
        share of itself the floor is missed, 0 if it is not; likewise of the weight on the front that keeps the floor
        on held-in prompts (:func:`chosen`). ``front`` and ``sweep``: hypervolumes.
    """
    parts = {result["part"]: result for result in results}
    start = next(iter(parts.values()))["student"]
    values: dict[str, float] = {}
    for part in ("free", "floor", "free_adapters", "floor_adapters", "front"):
        point = chosen(parts[part]) if part in parts else None
        if point is None:
            continue
        if part.startswith("free"):
            values[f"{part}_change"] = point[GUARDED] / start[GUARDED] - 1
        else:
            values[f"{part}_violation"] = max(0.0, 1 - point[GUARDED] / (parts[part]["share"] * start[GUARDED]))
        if part != "free" and "free" in parts:
            gain = parts["free"]["points"][0][TUNED] - start[TUNED]
            values[f"{part}_gain"] = (point[TUNED] - start[TUNED]) / gain
    corner = [start[name] - MARGIN for name in (TUNED, GUARDED)]
    for part in ("front", "sweep"):
        if part in parts:
            points = [[point[TUNED], point[GUARDED]] for point in parts[part]["points"]]
            values[part] = lr.hypervolume(points, corner)
    return values


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return :func:`told` over seeds as mean and standard deviation, and every point."""
    seeds = sorted({result["seed"] for result in results})
    per_seed = [told([result for result in results if result["seed"] == seed]) for seed in seeds]
    numbers = {}
    for key in sorted({key for values in per_seed for key in values}):
        known = [values[key] for values in per_seed if key in values]
        numbers[key] = {**over_seeds(known), "seeds": len(known)}
    kept = ("part", "seed", "student", "points", "seconds")
    return {"numbers": numbers, "results": [{key: result[key] for key in kept} for result in results]}


def table(summary: Mapping[str, Any]) -> str:
    """Return Markdown of a summary."""
    lines = [f"| part | seed | weight | {TUNED} | {GUARDED} |", "|---" * 5 + "|"]
    for result in summary["results"]:
        rows = [{"weight": "student", **result["student"]}, *result["points"]]
        for point in rows:
            weight = point.get("weight", "")
            lines.append(
                f"| {result['part']} | {result['seed']} | {weight} | {point[TUNED]:.3f} | {point[GUARDED]:.3f} |"
            )
    lines.append("")
    lines += [
        f"- {key}: {value['mean']:.4f} ± {value['std']:.4f} ({value['seeds']} seeds)"
        for key, value in summary["numbers"].items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, measure, aggregate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "constraints")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), help=f"default: {' '.join(PARTS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: 0 1 2")
    parser.add_argument("--summary", action="store_true", help="only aggregate the results that are there")
    options = parser.parse_args()
    for name in options.parts:
        if name not in PARTS:
            raise ConfigError(unknown_name("part", name, PARTS))
    if not options.summary:
        samples = open_samples(options)
        trade = Trade(TuningWorld(samples, options.runs, rewards=(TUNED, GUARDED)), Sizes())
        run(trade, options.results, options.parts, options.seeds)
    summary = summarise(read_results(options.results, "*-seed*.json"))
    write_summary(options.results, {**summary, **provenance()}, table(summary))


def run(trade: Trade, folder: Path, parts: Sequence[str], seeds: Sequence[int]) -> None:
    """Measure what ``folder`` does not hold yet."""
    keep(seed_cells(folder, parts, seeds, trade.measured_with, trade.measure, "points"))


if __name__ == "__main__":
    main()
