"""What consistency distillation (CD) has to give a student of VSD: ``python -m benchmarks.headroom``.

CD teaches a call the end of a path from where the call stands, the teacher's or the student's own. Here that end takes
the place of the call, as if it had been learnt without error, and the chain is scored as any other. Where that is no
better than the call itself, CD cannot gain by it, however long it trains.

The students are those of the ablation's VSD, trained if they are not there. Each seed ends in
``results/headroom/seed<k>.json``; a killed run goes on, and ``--summary`` only aggregates what is there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

import distillation as ds
from benchmarks.ablation import STEPS, Ablation, add_options
from benchmarks.digits import mean_scores, paired, told_rows
from benchmarks.provenance import provenance
from benchmarks.result_files import Cell, keep, read_results, write_summary
from benchmarks.seeds import mean_cell, over_seeds
from distillation.sampler import follow_ode
from distillation.schedule import add_noise
from recipes.dollar import Dollar, counted
from recipes.prompted import Sampler


@dataclass(frozen=True)
class End:
    """The end of a path that takes the place of one call of a chain.

    Attributes:
        num_steps: of the chain.
        call: which one, 0 to ``num_steps - 1``.
        by: whose path.
        path_steps: its steps, equal in time.
        guidance_scale: of the teacher, above the configuration's ``guidance_start``.
    """

    num_steps: int
    call: int
    by: Literal["teacher", "student"]
    path_steps: int = 1
    guidance_scale: float = 1.0

    @property
    def label(self) -> str:
        """What tables call it."""
        guided = "" if self.guidance_scale == 1 else f" at guidance {self.guidance_scale:g}"
        return f"{plain(self.num_steps)}, call {self.call + 1} by {counted(self.path_steps)} of the {self.by}{guided}"

    def times(self, start: float) -> list[float]:
        """Return the times of the path from ``start`` to data."""
        return [start * (1 - step / self.path_steps) for step in range(self.path_steps + 1)]


ENDS = (
    End(4, 3, "teacher"),
    End(4, 0, "student", path_steps=2),
    End(2, 1, "teacher"),
    End(2, 1, "teacher", path_steps=12),
    End(2, 1, "teacher", path_steps=12, guidance_scale=3.0),
    End(2, 1, "student", path_steps=2),
    End(2, 0, "student", path_steps=2),
    End(2, 0, "teacher", path_steps=50, guidance_scale=3.0),
    End(1, 0, "student", path_steps=2),
)


def plain(num_steps: int) -> str:
    """Return what tables call the student itself."""
    return f"VSD, {counted(num_steps)}"


def chain(
    student: ds.FewStepStudent,
    condition: Any,  # noqa: ANN401 - any Condition
    noise: Tensor,
    ends: Mapping[int, Callable[[Tensor, float], Tensor]],
) -> Tensor:
    """Sample a student (eta = 1), some of its calls replaced.

    Args:
        student: the student.
        condition: of length B.
        noise: stack [num_steps, B, C, F, H, W].
        ends: by call, what (latents [B, C, F, H, W], their time) has in place of the x0 predicted there.
    """
    schedule: Any = student.denoiser.schedule
    latents = x0 = noise[0]
    for call, t in enumerate(student.timesteps(len(noise))):
        if call:
            latents = add_noise(schedule, x0, noise[call], t)
        end = ends.get(call)
        x0 = student.predict(latents, call, len(noise), condition).x0 if end is None else end(latents, t)
    return x0


class Headroom(Ablation):
    """Scores the ends of paths in place of a student's calls; arguments as of the base."""

    def headroom(self, seed: int) -> dict[str, Any]:
        """Return rows, and their paired differences from the student itself."""
        pipeline, begun = self.pipeline(seed), time.perf_counter()
        student, benchmark = self.train("vsd", pipeline)[STEPS[0]], self.benchmark(pipeline, f"headroom-seed{seed}")
        for steps in STEPS:
            sampler = pipeline.student_sampler(student, steps)
            benchmark.add(plain(steps), sampler, num_steps=steps, network_evaluations=steps)
        start = pipeline.settings["distillation"].guidance_start
        for end in ENDS:
            evaluations = end.num_steps - 1 + end.path_steps
            if end.guidance_scale != 1:
                times = end.times(student.timesteps(end.num_steps)[end.call])
                evaluations += sum(t >= start for t in times[:-1])
            sampler = self._sampler(pipeline, student, end)
            benchmark.add(end.label, sampler, num_steps=end.num_steps, network_evaluations=evaluations)
        return {
            "seed": seed,
            "rows": told_rows(benchmark),
            "differences": {end.label: paired(benchmark, plain(end.num_steps), end.label) for end in ENDS},
            "seconds": time.perf_counter() - begun,
            "device": self.device_name,
            **provenance(),
        }

    @staticmethod
    def _sampler(pipeline: Dollar, student: ds.FewStepStudent, end: End) -> Sampler:
        teacher, start = pipeline.teacher, pipeline.settings["distillation"].guidance_start
        solver = teacher.denoiser if end.by == "teacher" else student.denoiser

        def sample(prompts: list[str], noise: Tensor) -> Tensor:
            condition = teacher.encode(prompts)
            options: dict[str, Any] = {}
            if end.guidance_scale != 1:
                options = {"guidance_scale": end.guidance_scale, "guidance_start": start}
                options["negative"] = teacher.encode([""] * len(prompts))

            def follow(x: Tensor, t: float) -> Tensor:
                return follow_ode(solver, x, end.times(t), condition, **options)

            return chain(student, condition, noise.to(pipeline.device), {end.call: follow})

        return sample


def summarise(results: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    """Return rows and differences of the total over seeds, also as Markdown."""
    rows = mean_scores([{label: row["scores"] for label, row in result["rows"].items()} for result in results])
    gains = {}
    for label in results[0]["differences"]:
        found = [result["differences"][label]["total"]["difference"] for result in results]
        gains[label] = {**over_seeds(found), "above": sum(gain > 0 for gain in found)}
    lines = ["| in place of a call | total | diversity | against the student | seeds above it |", "|---" * 5 + "|"]
    for label, scores in rows.items():
        gain = gains.get(label)
        told = ["", ""] if gain is None else [mean_cell(gain), f"{gain['above']} of {len(results)}"]
        lines.append("| " + " | ".join([label, *(mean_cell(scores[s]) for s in ("total", "diversity")), *told]) + " |")
    summary = {"seeds": [result["seed"] for result in results], "rows": rows, "gains": gains, **provenance()}
    return summary, "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, measure, aggregate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "headroom")
    parser.set_defaults(runs=Path("runs") / "ablation")
    options = parser.parse_args()
    if not options.summary:
        race = Headroom.of(options)
        settings = {**race.measured_with(), "ends": [end.label for end in ENDS]}
        keep([Cell(options.results / f"seed{s}.json", settings, partial(race.headroom, s)) for s in options.seeds])
    write_summary(options.results, *summarise(read_results(options.results, "seed*.json")))


if __name__ == "__main__":
    main()
