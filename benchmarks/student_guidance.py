"""How strong a guidance VSD should distil, looked at without the judge: ``python -m benchmarks.student_guidance``.

A student of a few hundred updates is trained at each pair of scales, that of the call at pure noise and that of the
calls that refine it, and compared with the 50-step teacher on held-in prompts: closeness of the pixel metrics to real
clips, the tuned metric, and the spread of latents under one prompt. Students are kept below ``runs/`` and not trained
twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics

import torch
from torch import Tensor

from benchmarks.digits import CONFIG, seeded
from benchmarks.provenance import provenance
from benchmarks.result_files import RESULTS, add_results, write_result
from latent_rewards.metrics import create_metric
from recipes.dollar import Dollar
from recipes.moving_digits.benchmark import TUNED
from recipes.moving_digits.evaluation import (
    PIXEL_METRICS,
    SEEDS,
    clip_prompts,
    generate_clips,
    noise_clips,
    pixel_values,
    selection_prompts,
)
from recipes.moving_digits.scores import closeness
from recipes.moving_digits.world import parse_prompt, render
from recipes.prompted import Sampler

CANDIDATES = ((3.0, 3.0), (1.5, 1.5), (3.0, 1.5))
_REAL_SEED, _REAL_PER_PROMPT = 777, 10


class Selection:
    """Scores samplers on held-in prompts, without the judge.

    Args:
        pipeline: its codec and latent shape are those of every sampler.
        num_prompts: held-in prompts, four clips each.
    """

    def __init__(self, pipeline: Dollar, num_prompts: int) -> None:
        self.codec, self.latent_shape = pipeline.codec, pipeline.teacher.latent_shape
        self.prompts = selection_prompts(num_prompts)
        specs = [parse_prompt(text) for text in self.prompts for _ in range(_REAL_PER_PROMPT)]
        self.real = pixel_values(render(specs, seed=_REAL_SEED))
        self.noise = pixel_values(noise_clips(self.codec, self.latent_shape))

    def score(self, sample: Sampler, num_steps: int) -> dict[str, float]:
        """Return closeness of each pixel metric and their mean (0-100), the tuned metric, and the spread of latents."""
        kept: list[Tensor] = []

        def decoded(prompts: list[str], noise: Tensor) -> Tensor:
            kept.append(sample(prompts, noise))
            return self.codec.decode(kept[-1])

        clips = generate_clips(decoded, self.prompts, self.latent_shape, num_steps=num_steps, stage="selection")
        values = pixel_values(clips)
        near = {name: closeness(values[name], self.real[name], self.noise[name]) for name in PIXEL_METRICS}
        tuned = create_metric(TUNED)(clips, clip_prompts(self.prompts))
        return {
            "quality": statistics.fmean(near.values()),
            TUNED: float(tuned.mean()),
            "spread": spread(torch.cat(kept)),
            **near,
        }


def spread(latents: Tensor) -> float:
    """Return the root mean square distance per dimension between two samples ``[4 P, ...]`` of one prompt."""
    groups = latents.float().cpu().unflatten(0, (-1, len(SEEDS))).flatten(2)
    return float((2 * groups.var(dim=1)).mean().sqrt())


def main() -> None:
    """Train and score a student at each scale, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-prompts", type=int, default=40, help="held-in prompts (default: %(default)s)")
    parser.add_argument("--vsd-steps", type=int, default=400, help="updates of each student (default: %(default)s)")
    add_results(parser, RESULTS / "student_guidance.json", "file that the result is written into")
    options = parser.parse_args()
    settings = seeded(CONFIG, 0)
    scores: dict[str, dict[str, float]] = {}
    for scale, refined in CANDIDATES:
        name = f"student_guidance_{scale:g}_{refined:g}_{options.vsd_steps}"
        chosen = {"guidance_scale": scale, "refine_guidance_scale": refined, "vsd_steps": options.vsd_steps}
        own = {
            **settings,
            "run": dataclasses.replace(settings["run"], name=name),
            "distillation": dataclasses.replace(settings["distillation"], **chosen, cd_steps=0),
        }
        pipeline = Dollar(own)
        pipeline.folder.remember(own)
        if not scores:
            selection = Selection(pipeline, options.num_prompts)
            guidance = float(settings["run"].guidance_scale)
            scores["teacher, 50 steps"] = selection.score(pipeline.teacher_sampler(50, guidance), 1)
        student = pipeline.distil("student_vsd")
        for steps in (4, 1):
            row = selection.score(pipeline.student_sampler(student, steps), steps)
            scores[f"VSD at {scale:g} and {refined:g}, {steps} step(s)"] = row
            print(scale, refined, steps, {key: round(value, 3) for key, value in row.items()}, flush=True)
    write_result(options.results, {"vsd_steps": options.vsd_steps, "scores": scores, **provenance()})
    print(f"written to {options.results}")


if __name__ == "__main__":
    main()
