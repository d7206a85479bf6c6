"""Two processes of one launch end with the networks of one process: the samples do not depend on their number."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
import torch
from distillation.config import DistillationConfig
from distillation.errors import DistillationConfigError
from distillation.schedule import RectifiedFlow
from distillation.stage import Stage
from distillation.student import FewStepStudent
from distillation.trainer import DistillationTrainer
from distillation.vsd import VSDAnchor
from latent_rewards.training.randomness import sample_noise
from latent_rewards.training.ranks import current_ranks

SHAPE = (1, 3, 3, 3)

def pair(toys):
    encode = lambda prompts: toys["Numbers"](torch.tensor([float(len(prompt)) for prompt in prompts]))
    teacher = SimpleNamespace(denoiser=toys["LearnableGaussian"](RectifiedFlow(), 0.3, 0.7, reach=0.1), encode=encode)
    return teacher, FewStepStudent(toys["AffineDenoiser"](RectifiedFlow(), 1.2, -0.3), latent_shape=SHAPE)

def distilled(toys, batch_size=6, **settings):
    torch.set_num_threads(1)
    teacher, student = pair(toys)
    config = DistillationConfig(vsd_steps=5, cd_steps=5, batch_size=batch_size, step_counts=[1, 2], guidance_scale=2.0,
                                learning_rate=0.01, fake_learning_rate=0.01, fake_updates=2, num_timesteps=10,
                                temporal_weight=0.1, ema_decay=0.5, progress=False, device="cpu", **settings)
    DistillationTrainer(teacher, student, ["a", "bb", "cccc"], config).train()
    return [float(parameter.detach()) for parameter in student.denoiser.parameters()]

def logged(toys, folder):
    joined, run = [], Stage.run
    Stage.run = lambda stage: joined.append([stage.name, stage.loop.ranks.index, stage.loop.ranks.count]) or run(stage)
    return distilled(toys, log_with="tensorboard", log_every=1, output_dir=str(folder)), joined

def anchored(toys):
    torch.set_num_threads(1)
    teacher, student = pair(toys)
    fake = toys["LearnableGaussian"](RectifiedFlow(), 0.0, 1.0)
    anchor = VSDAnchor(teacher.denoiser, fake, guidance_scale=2.0, encode=teacher.encode, learning_rate=0.01,
                       fake_updates=2, seed=3)
    ranks = current_ranks()
    for step in range(3):
        part = ranks.part(6)
        noise = torch.stack([sample_noise(1, f"noise/{k}", step, part, SHAPE, dtype=torch.float64) for k in range(2)])
        student.zero_grad()
        anchor.loss(student, toys["Numbers"](torch.tensor([float(i) for i in part])), noise).backward()
        gradients = [p.grad for p in student.denoiser.parameters() if p.grad is not None]
        ranks.average(gradients)
        anchor.after_step()
    return [float(value.detach()) for value in [*gradients, *fake.parameters()]]

if __name__ == "__main__":
    toys, told = run_path(sys.argv[1]), Path(sys.argv[2], f"rank{os.environ['RANK']}.json")
    current_ranks()
    found = {schedule: distilled(toys, schedule=schedule) for schedule in ("sequential", "joint")}
    found["anchor"] = anchored(toys)
    try:
        distilled(toys, batch_size=5)
    except DistillationConfigError as error:
        found["error"] = str(error)
    found["logged"] = logged(toys, Path(sys.argv[2], "logged"))
    told.write_text(json.dumps(found))
    current_ranks().leave()
"""
TOYS = Path(__file__).with_name("conftest.py")


@pytest.fixture(scope="module")
def launched(launch, tmp_path_factory):
    root = tmp_path_factory.mktemp("distillation_ranks")
    (root / "script.py").write_text(SCRIPT)
    done = launch(root / "script.py", TOYS, root)
    assert done.returncode == 0, done.stderr
    return root, [json.loads((root / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["sequential", "joint", "anchor"])
def test_two_processes_end_where_one_ends(launched, name):
    root, parts = launched
    alone, toys = runpy.run_path(str(root / "script.py")), runpy.run_path(str(TOYS))
    whole = alone["anchored"](toys) if name == "anchor" else alone["distilled"](toys, schedule=name)
    assert parts[0][name] == parts[1][name] == pytest.approx(whole, rel=1e-9, abs=1e-12)


def test_a_batch_that_cannot_be_shared_is_refused(launched):
    _, parts = launched
    assert [part["error"] for part in parts] == ["batch_size=5 cannot be shared by 2 ranks; use a multiple"] * 2


def test_a_tracker_that_ends_with_its_stage_leaves_the_processes_together(launched):
    root, parts = launched
    for index, part in enumerate(parts):
        weights, joined = part["logged"]
        assert joined == [["vsd", index, 2], ["cd", index, 2]]
        assert weights == part["sequential"]
    for stage in ("vsd", "cd"):  # written once, by the first process
        assert len(list((root / "logged" / stage).rglob("events.out.tfevents.*"))) == 1
