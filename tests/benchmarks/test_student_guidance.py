import pytest
import torch

from benchmarks.digits import CONFIG, seeded
from benchmarks.student_guidance import Selection, spread
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
