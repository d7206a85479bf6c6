"""Every scale is sampled with itself, and the best total is chosen."""

import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import guidance


@pytest.fixture
def sampled(monkeypatch):
    """What the teacher was asked for; clips are the guidance they were made with."""
    asked = []

    def sample_teacher(denoiser, condition, noise, *, num_steps, guidance_scale, negative):
        asked.append((condition, noise, num_steps, negative))
        return guidance_scale

    teacher = SimpleNamespace(
        denoiser=None, latent_shape=(1, 1, 1, 1), encode=tuple, codec=SimpleNamespace(decode=lambda scale: scale)
    )
    monkeypatch.setattr(guidance.ds, "load_teacher", lambda folder: teacher)
    monkeypatch.setattr(guidance.ds, "sample_teacher", sample_teacher)
    for name in ("build_reference", "noise_clips"):
        monkeypatch.setattr(guidance, name, lambda *_: None)
    monkeypatch.setattr(guidance.Judge, "load", lambda: None)
    monkeypatch.setattr(guidance, "selection_prompts", lambda count: ["a", "b"][:count])
    monkeypatch.setattr(guidance, "generate_clips", lambda sample, prompts, shape, stage: sample(prompts, ["noise"]))
    score = lambda clips, *_: SimpleNamespace(scores={"total": 50.0 - abs(clips - 2.0), "frechet": clips})  # noqa: E731
    monkeypatch.setattr(guidance, "evaluate", score)
    return asked


def test_the_best_total_is_chosen_and_the_file_that_is_named_is_written(sampled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["guidance", "--num-prompts", "2", "--results", str(tmp_path / "told.json")])
    guidance.main()
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["chosen"] == 2.0 and [float(scale) for scale in told["scores"]] == list(guidance.CANDIDATES)
    assert {float(scale): scores["frechet"] for scale, scores in told["scores"].items()} == {
        scale: scale for scale in guidance.CANDIDATES
    }
    assert sampled == [(("a", "b"), "noise", 50, ("", ""))] * len(guidance.CANDIDATES)
    assert f"chosen: 2.0; written to {tmp_path / 'told.json'}" in capsys.readouterr().out
