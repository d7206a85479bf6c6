"""Ways to a few-step student side by side: ``python -m benchmarks.ablation``.

VSD and CD, alone, one after the other and at once, beside progressive distillation, latent consistency models (LCM),
T2V-Turbo and CD decoupled as in AnimateLCM. All start from the same teacher and data, train for the same number of
network passes (:mod:`benchmarks.passes`: a gradient costs three, a guided prediction two) with the same batch, and are
sampled in 1, 2 and 4 steps. T2V-Turbo's reward is ``digits.legibility`` made differentiable, which none of the others
sees, and its decoding comes on top of the passes.

Each (method, seed) ends in ``results/ablation/<method>-seed<k>.json``, so the benchmark can be run in pieces, and a
killed run goes on; ``--summary`` only aggregates what is there. Rows of real clips, their reconstruction and the
teacher are kept in ``reference-seed0.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

import distillation as ds
from benchmarks.digits import (
    CONFIG,
    TEACHER,
    mean_scores,
    paired,
    point_differences,
    score_table,
    seeded,
    told_rows,
)
from benchmarks.passes import passes
from benchmarks.provenance import device_name, provenance
from benchmarks.result_files import RESULTS, Cell, add_results, flat, keep, read_results, seed_cells, write_summary
from benchmarks.tuning import differentiable_legibility
from distillation.baselines.decoupled import DecoupledConfig, DecoupledTrainer
from distillation.baselines.progressive import ProgressiveConfig, ProgressiveTrainer
from distillation.baselines.turbo import TurboConfig, TurboTrainer
from latent_rewards.contracts import ConfigError, unknown_name
from latent_rewards.training.settings import read_settings
from recipes.dollar import SECTIONS, Dollar, counted
from recipes.moving_digits.benchmark import REAL_CLIPS, DigitsBenchmark, Row

STEPS = (4, 2, 1)
SEEDS = (0, 1, 2)
ADAPTERS = {"adapter_rank": 32, "learning_rate": 6e-4, "cd_learning_rate": 9e-5, "fake_learning_rate": 1.2e-3}
"""One base for all roles; adapters want larger learning rates, here three times those of all weights (untuned)."""
LCM = {"num_timesteps": 50, "solver_steps": 1, "temporal_weight": 0.0}
"""What latent consistency models do (arXiv 2310.04378): 50 intervals of one solver step each."""
LOW_NOISE = {
    "num_timesteps": 4,
    "cd_max_time": 0.25,
    "cd_on_samples": True,
    "cd_keep_weight": 6.0,
    "cd_learning_rate": 3e-4,
}
"""CD of the last call of four steps alone, in one interval, on the student's own samples; the other calls are kept."""
LOW_NOISE_UPDATES = 60
TITLES = {
    "vsd": "VSD",
    "cd": "CD",
    "vsd_cd": "VSD→CD",
    "low_noise": "VSD→CD at low noise",
    "adapters": "VSD→CD, adapters",
    "joint": "VSD + CD, joint",
    "progressive": "progressive distillation",
    "lcm": "LCM",
    "turbo": "T2V-Turbo",
    "animatelcm": "AnimateLCM style",
}
REFERENCE = "reference"
CLAIMS = {
    "VSD→CD above CD alone": ("vsd_cd", "cd"),
    "VSD→CD above VSD alone": ("vsd_cd", "vsd"),
    "VSD alone above CD alone": ("vsd", "cd"),
    "VSD→CD above T2V-Turbo": ("vsd_cd", "turbo"),
    "VSD→CD above progressive distillation": ("vsd_cd", "progressive"),
    "VSD→CD above AnimateLCM": ("vsd_cd", "animatelcm"),
    "VSD→CD above both at once": ("vsd_cd", "joint"),
    "all weights above adapters": ("vsd_cd", "adapters"),
    "VSD→CD at low noise above VSD alone": ("low_noise", "vsd"),
    "VSD→CD at low noise above VSD→CD": ("low_noise", "vsd_cd"),
}
"""Orderings of the total; the first three and that of T2V-Turbo are the paper's (arXiv 2412.15689)."""


