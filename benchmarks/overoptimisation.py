"""What a policy does to a proxy: ``python -m benchmarks.overoptimisation --student runs/demo/student``.

The same student climbs the same proxy of ``digits.legibility`` with more and more of what keeps a proxy honest: a
single frozen network, a frozen ensemble of which the policy is paid the pessimistic score, an ensemble that is
refreshed with true scores, and that with the VSD anchor. At growing distances from the student (KL, nats per latent
dimension) samples of the benchmark's prompts are judged by the proxy, the true metric, a classifier of another family
and the benchmark's judge, which nothing is tuned on.

Each (variant, seed) is one file below ``results/overoptimisation/``; a killed run goes on. ``--summary`` draws them.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import distillation as ds
import latent_rewards as lr
from benchmarks.provenance import provenance
from benchmarks.result_files import Curve, flat, keep, read_results, seed_cells, write_summary
from benchmarks.seeds import over_seeds
from benchmarks.tuning import AT_ONCE, HOLDOUT, NUM_STEPS, Method, TuningWorld, add_options, open_samples
from latent_rewards.contracts import ConfigError, unknown_name
from latent_rewards.rollout import rollout, trajectory_kl
from latent_rewards.training.settings import read_settings
from recipes.anchor import warm_anchor
from recipes.dollar import SECTIONS
from recipes.moving_digits.benchmark import TUNED, DigitsBenchmark
from recipes.moving_digits.evaluation import clip_prompts, evaluate, evaluation_noise

CONFIG = "recipes/configs/moving_digits_full.yaml"
"""Whose anchor, and whose weight of it, is taken."""
SEEDS = (0, 1, 2)
LABELS = 512
HEAD_STD = 0.3
SCORES = ("kl", "proxy", "true", "holdout", "digit", "coverage", "frechet", "total", "ood")

_CLIMB = {"estimator": "pathwise", "prompts_per_update": 6, "num_generations": 4, "head_std": HEAD_STD}
_BARE = {**_CLIMB, "pessimism": 0.0, "beta": 0.0}
_REFRESH = {"refresh_every": 4, "refresh_queries": 64, "refresh_steps": 16}


@dataclass(frozen=True)
class Variant:
    """How a proxy is kept honest.

    Attributes:
        method: see :class:`~benchmarks.tuning.Method`.
        ensemble_size: networks of the proxy; None takes the default.
        anchored: with the VSD anchor.
    """

    method: Method
    ensemble_size: int | None = None
    anchored: bool = False


VARIANTS = {
    "frozen_single": Variant(Method("one frozen network", "frozen", LABELS, _BARE), ensemble_size=1),
    "frozen_ensemble": Variant(Method("frozen ensemble, pessimistic, KL", "frozen", LABELS, _CLIMB)),
    "refreshed": Variant(Method("refreshed", "refreshed", LABELS, {**_CLIMB, **_REFRESH, "reward_cap": 1.0})),
    "refreshed_anchor": Variant(
        Method("refreshed, anchored", "refreshed", LABELS, {**_CLIMB, **_REFRESH, "reward_cap": 0.85}), anchored=True
    ),
}


@dataclass(frozen=True)
class Sizes:
    """How far and how finely.

    Attributes:
        updates: of the policy.
        learning_rate: its.
        judged_after: updates after which the policy is judged, beside 0 and the last.
        prompts: of the evaluation, four clips each; even.
    """

    updates: int = 160
    learning_rate: float = 1e-4
    judged_after: tuple[int, ...] = (5, 10, 20, 40, 80, 120)
    prompts: int = 100


class Climb:
    """Lets a student climb a proxy and judges it on the way.

    Args:
        world: student, proxies and scores.
        sizes: see :class:`Sizes`.
    """

    def __init__(self, world: TuningWorld, sizes: Sizes) -> None:
        self.world, self.sizes = world, sizes
        shape = world.student.latent_shape()
        self.benchmark = DigitsBenchmark(
            world.codec, shape, world.folder / f"reference-{sizes.prompts}", num_prompts=sizes.prompts
        )
        self.texts = clip_prompts(self.benchmark.prompts)
        self.noise = evaluation_noise(sizes.prompts, shape, num_steps=NUM_STEPS)
        self.settings = read_settings(CONFIG, SECTIONS)

    def measured_with(self, name: str) -> dict[str, Any]:
        """Return the settings of a variant's results."""
        variant, sections = VARIANTS[name], ("anchor", "distillation")
        told = {**self.world.measured_with(), **vars(self.sizes), **variant.method.settings}
        if variant.anchored:
            told |= flat(**{name: self.settings[name] for name in sections})
            told["anchor_weight"] = self.settings["lro"].anchor_weight
        return {**told, "labels": variant.method.labels, "ensemble_size": variant.ensemble_size}

    def measure(self, name: str, seed: int) -> dict[str, Any]:
        """Tune, and return the points of the curve."""
        variant, world, sizes = VARIANTS[name], self.world, self.sizes
        folder = world.folder / f"{name}-{sizes.updates}-{sizes.learning_rate:g}-seed{seed}"
        policy, curve = copy.deepcopy(world.student), Curve(folder / "curve.json", self.measured_with(name))
        proxy = world.proxy(seed, variant.method.labels, variant.ensemble_size)

        def judge(step: int, logs: dict[str, float]) -> None:
            if step + 1 in (*sizes.judged_after, sizes.updates):
                curve.record(step + 1, lambda: self._point(policy, trainer.scoring.proxy))

        curve.record(0, lambda: self._point(policy, proxy))
        trainer = world.trainer(
            variant.method,
            policy,
            self._config(variant, seed, folder),
            proxy=proxy,
            anchor=self._anchor(seed) if variant.anchored else None,
            callbacks=[judge],
        )
        begun = time.perf_counter()
        result = trainer.train()
        return {
            "variant": name,
            "seed": seed,
            "sizes": {key: value for key, value in vars(sizes).items() if key != "judged_after"},
            "queries": variant.method.labels + result.num_queries,
            "curve": curve.listed(),
            "seconds": time.perf_counter() - begun,
            "device": world.device_name,
            **provenance(),
        }

    def _config(self, variant: Variant, seed: int, folder: Path) -> lr.LROConfig:
        return lr.LROConfig(
            **variant.method.settings,
            num_updates=self.sizes.updates,
            learning_rate=self.sizes.learning_rate,
            step_counts=[NUM_STEPS],
            anchor_weight=self.settings["lro"].anchor_weight,
            seed=seed,
            output_dir=str(folder / "lro"),
            checkpoint_every=20,
            device=self.world.device,
            progress=False,
        )

    def _anchor(self, seed: int) -> Any:  # noqa: ANN401 - an anchor
        return warm_anchor(
            self.world.samples.teacher,
            self.world.student,
            self.world.prompts(seed),
            self.settings["anchor"],
            self.settings["distillation"],
            num_steps=NUM_STEPS,
            batch_size=self.settings["run"].batch_size,
            seed=seed,
            device=self.world.device,
        )

    @torch.no_grad()
    def _point(self, policy: ds.FewStepStudent, proxy: Any) -> dict[str, float]:  # noqa: ANN401 - a RewardProxy
        world, prompts = self.world, self.benchmark.prompts
        latents, kl = self._sample(policy)
        clips = torch.cat([world.codec.decode(part).float().cpu() for part in latents.split(AT_ONCE)])
        values = {
            "true": world.oracle.submit_videos(clips, self.texts).result()[TUNED],
            "holdout": world.holdout.submit_videos(clips, self.texts).result()[HOLDOUT],
        }
        judged = evaluate(clips, prompts, self.benchmark.reference, self.benchmark.judge, extra=values).scores
        predicted = proxy.predict(latents, self.texts)
        return {
            "kl": kl,
            "proxy": float(predicted.mean[TUNED].mean()),
            "ood": float((predicted.ood[TUNED] > 0.95).float().mean()),
            "true": judged["true"],
            "holdout": judged["holdout"],
            "digit": judged["accuracy/digit"],
            "coverage": judged["diversity"],
            "frechet": judged["frechet"],
            "total": judged["total"],
        }

    def _sample(self, policy: ds.FewStepStudent) -> tuple[Any, float]:
        """Return latents of the evaluation's prompts and noise, and the KL to the student per latent dimension."""
        finals, nats = [], []
        for start in range(0, len(self.texts), AT_ONCE):
            texts = self.texts[start : start + AT_ONCE]
            condition = policy.encode(texts).to(self.world.device)
            noise = self.noise[:, start : start + AT_ONCE].to(self.world.device)
            trajectory = rollout(policy, condition, noise, NUM_STEPS)
            nats.append(trajectory_kl(policy, self.world.student, trajectory, HEAD_STD).sum(dim=1))
            finals.append(trajectory.final)
        latents = torch.cat(finals)
        return latents, float(torch.cat(nats).mean()) / latents[0].numel()


