"""How many true scores a gain costs: ``python -m benchmarks.sample_efficiency --student runs/demo/student``.

Every method tunes the same student towards ``digits.legibility``. What is told is the true metric on samples of
prompts whose combinations of attributes nothing was trained on, against the number of true scores a method has asked
for; a proxy's training samples count, those that judge do not. Each method has the same small search: its learning
rate is the one with the best final score on held-in prompts in runs with a seed of their own (:data:`SEARCH_SEED`).

Each (method, learning rate, seed) is one file below ``results/sample_efficiency/``, so the benchmark can be run in
pieces and by several processes, once ``--stage prepare`` has made the seeds' proxies (:data:`SEARCH_SEED`'s too); one
that is killed goes on. ``--stage summary`` draws the curves of what is there.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import latent_rewards as lr
from benchmarks.provenance import provenance
from benchmarks.result_files import Cell, Curve, keep, read_result, read_results, write_summary
from benchmarks.seeds import over_seeds
from benchmarks.tuning import NUM_STEPS, Method, TuningWorld, add_options, open_samples
from latent_rewards.contracts import ConfigError, unknown_name

LEARNING_RATES = (5e-5, 1.5e-4, 5e-4)
SEARCH_SEED = 100
SEEDS = (0, 1, 2)

_PROXY = {
    "prompts_per_update": 6,
    "num_generations": 4,
    "num_updates": 96,
    "refresh_every": 4,
    "refresh_queries": 64,
    "refresh_steps": 16,
    "reward_cap": 1.0,
    "head_std": 0.3,
    "num_draws": 128,
}
_TRUE = {"prompts_per_update": 12, "num_generations": 8, "num_updates": 209, "head_std": 0.3}
METHODS: dict[str, Method] = {
    "lro_pathwise": Method("LRO, gradient", "refreshed", 512, {**_PROXY, "estimator": "pathwise"}),
    "lro_hybrid": Method("LRO, hybrid", "refreshed", 512, {**_PROXY, "estimator": "hybrid"}),
    "lro_smoothed": Method("LRO, smoothed REINFORCE", "refreshed", 512, {**_PROXY, "estimator": "smoothed"}),
    "lro_reinforce": Method("LRO, REINFORCE of one draw", "refreshed", 512, {**_PROXY, "estimator": "reinforce"}),
    "frozen": Method("frozen proxy, gradient", "frozen", 1984, {**_PROXY, "estimator": "pathwise"}),
    "ddpo": Method("DDPO, true metric", "true", settings={**_TRUE, "estimator": "reinforce"}),
    "flow_grpo": Method(
        "Flow-GRPO style, true metric",
        "true",
        settings={
            **_TRUE,
            "estimator": "reinforce",
            "scale_rewards": "group",
            "num_iterations": 2,
            "score_last_step": False,
        },
    ),
    "backprop": Method(
        "backpropagation through the decoder (legibility made differentiable)",
        "decoded",
        settings={"prompts_per_update": 6, "num_generations": 4, "num_updates": 120, "estimator": "pathwise"},
    ),
}
POLICY_GRADIENTS = ("ddpo", "flow_grpo")
LRO = ("lro_pathwise", "lro_hybrid", "lro_smoothed", "lro_reinforce")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        judged: samples of held-out prompts for each point of a curve, and as many of held-in prompts for the last.
        points: of a curve, beside the untuned student.
        share: of every method's updates that are made; below 1 for a trial of the script.
    """

    judged: int = 400
    points: int = 12
    share: float = 1.0