class Ablation:
    """Trains and scores (method, seed).

    Args:
        config: settings of the digits world, whose distillation is the VSD→CD of the comparison.
        runs: where trainings and rows are kept.
        share: of the passes, below 1 for a trial of the script.
        device: torch device.
        num_prompts: evaluation prompts; None takes the configuration's.

    Raises:
        DeviceError: there is no such device.
    """

    def __init__(
        self, config: str, runs: Path, *, share: float = 1.0, device: str = "cpu", num_prompts: int | None = None
    ) -> None:
        self.config, self.runs, self.share, self.device, self.num_prompts = config, runs, share, device, num_prompts
        self.device_name = device_name(device)

    @classmethod
    def of(cls, options: argparse.Namespace) -> Self:
        """Return what the command line of :func:`add_options` asks for."""
        return cls(
            options.config, options.runs, share=options.share, device=options.device, num_prompts=options.prompts
        )

    def judged_with(self) -> dict[str, Any]:
        """Return the settings of rows of which nothing is trained."""
        run = read_settings(self.config, SECTIONS)["run"]
        count = run.num_eval_prompts if self.num_prompts is None else self.num_prompts
        return {"prompts": count, "teacher": run.teacher, "guidance_scale": run.guidance_scale}

    def measured_with(self) -> dict[str, Any]:
        """Return the settings of results."""
        sections = read_settings(self.config, SECTIONS)
        data = {name: getattr(sections["run"], name) for name in ("num_prompts", "num_latents")}
        return {**self.judged_with(), "share": self.share, **data, **flat(distillation=sections["distillation"])}

    def measure(self, method: str, seed: int) -> dict[str, Any]:
        """Train (or continue), sample, score; ``seconds`` are those of the training, without parts before a kill."""
        pipeline = self.pipeline(seed)
        teacher = self._add_teacher(pipeline, self.benchmark(pipeline, REFERENCE), 50)
        begun = time.perf_counter()
        students = self.train(method, pipeline)
        seconds = time.perf_counter() - begun
        benchmark = self.benchmark(pipeline, f"{method}-seed{seed}")
        for steps in STEPS:
            sampler = pipeline.student_sampler(students[steps], steps)
            benchmark.add(f"{TITLES[method]}, {counted(steps)}", sampler, num_steps=steps, network_evaluations=steps)
        mine = told_rows(benchmark)
        benchmark.rows[TEACHER] = teacher
        return {
            "method": method,
            "seed": seed,
            "rows": mine,
            "differences": {f"{label} minus {TEACHER}": paired(benchmark, TEACHER, label) for label in mine},
            "seconds": seconds,
            "device": self.device_name,
            **provenance(),
        }

    def train(self, method: str, pipeline: Dollar) -> dict[int, ds.FewStepStudent]:
        """Return the students of a method by their step count, trained (or continued) with the pipeline's seed."""
        return _METHODS[method](self, pipeline, self.runs / f"{method}-seed{pipeline.config.seed}")

    def reference(self) -> dict[str, Any]:
        """Score real clips, their reconstruction, and the teacher in 50, 8, 4 and 1 steps."""
        pipeline, begun = self.pipeline(0), time.perf_counter()
        benchmark = self.benchmark(pipeline, REFERENCE)
        benchmark.add_ceilings()
        for steps in (50, 8, 4, 1):
            self._add_teacher(pipeline, benchmark, steps)
        seconds = time.perf_counter() - begun
        told = {"method": REFERENCE, "seed": 0, "rows": told_rows(benchmark), "seconds": seconds}
        return {**told, "device": self.device_name, **provenance()}

    @staticmethod
    def _add_teacher(pipeline: Dollar, benchmark: DigitsBenchmark, steps: int) -> Row:
        guidance = float(pipeline.config.guidance_scale or 1.0)
        sampler, evaluations = pipeline.teacher_sampler(steps, guidance), steps if guidance == 1 else 2 * steps
        return benchmark.add(f"teacher, {counted(steps)}", sampler, num_steps=1, network_evaluations=evaluations)

    def pipeline(self, seed: int) -> Dollar:
        """Return the pipeline of a seed: teacher, data and evaluation."""
        settings = seeded(self.config, seed)
        changes: dict[str, Any] = {"output_dir": str(self.runs), "device": self.device}
        if self.num_prompts is not None:
            changes["num_eval_prompts"] = self.num_prompts
        settings["run"] = dataclasses.replace(settings["run"], **changes)
        return Dollar(settings)

    def benchmark(self, pipeline: Dollar, name: str) -> DigitsBenchmark:
        """Return the evaluation whose rows are kept under a name, apart from those of a trial with fewer prompts."""
        count = pipeline.config.num_eval_prompts
        kept = self.runs / f"evaluation-{count}"
        folder, known = kept / name, kept / REFERENCE / REAL_CLIPS
        if known.is_file() and not (folder / REAL_CLIPS).is_file():
            # All are compared with the same real clips, whose features take a while.
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(known, folder / REAL_CLIPS)
        return DigitsBenchmark(pipeline.codec, pipeline.teacher.latent_shape, folder, num_prompts=count)

    def settings(self, pipeline: Dollar, folder: Path, kind: type[Any] = ds.DistillationConfig, **changes: Any) -> Any:  # noqa: ANN401
        """Return the configuration's distillation as settings of a trainer, changed."""
        inherited = dataclasses.asdict(pipeline.settings["distillation"])
        own = {"seed": pipeline.config.seed, "output_dir": str(folder), "device": self.device}
        return kind(**{**inherited, **own, **changes})

    def budget(self, pipeline: Dollar) -> float:
        """Return the passes per sample that VSD→CD takes."""
        config = pipeline.settings["distillation"]
        return self.share * (config.vsd_steps * passes(config, "vsd") + config.cd_steps * passes(config, "cd"))

    def updates(self, pipeline: Dollar, cost: float, part: float = 1.0) -> int:
        """Return how many updates of a cost the budget, or a part of it, allows."""
        return max(1, round(part * self.budget(pipeline) / cost))


