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
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import distillation as ds
import latent_rewards as lr
from distillation.families import Teacher
from distillation.families.export import load_student
from distillation.vsd import VSDAnchor
from latent_rewards.rewards import combined
from latent_rewards.training.devices import join_launch
from latent_rewards.training.run_folder import RunFolder
from latent_rewards.training.settings import read_settings
from recipes.anchor import AnchorConfig, warm_anchor
from recipes.page import REPORT, write_report
from recipes.prompted import Benchmark, PromptBenchmark, split_prompts
from recipes.run_settings import (
    TRAINERS,
    PromptsFacts,
    RunConfig,
    as_begun,
    begun_with,
    check_reward,
    check_sections,
    run_folder,
)

STAGES = {"vsd": "VSD", "cd": "CD", "joint": "VSD + CD"}
"""Stage of a distillation -> its name in the table."""
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
        check_sections(settings, ranks.count)
        self.folder = RunFolder(run_folder(self.config))
        self.teacher: Teacher = ds.load_teacher(
            self.config.teacher,
            device=self.device,
            num_frames=self.config.num_frames,
            height=self.config.height,
            width=self.config.width,
        )
        encoder = getattr(self.teacher.encode, "text_encoder", None)
        if isinstance(encoder, torch.nn.Module):
            encoder.to(getattr(torch, self.config.text_dtype))
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
        students = self.students()
        distilled, student = list(students.items())[-1]
        dataset = self.collect(student)
        proxy = self.fit(dataset)
        tuned = {name: self.tune(name, student, proxy, dataset) for name in self.config.trainers}
        students |= {f"{distilled}→LRO ({name})": policy for name, (policy, _) in tuned.items()}
        benchmark = self.evaluate(students)
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

    def students(self) -> dict[str, ds.FewStepStudent]:
        """Stage 1 and 2: return the student after each stage of distillation by its label, the final one last."""
        stages = [STAGES[name] for name in self.settings["distillation"].stages]
        early = {stages[0]: self.distil("student_vsd", cd_steps=0)} if len(stages) > 1 else {}
        return {**early, "→".join(stages): self.distil("student")}

    def distil(self, name: str, **overrides: Any) -> ds.FewStepStudent:  # noqa: ANN401 - distillation settings
        """Train (or load) a student; ``cd_steps=0`` stops after VSD."""
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

    def evaluate(self, students: Mapping[str, ds.FewStepStudent]) -> Benchmark:
        """Score the teacher and every student on prompts and noise that are the same for all."""
        benchmark = self.benchmark()
        own = self.config.guidance_scale
        guidance = self.settings["distillation"].guidance_scale if own is None else own
        for steps in (50, 4, 1):
            sampler, calls = self.teacher_sampler(steps, guidance), steps if guidance == 1 else 2 * steps
            benchmark.add(f"teacher, {counted(steps)}", sampler, num_steps=1, network_evaluations=calls)
        for label, model in students.items():
            for steps in sorted({1, self.config.num_steps}, reverse=True):
                sampler = self.student_sampler(model, steps)
                benchmark.add(f"{label}, {counted(steps)}", sampler, num_steps=steps, network_evaluations=steps)
        return benchmark

    def benchmark(self) -> Benchmark:
        """Return the evaluation of the run's world."""
        if self.config.world == "prompts":
            folder = self.folder.path / "evaluation"
            metrics = [*self.oracle.metrics.values(), *(self.holdout.metrics.values() if self.holdout else ())]
            run, shape = self.config, self.teacher.latent_shape
            return PromptBenchmark(
                self.codec, shape, folder, self.eval_prompts, metrics, seed=run.seed, batch_size=run.batch_size
            )
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
        """Load a student of this run onto the run's device; it shares the teacher's text encoder and codec."""
        student, teacher = load_student(path), self.teacher
        shared = {"encode": teacher.encode, "latent_shape": teacher.latent_shape, "exporter": teacher.exporter}
        return ds.FewStepStudent(student.denoiser, student.grids, student.eta, **shared).to(self.device)


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
