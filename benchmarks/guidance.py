"""Choose the teacher's guidance once, on held-in prompts, by total: ``python -m benchmarks.guidance``."""

from __future__ import annotations

import argparse

import torch

import distillation as ds
from benchmarks.provenance import provenance
from benchmarks.result_files import RESULTS, add_results, write_result
from recipes.moving_digits.evaluation import build_reference, evaluate, generate_clips, noise_clips, selection_prompts
from recipes.moving_digits.judge import Judge

CANDIDATES = (1.0, 1.5, 2.0, 3.0, 4.0)


def main() -> None:
    """Score the 50-step teacher at each guidance scale and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="recipes/moving_digits/weights/teacher", help="pipeline folder")
    parser.add_argument("--num-prompts", type=int, default=40, help="held-in prompts, four clips each")
    add_results(parser, RESULTS / "guidance.json", "file that the result is written into")
    options = parser.parse_args()
    teacher = ds.load_teacher(options.teacher)
    prompts, judge = selection_prompts(options.num_prompts), Judge.load()
    reference = build_reference(prompts, judge, noise_clips(teacher.codec, teacher.latent_shape))
    scores = {}
    for scale in CANDIDATES:

        def sample(texts: list[str], noise: torch.Tensor, scale: float = scale) -> torch.Tensor:
            latents = ds.sample_teacher(
                teacher.denoiser,
                teacher.encode(texts),
                noise[0],
                num_steps=50,
                guidance_scale=scale,
                negative=teacher.encode([""] * len(texts)),
            )
            return teacher.codec.decode(latents)

        clips = generate_clips(sample, prompts, teacher.latent_shape, stage="guidance")
        scores[scale] = evaluate(clips, prompts, reference, judge).scores
        print(scale, {name: round(value, 2) for name, value in scores[scale].items()}, flush=True)
    best = max(scores, key=lambda scale: scores[scale]["total"])
    write_result(options.results, {"chosen": best, "scores": scores, **provenance()})
    print(f"chosen: {best}; written to {options.results}")


if __name__ == "__main__":
    main()
