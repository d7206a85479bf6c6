"""The recipes for several rewards, on the embedded teacher as an untrained student and with tiny sizes."""

from functools import partial
from pathlib import Path

import pytest

import distillation as ds
import latent_rewards as lr
from recipes import constrained, multi_reward, pareto

TEACHER = Path(__file__).parents[2] / "recipes" / "moving_digits" / "weights" / "teacher"
TINY = ["--queries", "32", "--updates", "3"]

pytestmark = pytest.mark.filterwarnings("ignore:.*proxy")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    teacher = ds.load_teacher(str(TEACHER), device="cpu")
    made = ds.FewStepStudent(
        teacher.denoiser, encode=teacher.encode, latent_shape=teacher.latent_shape, exporter=teacher.exporter
    )
    folder = tmp_path_factory.mktemp("student") / "student"
    made.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny(monkeypatch):
    """Cut what the recipes leave to defaults."""
    small = {"ensemble_size": 2, "num_updates": 4, "decoder_updates": 4, "width": 8}
    proxy = lr.ProxyConfig(trunk="pixels", progress=False, device="cpu", **small)
    sizes = {"prompts_per_update": 2, "num_generations": 2, "num_draws": 2, "refresh_steps": 2, "holdout_samples": 4}
    config = lr.LROConfig
    monkeypatch.setattr(lr, "train_proxy", partial(lr.train_proxy, config=proxy))

    def shrunk(**given):
        return config(**{**given, **sizes, "refresh_every": 2, "refresh_queries": 8, "device": "cpu"})

    monkeypatch.setattr(lr, "LROConfig", shrunk)


def test_constrained(student, tiny, tmp_path, capsys):
    constrained.main(["--student", student, "--output", str(tmp_path / "out"), "--keep", "quality.sharpness=2", *TINY])
    said = capsys.readouterr().out
    assert "digits.legibility: true mean" in said and "quality.sharpness: true mean" in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert "prices of the floors" in page and "violation/quality.sharpness" in page
    ds.FewStepStudent.from_pretrained(tmp_path / "out")


def test_multi_reward(student, tiny, tmp_path, capsys):
    multi_reward.main(["--student", student, "--output", str(tmp_path / "out"), *TINY])
    assert "quality.sharpness: true mean" in capsys.readouterr().out
    ds.FewStepStudent.from_pretrained(tmp_path / "out")


def test_pareto(student, tiny, tmp_path, capsys):
    metrics = ["--metric", "digits.legibility", "--metric", "quality.sharpness"]
    sizes = ["--points", "2", "--scored", "8", "--rank", "1"]
    pareto.main(["--student", student, "--output", str(tmp_path / "out"), *metrics, *sizes, *TINY])
    assert "hypervolume over the student" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Pareto front" in page and "before tuning" in page
    policy = lr.WeightConditioned.from_pretrained(ds.FewStepStudent.from_pretrained(student), tmp_path / "out")
    assert policy.reward_names == ("digits.legibility", "quality.sharpness")
    assert any(bool((addition.up != 0).any()) for addition in policy.additions)
    with pytest.raises(SystemExit):
        pareto.main(["--metric", "digits.legibility"])
    assert "two metrics" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", [constrained, multi_reward])
def test_help_and_mistakes(recipe, capsys):
    with pytest.raises(SystemExit) as left:
        recipe.main(["--help"])
    assert left.value.code == 0 and "--student" in capsys.readouterr().out
    flag = "--keep" if recipe is constrained else "--metric"
    with pytest.raises(SystemExit):
        recipe.main([flag, "motion.dynamic_degree=much"])
    assert "'motion.dynamic_degree=much' is not name=" in capsys.readouterr().err
