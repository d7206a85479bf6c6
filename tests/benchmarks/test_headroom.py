import json
import sys

import pytest
import torch
import yaml

from benchmarks import headroom
from benchmarks.headroom import ENDS, End, chain, plain
from distillation.denoiser import GaussianDenoiser
from distillation.sampler import follow_ode
from distillation.schedule import RectifiedFlow
from distillation.student import FewStepStudent

M, S = 0.3, 0.7


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def student():
    return FewStepStudent(GaussianDenoiser(M, S, RectifiedFlow()))


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_a_chain_in_which_nothing_is_replaced_is_the_students(student, num_steps):
    noise = normal(num_steps, 3, 1, 2, 1, 1)
    assert torch.allclose(chain(student, None, noise, {}), student.sample(None, noise, num_steps), rtol=0, atol=1e-13)


def test_an_end_takes_the_place_of_its_call_alone(student):
    noise, seen = normal(4, 3, 1, 2, 1, 1), []

    def end(x, t):
        seen.append(t)
        return x + t

    first = chain(student, None, noise, {0: end})
    mean, std = student.transition(0.75 * noise[1] + 0.25 * (noise[0] + 1), 1, 4)
    for step in (2, 3):
        mean, std = student.transition(mean + std * noise[step], step, 4)
    assert torch.allclose(first, mean, rtol=0, atol=1e-13)
    chain(student, None, noise, {3: end})
    assert seen == [1.0, 0.25]


def test_one_step_of_a_path_is_the_prediction_and_many_are_the_exact_flow(student):
    x = normal(5, 1, 2, 1, 1)
    one, many = (
        follow_ode(student.denoiser, x, End(2, 1, "teacher", path_steps=n).times(0.5), None) for n in (1, 2000)
    )
    assert torch.allclose(one, student.denoiser(x, 0.5).x0, rtol=0, atol=1e-13)
    # Row 2: the probability flow maps x_t to m + (x_t - alpha m) s / sqrt(alpha^2 s^2 + sigma^2).
    exact = M + (x - 0.5 * M) * S / (0.25 * S**2 + 0.25) ** 0.5
    assert torch.allclose(many, exact, atol=2e-3)


def test_labels_tell_ends_apart():
    labels = [end.label for end in ENDS]
    assert len({*labels}) == len(labels)
    assert labels[0] == "VSD, 4 steps, call 4 by 1 step of the teacher"


def test_a_seed_is_scored_and_aggregated(tmp_path, monkeypatch, capsys):
    settings = yaml.safe_load(open("recipes/configs/moving_digits.yaml"))
    settings["run"] |= {"num_latents": 8, "num_prompts": 8}
    settings["distillation"] |= {"batch_size": 2, "progress": False}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    ends = (End(2, 1, "student", path_steps=2), End(1, 0, "teacher", path_steps=4, guidance_scale=3.0))
    monkeypatch.setattr(headroom, "ENDS", ends)
    where = ["--runs", tmp_path / "runs", "--results", tmp_path / "results", "--config", tmp_path / "small.yaml"]
    some = ["--share", 0.0002, "--prompts", 2, "--seeds", 0, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, [*where, *some])])
    headroom.main()
    found = json.loads((tmp_path / "results" / "seed0.json").read_text())
    assert list(found["rows"]) == [plain(4), plain(2), plain(1), *(end.label for end in ends)]
    evaluations = [row["network_evaluations"] for row in found["rows"].values()]
    assert evaluations == [4, 2, 1, 3, 7], "of four guided steps three are above guidance_start"
    for end in ends:
        assert found["rows"][end.label]["scores"] != found["rows"][plain(end.num_steps)]["scores"]
    told = json.loads((tmp_path / "results" / "summary.json").read_text())
    gain = found["rows"][ends[0].label]["scores"]["total"] - found["rows"][plain(2)]["scores"]["total"]
    assert told["gains"][ends[0].label]["mean"] == pytest.approx(gain)
    assert told["gains"][ends[0].label]["above"] == int(gain > 0)
    assert f"| {ends[0].label} |" in capsys.readouterr().out
