import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import student_guidance
from benchmarks.digits import CONFIG, seeded
from benchmarks.student_guidance import Selection, spread
from latent_rewards.training.settings import SettingsError
from recipes.dollar import Dollar
from recipes.moving_digits.benchmark import TUNED
from recipes.moving_digits.evaluation import PIXEL_METRICS


def test_spread_is_the_distance_between_samples_of_one_prompt_whatever_the_prompts_are():
    draw = torch.randn(2000, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = (100 * torch.arange(2000)[:, None, None] + 0.5 * draw).flatten(0, 1)
    assert spread(samples) == pytest.approx(0.5 * 2**0.5, rel=0.02)
    assert spread(samples[:4].new_ones(4, 8)) == 0


def test_a_sampler_is_scored_without_the_judge(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.moving_digits.judge.Judge.load", None)
    settings = seeded(CONFIG, 0)
    settings["run"].output_dir = str(tmp_path)
    pipeline = Dollar(settings)
    scores = Selection(pipeline, num_prompts=2).score(lambda prompts, noise: noise[0], 1)
    assert set(scores) == {"quality", TUNED, "spread", *PIXEL_METRICS}
    assert scores["spread"] == pytest.approx(2**0.5, rel=0.05), "noise"
    assert scores["quality"] < 30


def test_students_are_scored_into_the_file_that_is_named_and_never_taken_for_others(tmp_path, monkeypatch):
    trained = []
    settings = seeded(CONFIG, 0)
    settings["run"].output_dir = str(tmp_path / "runs")
    monkeypatch.setattr(student_guidance, "seeded", lambda config, seed: settings)
    monkeypatch.setattr(Dollar, "distil", lambda self, name: trained.append(self.settings["distillation"]))
    monkeypatch.setattr(Dollar, "student_sampler", lambda self, student, steps: steps)
    selection = SimpleNamespace(score=lambda sample, steps: {"quality": 10.0 * steps})
    monkeypatch.setattr(student_guidance, "Selection", lambda pipeline, count: selection)
    asked = ["student_guidance", "--vsd-steps", "7", "--results", str(tmp_path / "told.json")]
    monkeypatch.setattr(sys, "argv", asked)
    student_guidance.main()
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["vsd_steps"] == 7 and told["scores"]["VSD at 1.5 and 1.5, 4 step(s)"] == {"quality": 40.0}
    assert len(told["scores"]) == 1 + 2 * len(student_guidance.CANDIDATES) and told["commit"]
    pairs = [(config.guidance_scale, config.refine_guidance_scale) for config in trained]
    assert pairs == list(student_guidance.CANDIDATES) and {config.vsd_steps for config in trained} == {7}
    settings["distillation"].learning_rate = 0.05
    with pytest.raises(SettingsError, match=r"distillation.learning_rate = .*, now 0.05"):
        student_guidance.main()
    assert len(trained) == len(student_guidance.CANDIDATES)