def _student(pipeline: Dollar, config: ds.DistillationConfig) -> ds.FewStepStudent:
    return ds.start_student(pipeline.teacher, config)


def _distil(pipeline: Dollar, config: ds.DistillationConfig) -> dict[int, ds.FewStepStudent]:
    student = _student(pipeline, config)
    ds.DistillationTrainer(pipeline.teacher, student, pipeline.distillation_data(), config).train()
    return dict.fromkeys(STEPS, student)


def _vsd(race: Ablation, pipeline: Dollar, folder: Path) -> dict[int, ds.FewStepStudent]:
    cost = passes(pipeline.settings["distillation"], "vsd")
    return _distil(pipeline, race.settings(pipeline, folder, vsd_steps=race.updates(pipeline, cost), cd_steps=0))


def _vsd_cd(race: Ablation, pipeline: Dollar, folder: Path, **changes: Any) -> dict[int, ds.FewStepStudent]:  # noqa: ANN401
    config = pipeline.settings["distillation"]
    steps = {name: max(1, round(race.share * getattr(config, name))) for name in ("vsd_steps", "cd_steps")}
    return _distil(pipeline, race.settings(pipeline, folder, **{**steps, **changes}))


def _low_noise(race: Ablation, pipeline: Dollar, folder: Path) -> dict[int, ds.FewStepStudent]:
    config = dataclasses.replace(pipeline.settings["distillation"], **LOW_NOISE)
    cd_steps = max(1, round(race.share * LOW_NOISE_UPDATES))
    left = race.budget(pipeline) - cd_steps * passes(config, "cd")
    steps = {"vsd_steps": max(1, round(left / passes(config, "vsd"))), "cd_steps": cd_steps}
    return _vsd_cd(race, pipeline, folder, **steps, **LOW_NOISE)


def _joint(race: Ablation, pipeline: Dollar, folder: Path) -> dict[int, ds.FewStepStudent]:
    cost = passes(pipeline.settings["distillation"], "joint")
    config = race.settings(pipeline, folder, schedule="joint", vsd_steps=race.updates(pipeline, cost))
    return _distil(pipeline, config)


def _alone(config: ds.DistillationConfig) -> dict[str, Any]:
    """Return what CD needs where no VSD came before: learning rate, average and guidance of a first stage."""
    return {
        "vsd_steps": 0,
        "cd_learning_rate": config.learning_rate,
        "cd_ema_decay": config.ema_decay,
        "cd_guidance_scale": config.guidance_scale,
    }


def _cd(race: Ablation, pipeline: Dollar, folder: Path, **changes: Any) -> dict[int, ds.FewStepStudent]:  # noqa: ANN401
    config = race.settings(pipeline, folder, **_alone(pipeline.settings["distillation"]), **changes)
    steps = race.updates(pipeline, passes(config, "cd"))
    return _distil(pipeline, dataclasses.replace(config, cd_steps=steps))


def _progressive(race: Ablation, pipeline: Dollar, folder: Path) -> dict[int, ds.FewStepStudent]:
    cost = passes(pipeline.settings["distillation"], "progressive")
    config = race.settings(pipeline, folder, ProgressiveConfig, step_counts=list(STEPS))
    # The guided first round costs two passes more; the last two rounds have twice the updates of the others.
    rounds = len(config.rounds)
    updates = max(1, round(race.budget(pipeline) / (cost * (rounds + 2) + 2)))
    config = dataclasses.replace(config, round_updates=updates, last_updates=2 * updates)
    student, data = _student(pipeline, config), pipeline.distillation_data()
    return ProgressiveTrainer(pipeline.teacher, student, data, config).train().students


def _turbo(race: Ablation, pipeline: Dollar, folder: Path) -> dict[int, ds.FewStepStudent]:
    own = {**LCM, **_alone(pipeline.settings["distillation"])}
    config = race.settings(pipeline, folder, TurboConfig, **own, image_frames=5, decoded_samples=4)
    config = dataclasses.replace(config, cd_steps=race.updates(pipeline, passes(config, "cd")))
    student, data = _student(pipeline, config), pipeline.distillation_data()
    options: dict[str, Any] = {"decoder": pipeline.codec, "video_reward": differentiable_legibility, "config": config}
    TurboTrainer(pipeline.teacher, student, data, **options).train()
    return dict.fromkeys(STEPS, student)