class Race:
    """Measures cells of the benchmark.

    Args:
        world: student, prompts and scores.
        sizes: see :class:`Sizes`.
        methods: by name.
    """

    def __init__(self, world: TuningWorld, sizes: Sizes, methods: Mapping[str, Method] = METHODS) -> None:
        self.world, self.sizes, self.methods = world, sizes, methods

    def measured_with(self, name: str) -> dict[str, Any]:
        """Return the settings of a method's cells, beside those that their files are named after."""
        method = self.methods[name]
        return {**self.world.measured_with(), **vars(self.sizes), "labels": method.labels, **method.settings}

    def measure(self, name: str, learning_rate: float, seed: int) -> dict[str, Any]:
        """Tune, and return the curve and the final score on held-in prompts."""
        method, world = self.methods[name], self.world
        folder = world.folder / f"{name}-{learning_rate:g}-seed{seed}"
        config = self._config(method, learning_rate, seed, folder)
        policy, curve = copy.deepcopy(world.student), Curve(folder / "curve.json", self.measured_with(name))
        every = max(1, config.num_updates // self.sizes.points)
        curve.record(0, lambda: self._point(policy, method.labels))

        def judge(step: int, logs: dict[str, float]) -> None:
            done = step + 1
            if done % every == 0 or done == config.num_updates:
                curve.record(done, lambda: self._point(policy, self._queries(method, trainer, config, done)))

        trainer = world.trainer(method, policy, config, callbacks=[judge])
        begun = time.perf_counter()
        trainer.train()
        return {
            "method": name,
            "learning_rate": learning_rate,
            "seed": seed,
            "heldin": world.true_score(policy, world.heldin_prompts(self.sizes.judged), "sample-efficiency/heldin"),
            "curve": curve.listed(),
            "seconds": time.perf_counter() - begun,
            "device": world.device_name,
            **provenance(),
        }

    def _config(self, method: Method, learning_rate: float, seed: int, folder: Path) -> lr.LROConfig:
        settings = dict(method.settings)
        settings["num_updates"] = max(1, round(self.sizes.share * settings["num_updates"]))
        return lr.LROConfig(
            **settings,
            learning_rate=learning_rate,
            step_counts=[NUM_STEPS],
            seed=seed,
            output_dir=str(folder / "lro"),
            checkpoint_every=24,
            micro_batch=128,
            device=self.world.device,
            progress=False,
        )

    def _point(self, policy: Any, queries: int) -> dict[str, float]:  # noqa: ANN401 - a student
        prompts = self.world.heldout_prompts(self.sizes.judged)
        return {"queries": queries, "true": self.world.true_score(policy, prompts, "sample-efficiency")}

    @staticmethod
    def _queries(method: Method, trainer: Any, config: lr.LROConfig, updates: int) -> int:  # noqa: ANN401 - either one
        if method.source in ("true", "decoded"):
            return updates * config.prompts_per_update * config.num_generations
        return method.labels + int(trainer.guard.num_queries)


def cell(folder: Path, name: str, learning_rate: float, seed: int) -> Path:
    """Return the file of a (method, learning rate, seed)."""
    kind = "search" if seed == SEARCH_SEED else f"seed{seed}"
    return folder / f"{name}-{learning_rate:g}-{kind}.json"


def cells(race: Race, folder: Path, names: Sequence[str], rates: Sequence[float], seeds: Sequence[int]) -> list[Cell]:
    """Return the cells of methods, learning rates and seeds."""
    return [
        Cell(cell(folder, *of), race.measured_with(of[0]), partial(race.measure, *of), "heldin")
        for of in product(names, rates, seeds)
    ]


def best_rate(folder: Path, name: str, rates: Sequence[float] = ()) -> float:
    """Return the learning rate whose run of the search ended best on held-in prompts, of all that ``folder`` holds.

    Args:
        folder: of the results.
        name: of the method.
        rates: whose runs must be there.

    Raises:
        ConfigError: one of ``rates`` was not searched, or none at all.
    """
    for path in (cell(folder, name, rate, SEARCH_SEED) for rate in rates):
        if not path.is_file():
            raise ConfigError(f"{path} is missing: run the search of {name} first (--stage search)")
    found = [read_result(path) for path in folder.glob(f"{name}-*-search.json")]
    if not found:
        raise ConfigError(f"{folder} holds no search of {name}: run it first (--stage search)")
    return float(max(found, key=lambda result: result["heldin"])["learning_rate"])


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the curve of each method over seeds, and how LRO compares with the best true-reward policy gradient.

    Returns:
        ``methods``: name -> learning rate, mean seconds on each device, and points with ``queries``, and ``true`` as
        mean and standard deviation;
        ``target``: the highest final mean of :data:`POLICY_GRADIENTS`; ``queries_to_target``: for every method the
        first queries at which its mean is at least that, or None; ``ratio``: the least of LRO's over the most queries
        of that policy gradient.
    """
    methods: dict[str, Any] = {}
    for name in METHODS:
        mine = [result for result in results if result["method"] == name]
        if mine:
            methods[name] = {
                "title": METHODS[name].title,
                "learning_rate": mine[0]["learning_rate"],
                "seeds": sorted(result["seed"] for result in mine),
                "seconds": _by_device(mine),
                "curve": _mean_curve([result["curve"] for result in mine]),
            }
    finals = {name: methods[name]["curve"][-1] for name in POLICY_GRADIENTS if name in methods}
    if not finals:
        return {"methods": methods}
    best = max(finals, key=lambda name: finals[name]["true"]["mean"])
    target = finals[best]["true"]["mean"]
    reached = {name: _first(told["curve"], target) for name, told in methods.items()}
    ours = [queries for name, queries in reached.items() if name in LRO and queries is not None]
    ratio = min(ours) / finals[best]["queries"] if ours else None
    return {"methods": methods, "best": best, "target": target, "queries_to_target": reached, "ratio": ratio}


def _by_device(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    devices = dict.fromkeys(result["device"] for result in results)
    return {
        device: statistics.fmean(result["seconds"] for result in results if result["device"] == device)
        for device in devices
    }


def _mean_curve(curves: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    points = []
    for column in zip(*curves, strict=True):
        points.append({**column[0], "true": over_seeds([point["true"] for point in column])})
    return points


def _first(curve: Sequence[Mapping[str, Any]], target: float) -> float | None:
    return next((point["queries"] for point in curve if point["true"]["mean"] >= target), None)


def table(summary: Mapping[str, Any]) -> str:
    """Return a Markdown table of a summary."""
    lines = [
        "| method | learning rate | queries | true metric: before | after | best | queries to the target | seconds |",
        "|---" * 8 + "|",
    ]
    for name, told in summary["methods"].items():
        curve = told["curve"]
        first, last, best = (
            curve[0]["true"],
            curve[-1]["true"],
            max((p["true"] for p in curve), key=lambda t: t["mean"]),
        )
        reached = summary.get("queries_to_target", {}).get(name)
        cells = [f"{value['mean']:.3f} ± {value['std']:.3f}" for value in (first, last, best)]
        seconds = ", ".join(f"{mean:.0f} on {device}" for device, mean in told["seconds"].items())
        lines.append(
            f"| {told['title']} | {told['learning_rate']:g} | {curve[-1]['queries']} | {' | '.join(cells)} | "
            f"{'–' if reached is None else reached} | {seconds} |"
        )
    if summary.get("target") is not None:
        ratio = summary["ratio"]
        told = "no LRO reaches it" if ratio is None else f"LRO reaches it with {ratio:.3f} of the queries"
        lines += ["", f"Target: {summary['target']:.3f}, the end of {METHODS[summary['best']].title}; {told}."]
    return "\n".join(lines) + "\n"


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Write the curves with a band of one standard deviation over seeds."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5))
    for told in summary["methods"].values():
        # The proxy's training samples are the first queries: a curve begins where they end.
        queries = [max(1, point["queries"]) for point in told["curve"]]
        mean = [point["true"]["mean"] for point in told["curve"]]
        std = [point["true"]["std"] for point in told["curve"]]
        (line,) = axis.plot(queries, mean, marker="o", markersize=3, label=told["title"])
        low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
        axis.fill_between(queries, low, high, color=line.get_color(), alpha=0.15)
    if summary.get("target") is not None:
        axis.axhline(summary["target"], color="grey", linewidth=0.8, linestyle=":")
    axis.set(
        xscale="log", xlim=(90, None), xlabel="true scores asked for", ylabel="digits.legibility, held-out prompts"
    )
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    """Read the command line, measure, aggregate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "sample_efficiency")
    parser.add_argument("--stage", choices=("all", "prepare", "search", "final", "summary"), default="all")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--rates", type=float, nargs="+", default=list(LEARNING_RATES), help="of the search")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of the final runs, or to prepare")
    parser.add_argument("--share", type=float, default=1.0, help="of the updates to make, for a trial")
    options = parser.parse_args()
    for name in options.methods:
        if name not in METHODS:
            raise ConfigError(unknown_name("method", name, METHODS))
    if options.stage != "summary":
        samples = open_samples(options)
        measure_stages(Race(TuningWorld(samples, options.runs), Sizes(share=options.share)), options)
    if options.stage in ("all", "final", "summary"):
        summarise_folder(options.results)