def run(climb: Climb, folder: Path, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Measure what ``folder`` does not hold yet."""
    keep(seed_cells(folder, names, seeds, climb.measured_with, climb.measure, "queries"))


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return each variant's curve over seeds, and how the most guarded one ends.

    Returns:
        ``variants``: name -> title, seeds, queries and points, each score as mean and standard deviation;
        ``end``: of the anchored variant ``gap`` (proxy minus true), ``digit`` and ``coverage`` (points gained) and
        ``frechet`` (relative growth), each mean and standard deviation over seeds.
    """
    variants: dict[str, Any] = {}
    for name, variant in VARIANTS.items():
        mine = [result for result in results if result["variant"] == name]
        if mine:
            variants[name] = {
                "title": variant.method.title,
                "seeds": sorted(result["seed"] for result in mine),
                "queries": mine[0]["queries"],
                "curve": [_points_over_seeds(column) for column in zip(*(r["curve"] for r in mine), strict=True)],
            }
    ends = [end(result["curve"]) for result in results if result["variant"] == "refreshed_anchor"]
    return {"variants": variants, **({"end": _points_over_seeds(ends)} if ends else {})}


def end(curve: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return how far a run's last point is from its first, in what must not be lost."""
    first, last = curve[0], curve[-1]
    return {
        "gap": last["proxy"] - last["true"],
        "digit": last["digit"] - first["digit"],
        "coverage": last["coverage"] - first["coverage"],
        "frechet": last["frechet"] / first["frechet"] - 1,
    }


def _points_over_seeds(points: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {key: over_seeds([point[key] for point in points]) for key in points[0]}


def table(summary: Mapping[str, Any]) -> str:
    """Return Markdown: first and last point of each variant, and the end of the anchored one."""
    lines = ["| variant | updates | " + " | ".join(SCORES) + " |", "|---" * (len(SCORES) + 2) + "|"]
    for told in summary["variants"].values():
        best = max(told["curve"], key=lambda point: point["true"]["mean"])
        for label, point in (("start", told["curve"][0]), ("best true", best), ("end", told["curve"][-1])):
            cells = [f"{point[score]['mean']:.3g} ± {point[score]['std']:.2g}" for score in SCORES]
            lines.append(f"| {told['title']}, {label} | {point['updates']['mean']:.0f} | " + " | ".join(cells) + " |")
    if "end" in summary:
        told = {key: f"{value['mean']:.3f} ± {value['std']:.3f}" for key, value in summary["end"].items()}
        lines += [
            "",
            f"Refreshed and anchored, end against start: proxy minus true {told['gap']}, judge's digit {told['digit']} "
            f"points, coverage {told['coverage']} points, Fréchet distance {told['frechet']} (relative).",
        ]
    return "\n".join(lines) + "\n"


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Write a panel for each score over the distance from the student, with bands of one deviation over seeds."""
    from matplotlib import pyplot

    shown = ("proxy", "true", "holdout", "digit", "coverage", "frechet")
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6.5), sharex=True)
    for score, axis in zip(shown, axes.flat, strict=True):
        for told in summary["variants"].values():
            kl = [point["kl"]["mean"] ** 0.5 for point in told["curve"]]
            mean = [point[score]["mean"] for point in told["curve"]]
            std = [point[score]["std"] for point in told["curve"]]
            (line,) = axis.plot(kl, mean, marker="o", markersize=3, label=told["title"])
            low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
            axis.fill_between(kl, low, high, color=line.get_color(), alpha=0.15)
        axis.set(title=score)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set(xlabel="square root of the KL, nats per dimension")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    """Read the command line, measure, aggregate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "overoptimisation")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help=f"default: {' '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: 0 1 2")
    parser.add_argument("--updates", type=int, default=Sizes.updates, help="of the policy")
    parser.add_argument("--learning-rate", type=float, default=Sizes.learning_rate, help="of the policy")
    parser.add_argument("--prompts", type=int, default=Sizes.prompts, help="of the evaluation, four clips each")
    parser.add_argument("--summary", action="store_true", help="only aggregate the results that are there")
    options = parser.parse_args()
    for name in options.variants:
        if name not in VARIANTS:
            raise ConfigError(unknown_name("variant", name, VARIANTS))
    if not options.summary:
        samples = open_samples(options)
        sizes = Sizes(updates=options.updates, learning_rate=options.learning_rate, prompts=options.prompts)
        run(Climb(TuningWorld(samples, options.runs), sizes), options.results, options.variants, options.seeds)
    summary = summarise(read_results(options.results, "*-seed*.json"))
    write_summary(options.results, {**summary, **provenance()}, table(summary))
    draw(summary, options.results / "curves.png")


if __name__ == "__main__":
    main()
