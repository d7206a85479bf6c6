from types import SimpleNamespace

import torch

import distillation as ds
from recipes.anchor import AnchorConfig, warm_anchor


def test_the_anchor_takes_guidance_and_times_of_the_distillation():
    teacher = SimpleNamespace(denoiser=torch.nn.Linear(1, 1), encode=lambda prompts: prompts, latent_shape=(1, 1, 1, 1))
    distilled = ds.DistillationConfig(
        guidance_scale=3.0, refine_guidance_scale=2.0, guidance_start=0.25, time_shift=4.0
    )
    anchor = warm_anchor(
        teacher, None, ["a"], AnchorConfig(warmup=0), distilled, num_steps=1, batch_size=1, seed=0, device="cpu"
    )
    told = (anchor.guidance_scale, anchor.refine_guidance_scale, anchor.guidance_start, anchor.time_shift)
    assert told == (3.0, 2.0, 0.25, 4.0)
    assert anchor.fake_score is not teacher.denoiser and torch.equal(anchor.fake_score.weight, teacher.denoiser.weight)