def _animatelcm(race: Ablation, pipeline: Dollar, folder: Path) -> dict[int, ds.FewStepStudent]:
    own = {**LCM, **_alone(pipeline.settings["distillation"])}
    config = race.settings(pipeline, folder, DecoupledConfig, **own)
    frames = pipeline.teacher.latent_shape[1]
    steps = {
        "image_steps": race.updates(pipeline, passes(config, "image_cd", frames=frames), 0.25),
        "cd_steps": race.updates(pipeline, passes(config, "cd"), 0.75),
    }
    config = dataclasses.replace(config, **steps)
    student = _student(pipeline, config)
    DecoupledTrainer(pipeline.teacher, student, pipeline.distillation_data(), config).train()
    return dict.fromkeys(STEPS, student)


_METHODS: dict[str, Callable[[Ablation, Dollar, Path], dict[int, ds.FewStepStudent]]] = {
    "vsd": _vsd,
    "cd": _cd,
    "vsd_cd": _vsd_cd,
    "low_noise": _low_noise,
    "adapters": partial(_vsd_cd, **ADAPTERS),
    "joint": _joint,
    "progressive": _progressive,
    "lcm": partial(_cd, **LCM),
    "turbo": _turbo,
    "animatelcm": _animatelcm,
}


def summarise(results: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    """Return rows and paired differences over seeds, and which orderings hold at each step count; also as Markdown.

    An ordering is told by the mean difference of the totals over the seeds both methods have, and by how many of them
    agree.
    """
    rows, differences, found = {}, {}, {}
    for method in (REFERENCE, *TITLES):
        mine = [result for result in results if result["method"] == method]
        if mine:
            rows |= mean_scores([{label: row["scores"] for label, row in r["rows"].items()} for r in mine])
            found[method] = {result["seed"]: result for result in mine}
        if mine and method != REFERENCE:
            differences |= mean_scores([point_differences(result["differences"]) for result in mine])
    orderings = _orderings(found)
    lines = [*score_table("method", rows), "", *score_table("difference", differences), "", *_ordering_table(orderings)]
    seeds = {method: sorted(by_seed) for method, by_seed in found.items()}
    summary = {"seeds": seeds, "rows": rows, "differences": differences, "orderings": orderings}
    return {**summary, **provenance()}, "\n".join(lines) + "\n"


def _orderings(found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    told: dict[str, dict[str, Any]] = {}
    for claim, (higher, lower) in CLAIMS.items():
        seeds = sorted(set(found.get(higher, ())) & set(found.get(lower, ())))
        for steps in STEPS if seeds else ():
            ours, theirs = (f"{TITLES[method]}, {counted(steps)}" for method in (higher, lower))
            gaps = [
                found[higher][seed]["rows"][ours]["scores"]["total"]
                - found[lower][seed]["rows"][theirs]["scores"]["total"]
                for seed in seeds
            ]
            told.setdefault(claim, {})[counted(steps)] = {
                "difference": sum(gaps) / len(gaps),
                "agree": sum(gap > 0 for gap in gaps),
                "seeds": len(gaps),
            }
    return told


def _ordering_table(orderings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    columns = [counted(steps) for steps in STEPS]
    lines = [f"| ordering of the total | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for claim, by_steps in orderings.items():
        cells = [
            f"{told['difference']:+.1f} ({told['agree']} of {told['seeds']})"
            for told in (by_steps[column] for column in columns)
        ]
        lines.append(f"| {claim} | {' | '.join(cells)} |")
    return lines


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Add what benchmarks of distillation are told: seeds, settings, folders (after ``name``) and size."""
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="training seeds (default: 0 1 2)")
    parser.add_argument("--config", default=CONFIG, help="settings of VSD→CD (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs") / name, help="where trainings are kept")
    add_results(parser, RESULTS / name)
    parser.add_argument("--share", type=float, default=1.0, help="of the training, for a trial")
    parser.add_argument("--prompts", type=int, help="evaluation prompts, for a trial; default: the configuration's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--summary", action="store_true", help="only aggregate the results that are there")


def main() -> None:
    """Read the command line, measure, aggregate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=[*TITLES], help=f"default: {' '.join(TITLES)}")
    add_options(parser, "ablation")
    options = parser.parse_args()
    for name in options.methods:
        if name not in TITLES:
            raise ConfigError(unknown_name("method", name, TITLES))
    if not options.summary:
        race = Ablation.of(options)
        cells = [Cell(options.results / f"{REFERENCE}-seed0.json", race.judged_with(), race.reference)]
        known = race.measured_with()
        keep([*cells, *seed_cells(options.results, options.methods, options.seeds, lambda _: known, race.measure)])
    write_summary(options.results, *summarise(read_results(options.results, "*-seed*.json")))


if __name__ == "__main__":
    main()
