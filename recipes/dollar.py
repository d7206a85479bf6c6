"""DOLLAR in one file: VSD, then CD, then latent reward optimisation (arXiv 2412.15689).

    python -m recipes.dollar --config recipes/configs/moving_digits.yaml
    accelerate launch -m recipes.dollar --config recipes/configs/wan2.1_1.3b.yaml

A teacher becomes a student (VSD, CD); the student's samples are decoded and scored by the true metrics; a proxy learns
those scores from latents; the student is tuned on the proxy, which is refreshed while an anchor (VSD again) and a
held-out metric keep watch. Every stage is kept in ``<output_dir>/<name>/`` and resumes where it was killed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

import distillation as ds
import latent_rewards as lr
from distillation.families import Teacher
from distillation.families.export import load_student
from distillation.vsd import VSDAnchor
from latent_rewards.contracts import DataError
from latent_rewards.rewards import combined
from latent_rewards.training.devices import join_launch
from latent_rewards.training.run_folder import RunFolder
from latent_rewards.training.settings import SettingsError, check_types, read_settings
from recipes.anchor import AnchorConfig, warm_anchor
from recipes.page import REPORT, write_report
from recipes.prompted import Benchmark, PromptBenchmark, split_prompts
from recipes.run_settings import PromptsFacts, as_begun, begun_with, check_reward, check_sections

TRAINERS = {"reinforce": lr.ReinforceTrainer, "differentiable": lr.DifferentiableRewardTrainer}
HOLDOUTS = {"moving_digits": ["digits.legibility_holdout"], "prompts": []}
"""World -> the metrics that are held out where a run names none."""
RATES = {"moving_digits": 8.0, "prompts": 16.0}
"""World -> frames per second of its videos where a run says nothing."""


@dataclass
class RunConfig:
    """What is tuned towards what, and where it is kept.

    Attributes:
        name: folder of the run below ``output_dir``.
        teacher: folder or hub id of a diffusers video pipeline.
        metrics: true metrics; what the student is tuned towards.
        weights: factor of each metric in the reward; None is 1 for each, and -1 for those of which less is better.
        holdout: metrics that are never optimised, for early stop and rollback; an empty list is none. None takes what
            the world has: the digits one of their own, "prompts" none.
        world: "moving_digits" brings its own prompts, data and benchmark; "prompts" reads ``prompts_file``.
        prompts_file: one prompt a line; the last ``num_eval_prompts`` are kept for evaluation.
        num_prompts: training prompts drawn from the digits world.
        num_latents: encoded training clips for CD; 0 distils without data. "prompts" has no data.
        num_queries: student samples the true metrics score before the proxy is trained.
        num_steps: sampling steps the student is scored at, beside one; ``lro`` has to tune it at them.
        num_eval_prompts: prompts of the evaluation (four clips each in the digits world).
        guidance_scale: of the teacher's own rows; None takes the distillation's.
        trainers: which of "reinforce" and "differentiable" tune the student.
        num_frames: frames of a video; needed where the teacher's folder does not say.
        height: pixels, likewise.
        width: pixels, likewise.
        batch_size: samples per call outside training.
        fps: frames per second of the videos in the report; None takes 8 for the digits and 16 for "prompts".
        output_dir: where runs are kept.
        seed: root of all randomness.
        device: "cpu", "cuda", or one of several such as "cuda:1"; None takes an accelerator if there is one.
    """

    name: str = "demo"
    teacher: str = "recipes/moving_digits/weights/teacher"
    metrics: list[str] = field(default_factory=lambda: ["digits.legibility"])
    weights: list[float] | None = None
    holdout: list[str] | None = None
    world: Literal["moving_digits", "prompts"] = "moving_digits"
    prompts_file: str | None = None
    num_prompts: int = 2048
    num_latents: int = 2048
    num_queries: int = 1024
    num_steps: int = 4
    num_eval_prompts: int = 40
    guidance_scale: float | None = None
    trainers: list[str] = field(default_factory=lambda: ["reinforce"])
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int = 32
    fps: float | None = None
    output_dir: str = "runs"
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before any work, and fill in what the world says."""
        check_types(self, SettingsError)
        if self.world not in HOLDOUTS:
            raise SettingsError(f"world must be {' or '.join(map(repr, HOLDOUTS))}; got {self.world!r}")
        if self.holdout is None:
            self.holdout = list(HOLDOUTS[self.world])
        if self.fps is None:
            self.fps = RATES[self.world]
        if not 0 < self.fps < math.inf:
            raise SettingsError(f"fps must be a positive number; got {self.fps}")
        if Path(self.name).name in ("", ".."):
            raise SettingsError(f"name must name a folder of its own below output_dir; got {self.name!r}")
        if self.guidance_scale is not None and not self.guidance_scale > 0:
            raise SettingsError(
                "guidance_scale must be positive, 1 being none, or left out for the distillation's; got "
                f"{self.guidance_scale}"
            )
        lowest = dict.fromkeys(("num_queries", "num_steps", "num_eval_prompts", "batch_size"), 1)
        if self.world == "moving_digits":
            lowest |= {"num_prompts": 1, "num_latents": 0}
        for name, least in lowest.items():
            if not getattr(self, name) >= least:
                raise SettingsError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if self.weights is not None and len(self.weights) != len(self.metrics):
            raise SettingsError(f"{len(self.weights)} weights for {len(self.metrics)} metrics; give one for each")
        if unknown := [name for name in self.trainers if name not in TRAINERS]:
            raise SettingsError(f"unknown trainers {unknown}; known: {', '.join(TRAINERS)}")
        if self.world == "prompts" and not self.prompts_file:
            raise SettingsError("world 'prompts' needs prompts_file, a text file with one prompt a line")
        if self.world == "moving_digits":
            from recipes.moving_digits.evaluation_set import evaluation_prompts

            try:
                evaluation_prompts(self.num_eval_prompts)
            except DataError as error:
                raise SettingsError(f"num_eval_prompts: {error}") from error