def measure_stages(race: Race, options: argparse.Namespace) -> None:
    """Prepare, search and run, as far as ``--stage`` asks for it."""
    chosen = [METHODS[name] for name in options.methods]
    if options.stage in ("all", "prepare"):
        for seed in options.seeds if options.stage == "prepare" else (SEARCH_SEED, *options.seeds):
            for labels in sorted({method.labels for method in chosen if method.labels}):
                race.world.proxy(seed, labels)
    if options.stage in ("all", "search"):
        keep(cells(race, options.results, options.methods, options.rates, [SEARCH_SEED]))
    if options.stage in ("all", "final"):
        best = {name: best_rate(options.results, name, options.rates) for name in options.methods}
        keep([c for name in best for c in cells(race, options.results, [name], [best[name]], options.seeds)])


def chosen(folder: Path) -> list[dict[str, Any]]:
    """Return the final runs of a folder that have the learning rate which their method's search chose.

    Raises:
        ConfigError: there is none, or a method has no search.
    """
    results = read_results(folder, "*-seed*.json")
    best = {name: best_rate(folder, name) for name in {result["method"] for result in results}}
    return [result for result in results if result["learning_rate"] == best[result["method"]]]


def summarise_folder(folder: Path) -> None:
    """Aggregate the final runs of a folder into ``summary.json``, ``summary.md`` and ``curves.png``."""
    summary = summarise(chosen(folder))
    write_summary(folder, {**summary, **provenance()}, table(summary))
    draw(summary, folder / "curves.png")


if __name__ == "__main__":
    main()
