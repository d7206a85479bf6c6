import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import distillation as ds
from latent_rewards.training.settings import SettingsError
from recipes.anchor import AnchorConfig, warm_anchor

TOYS = Path(__file__).parents[1] / "distillation" / "conftest.py"
SCRIPT = """
import json, os, sys
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
import torch
import distillation as ds
from latent_rewards.training.ranks import current_ranks
from recipes.anchor import AnchorConfig, warm_anchor

def warmed(toys, batch_size):
    torch.set_num_threads(1)
    shape, flow = (1, 3, 3, 3), ds.RectifiedFlow()
    encode = lambda prompts: toys["Numbers"](torch.tensor([float(len(prompt)) for prompt in prompts]))
    denoiser = toys["LearnableGaussian"](flow, 0.3, 0.7, reach=0.1).float()
    teacher = SimpleNamespace(denoiser=denoiser, encode=encode, latent_shape=shape)
    student = ds.FewStepStudent(toys["AffineDenoiser"](flow, 1.2, -0.3).float(), latent_shape=shape, encode=encode)
    anchor = warm_anchor(
        teacher, student, ["a", "bb", "cccc"], AnchorConfig(learning_rate=0.01, warmup=3),
        ds.DistillationConfig(guidance_scale=2.0), num_steps=2, batch_size=batch_size, seed=0, device="cpu",
    )
    return [float(value.detach()) for value in anchor.fake_score.parameters()]

if __name__ == "__main__":
    toys, told = run_path(sys.argv[1]), Path(sys.argv[2], f"rank{os.environ['RANK']}.json")
    current_ranks()
    told.write_text(json.dumps({count: warmed(toys, count) for count in (1, 2, 3)}))
    current_ranks().leave()
"""


def test_each_process_shows_the_anchor_as_many_samples_and_at_least_one(launch, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = launch(tmp_path / "script.py", TOYS, tmp_path)
    assert done.returncode == 0, done.stderr
    parts = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    alone, toys = runpy.run_path(str(tmp_path / "script.py"))["warmed"], runpy.run_path(str(TOYS))
    for asked, shown in ((1, 2), (2, 2), (3, 4)):
        assert parts[0][str(asked)] == parts[1][str(asked)] == pytest.approx(alone(toys, shown), rel=1e-5)
    assert alone(toys, 1) != alone(toys, 2), "a single process shows what it is asked for"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be a positive number; got 0"),
        ({"learning_rate": float("inf")}, "learning_rate must be a positive number; got inf"),
        ({"learning_rate": "fast"}, "learning_rate must be a positive number; got 'fast'"),
        ({"fake_updates": 0}, "fake_updates must be a whole number, at least 1; got 0"),
        ({"warmup": -1}, "warmup must be a whole number, at least 0; got -1"),
        ({"warmup": None}, "warmup must be .* got None"),
        ({"warmup": 1.5}, "warmup must be .* got 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(SettingsError, match=message):
        AnchorConfig(**setting)
    AnchorConfig(learning_rate=1, fake_updates=1, warmup=0)


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


class Checkpointed(torch.nn.Linear):
    """What diffusers' networks say of activation checkpoints."""

    _supports_gradient_checkpointing, is_gradient_checkpointing = True, False

    def enable_gradient_checkpointing(self):
        self.is_gradient_checkpointing = True


@pytest.mark.parametrize("asked", [True, False])
def test_the_anchor_keeps_as_few_activations_as_the_distillation(asked):
    teacher = SimpleNamespace(denoiser=Checkpointed(1, 1), encode=lambda prompts: prompts, latent_shape=(1, 1, 1, 1))
    distilled = ds.DistillationConfig(gradient_checkpointing=asked)
    anchor = warm_anchor(
        teacher, None, ["a"], AnchorConfig(warmup=0), distilled, num_steps=1, batch_size=1, seed=0, device="cpu"
    )
    assert anchor.fake_score.is_gradient_checkpointing is asked and not teacher.denoiser.is_gradient_checkpointing
