"""Rows are kept with what measured them."""

import json
from functools import partial

import pytest
import torch

import distillation as ds
from recipes.moving_digits import benchmark
from recipes.moving_digits.benchmark import DigitsBenchmark
from recipes.moving_digits.evaluation_set import noise_clips


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "noise_clips", partial(noise_clips, count=8))
    teacher = ds.load_teacher("recipes/moving_digits/weights/teacher")
    return lambda: DigitsBenchmark(teacher.codec, teacher.latent_shape, tmp_path, num_prompts=2)


def test_a_row_keeps_the_commit_that_measured_it(make, tmp_path, monkeypatch):
    clips = torch.rand(8, 17, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(benchmark, "commit_of", lambda folder: "1234567")
    assert make().add_clips("noise", clips, 0.5, network_evaluations=1).commit == "1234567"
    monkeypatch.setattr(benchmark, "commit_of", lambda folder: "another")
    again = make()
    again.load_rows()
    assert again.rows["noise"].commit == "1234567"
    file = tmp_path / "noise" / "row.json"
    facts = json.loads(file.read_text())
    del facts["commit"]
    file.write_text(json.dumps(facts))
    again.load_rows()
    assert again.rows["noise"].commit is None