SECTIONS = {
    "run": RunConfig,
    "distillation": ds.DistillationConfig,
    "proxy": lr.ProxyConfig,
    "lro": lr.LROConfig,
    "anchor": AnchorConfig,
}


class Dollar:
    """The pipeline; :meth:`run` goes through all stages and returns the path of the report."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.config: RunConfig = settings["run"]
        ranks, self.device = join_launch(self.config.device)
        check_sections(settings, {name: TRAINERS[name] for name in self.config.trainers}, ranks.count)
        self.folder = RunFolder(Path(self.config.output_dir) / self.config.name)
        self.teacher: Teacher = ds.load_teacher(
            self.config.teacher,
            device=self.device,
            num_frames=self.config.num_frames,
            height=self.config.height,
            width=self.config.width,
        )
        self.codec = self.teacher.codec
        if self.config.world == "moving_digits":
            from recipes.moving_digits.benchmark import training_prompts

            self.prompts, self.eval_prompts = training_prompts(self.config.num_prompts, seed=self.config.seed), []
        else:
            self.prompts, self.eval_prompts = split_prompts(str(self.config.prompts_file), self.config.num_eval_prompts)
        self.oracle = lr.MetricOracle(self.codec, self.config.metrics)
        self.holdout = lr.MetricOracle(self.codec, self.config.holdout) if self.config.holdout else None
        if self.config.trainers:
            check_reward(self.reward(), settings["lro"])

    def run(self) -> Path:
        """Distil, collect, regress, tune, evaluate, report."""
        self.folder.remember(self.remembered())
        vsd = self.distil("student_vsd", cd_steps=0)
        student = self.distil("student")
        dataset = self.collect(student)
        proxy = self.fit(dataset)
        tuned = {name: self.tune(name, student, proxy, dataset) for name in self.config.trainers}
        benchmark = self.evaluate(vsd, student, {name: policy for name, (policy, _) in tuned.items()})
        if self.folder.ranks.index:
            return self.folder.path / REPORT
        curves = {name: result for name, (_, result) in tuned.items()}
        histories = {name: self.folder.history(f"distillation/{name}") for name in ("vsd", "cd", "joint")}
        falling = self.oracle.lower_is_better | (self.holdout.lower_is_better if self.holdout else frozenset())
        parts = (self.settings, benchmark, proxy.report, histories, curves)
        return write_report(self.folder.path, *parts, lower_is_better=falling)

    def remembered(self) -> dict[str, Any]:
        """Return what the folder is begun with and has to be continued with."""
        before = begun_with(self.folder.path)
        kept = as_begun(self.settings, before)
        if self.config.world == "prompts" and (not before or "prompts_file" in before):  # folders of old do not know it
            texts = "\n".join([*self.prompts, *self.eval_prompts])
            kept["prompts_file"] = PromptsFacts(hashlib.sha256(texts.encode()).hexdigest())
        return kept

    def distil(self, name: str, **overrides: Any) -> ds.FewStepStudent:  # noqa: ANN401 - distillation settings
        """Stage 1 and 2: train (or load) a student; ``cd_steps=0`` stops after VSD."""
        section = self.section("distillation", "distillation", device=self.config.device, **overrides)

        def train() -> ds.FewStepStudent:
            student = ds.start_student(self.teacher, section)
            ds.DistillationTrainer(self.teacher, student, self.distillation_data(), section).train()
            own = student.merged()
            if own is not student:
                student.denoiser.roles.remove()  # the teacher is as it was
            return own

        return self.folder.cached(name, train, lambda s, path: s.save_pretrained(path), self.load_student)

    def distillation_data(self) -> Any:  # noqa: ANN401 - what DistillationTrainer takes
        """Return encoded clips and their prompts where the world has data, else the prompts alone."""
        if self.config.world != "moving_digits" or not self.config.num_latents:
            return self.prompts
        from recipes.moving_digits.benchmark import training_latents

        count, seed = self.config.num_latents, self.config.seed
        return training_latents(self.codec, count, seed=seed, folder=self.folder.path / "latents")

    def collect(self, student: ds.FewStepStudent) -> lr.RewardDataset:
        """Stage 3a: score the student's samples with the true metrics; the only time everything is decoded."""
        return lr.collect_rewards(
            student,
            self.prompts,
            self.oracle,
            num_samples=self.config.num_queries,
            output_dir=self.folder.path / "rewards",
            seed=self.config.seed,
            num_steps=self.config.num_steps,
            batch_size=self.config.batch_size,
        )

    def fit(self, dataset: lr.RewardDataset) -> lr.RewardProxy:
        """Stage 3b: regress the proxy on latents."""
        section = self.section("proxy", device=self.config.device)
        codec = self.codec if section.trunk in ("pixels", "auto") else None
        proxy = self.folder.cached(
            "proxy",
            lambda: lr.train_proxy(dataset, config=section, encode=self.embed, codec=codec),
            lambda proxy, path: proxy.save_pretrained(path),
            lambda path: lr.RewardProxy.from_pretrained(path, encode=self.embed).to(self.device),
            alone=True,
        )
        self.folder.write("proxy_report.json", proxy.report)
        return proxy

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return what the teacher reads of prompts ``[N, L, D]``; the proxy reads the same."""
        return self.teacher.encode(texts).embeddings

    def tune(
        self, name: str, student: ds.FewStepStudent, proxy: lr.RewardProxy, dataset: lr.RewardDataset
    ) -> tuple[ds.FewStepStudent, dict[str, Any]]:
        """Stage 3c: optimise a copy of the student against a copy of the proxy; returns it and its curves."""
        curves = f"lro_{name}/result.json"

        def train() -> ds.FewStepStudent:
            policy = copy.deepcopy(student)
            section = self.section("lro", f"lro_{name}", device=self.config.device)
            trainer = TRAINERS[name](
                policy,
                copy.deepcopy(proxy),
                self.prompts,
                config=section,
                reward=self.reward(),
                oracle=self.oracle,
                dataset=dataset,
                holdout=self.holdout,
                anchor=self.anchor(student) if section.anchor_weight else None,
            )
            begun = time.perf_counter()
            result = dataclasses.asdict(trainer.train())
            self.folder.write(curves, {**result, "seconds": time.perf_counter() - begun})
            return policy

        policy = self.folder.cached(
            f"student_{name}", train, lambda s, path: s.save_pretrained(path), self.load_student
        )
        return policy, json.loads((self.folder.path / curves).read_text())

    def reward(self) -> lr.WeightedSum | None:
        """Return the weighted sum of several metrics, or None for a single one that should rise."""
        names, weights = self.config.metrics, self.config.weights
        pairs = None if weights is None else list(zip(names, weights, strict=True))
        reward = combined(names, pairs, self.oracle.lower_is_better)
        if self.settings["lro"].normalize_groups is None:
            return reward
        # The trainer normalises each metric in its groups, and takes a sum that does not do it too.
        return lr.WeightedSum(reward.weights if reward else dict.fromkeys(names, 1.0))

    def anchor(self, student: ds.FewStepStudent) -> VSDAnchor:
        """Return a VSD anchor whose fake score has seen the student's samples."""
        return warm_anchor(
            self.teacher,
            student,
            self.prompts,
            self.settings["anchor"],
            self.settings["distillation"],
            num_steps=self.config.num_steps,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            device=self.device,
        )

    def evaluate(
        self, vsd: ds.FewStepStudent, student: ds.FewStepStudent, tuned: dict[str, ds.FewStepStudent]
    ) -> Benchmark:
        """Score every model on prompts and noise that are the same for all."""
        benchmark = self.benchmark()
        own = self.config.guidance_scale
        guidance = self.settings["distillation"].guidance_scale if own is None else own
        for steps in (50, 4, 1):
            sampler, calls = self.teacher_sampler(steps, guidance), steps if guidance == 1 else 2 * steps
            benchmark.add(f"teacher, {counted(steps)}", sampler, num_steps=1, network_evaluations=calls)
        rows = {"VSD": vsd, "VSD→CD": student} | {f"VSD→CD→LRO ({name})": model for name, model in tuned.items()}
        for label, model in rows.items():
            for steps in sorted({1, self.config.num_steps}, reverse=True):
                sampler = self.student_sampler(model, steps)
                benchmark.add(f"{label}, {counted(steps)}", sampler, num_steps=steps, network_evaluations=steps)
        return benchmark

    def benchmark(self) -> Benchmark:
        """Return the evaluation of the run's world."""
        if self.config.world == "prompts":
            metrics = [*self.config.metrics, *(self.config.holdout or [])]
            return PromptBenchmark(self.codec, self.teacher.latent_shape, self.eval_prompts, metrics, self.config.seed)
        from recipes.moving_digits.benchmark import DigitsBenchmark

        count = self.config.num_eval_prompts
        first = begun_with(self.folder.path).get("run", {}).get("num_eval_prompts", count)
        # Rows of other prompts are others; those of the run's first count stay where they were.
        folder = self.folder.path / ("evaluation" if count == first else f"evaluation_{count}")
        shown = {"num_prompts": count, "metrics": self.config.metrics}
        benchmark = DigitsBenchmark(self.codec, self.teacher.latent_shape, folder, **shown)
        benchmark.add_ceilings()
        return benchmark

    def teacher_sampler(self, num_steps: int, guidance_scale: float) -> Callable[[list[str], Tensor], Tensor]:
        """Return a function (prompts, noise stack) -> latents that samples the teacher from ``noise[0]``."""
        encode, denoiser = self.teacher.encode, self.teacher.denoiser

        def sample(prompts: list[str], noise: Tensor) -> Tensor:
            negative = encode([""] * len(prompts)) if guidance_scale != 1 else None
            return ds.sample_teacher(
                denoiser,
                encode(prompts),
                noise[0].to(self.device),
                num_steps=num_steps,
                guidance_scale=guidance_scale,
                negative=negative,
            )

        return sample

    def student_sampler(self, student: ds.FewStepStudent, num_steps: int) -> Callable[[list[str], Tensor], Tensor]:
        """Return a function (prompts, noise stack) -> latents that samples a student."""
        return lambda prompts, noise: student.sample(student.encode(prompts), noise.to(self.device), num_steps)

    def section(self, name: str, folder: str | None = None, **overrides: Any) -> Any:  # noqa: ANN401
        """Return a section with the run's seed and, if ``folder`` is given, its place on disk."""
        if folder:
            overrides["output_dir"] = str(self.folder.path / folder)
        return dataclasses.replace(self.settings[name], seed=self.config.seed, **overrides)

    def load_student(self, path: Path) -> ds.FewStepStudent:
        """Load a student of this run onto the run's device."""
        return load_student(path, device=self.device)


def counted(steps: int) -> str:
    """Return "1 step", "4 steps"."""
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file with the sections " + ", ".join(SECTIONS))
    parser.add_argument("--name", help="name of the run, instead of the file's")
    parser.add_argument("--seed", type=int, help="seed of the run, instead of the file's")
    options = parser.parse_args(arguments)
    settings = read_settings(options.config, SECTIONS)
    changed = {key: value for key, value in (("name", options.name), ("seed", options.seed)) if value is not None}
    settings["run"] = dataclasses.replace(settings["run"], **changed)
    ranks, _ = join_launch(settings["run"].device)
    if ranks.index:
        warnings.simplefilter("ignore")  # the first process says it
    report = Dollar(settings).run()
    if ranks.index == 0:
        print(f"report: {report}")
    ranks.leave()


if __name__ == "__main__":
    main()
