"""The recipes that are short, on the embedded teacher as an untrained student and with tiny sizes."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import distillation as ds
import latent_rewards as lr
from latent_rewards.contracts import ConfigError
from latent_rewards.training.checkpoint import FolderInUseError
from latent_rewards.training.devices import DeviceError
from recipes import constrained, custom_metric, multi_reward, pareto

ALL = [constrained, custom_metric, multi_reward, pareto]
TEACHER = Path(__file__).parents[2] / "recipes" / "moving_digits" / "weights" / "teacher"
TINY = ["--queries", "32", "--updates", "3", "--device", "cpu"]

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
    networks = {"ensemble_size": 2, "num_updates": 4, "decoder_updates": 4, "width": 8, "progress": False}
    sizes = {"prompts_per_update": 2, "num_generations": 2, "num_draws": 2, "refresh_steps": 2, "holdout_samples": 4}
    refreshes = {"refresh_every": 2, "refresh_queries": 8}
    for name, small in {"ProxyConfig": networks, "LROConfig": {**sizes, **refreshes}}.items():
        monkeypatch.setattr(lr, name, partial(_shrunk, getattr(lr, name), small))


def _shrunk(config, small, **given):
    return config(**{**given, **small})


@pytest.fixture
def scored(monkeypatch, tmp_path):
    """What a recipe collects, each dataset with whether the output was there before."""
    found, collect = [], lr.collect_rewards

    def noted(*given, **options):
        there = (tmp_path / "out" / "manifest.json").is_file()
        found.append((collect(*given, **options), there))
        return found[-1][0]

    monkeypatch.setattr(lr, "collect_rewards", noted)
    return found


class Begun(Exception):
    """A trainer would be made now."""


@pytest.fixture
def begin(monkeypatch, student, tmp_path):
    """Run a recipe up to its trainer; returns what that and the parts before it were given."""
    given = {}

    def train_proxy(dataset, **options):
        given["proxy"] = options
        return SimpleNamespace(report=dict.fromkeys(dataset.reward_names))

    def trainer(policy, proxy, prompts, **options):
        given["trainer"] = options
        raise Begun

    monkeypatch.setattr(lr, "train_proxy", train_proxy)
    monkeypatch.setattr(lr, "ReinforceTrainer", trainer)

    def run(recipe, *arguments):
        load = recipe.load_student
        monkeypatch.setattr(recipe, "load_student", lambda path, **options: given.update(student=options) or load(path))
        with pytest.raises(Begun):
            recipe.main(["--student", student, "--output", str(tmp_path / "out"), *TINY, *arguments])
        return given

    return run


def test_constrained(student, tiny, scored, tmp_path, capsys):
    constrained.main(["--student", student, "--output", str(tmp_path / "out"), "--keep", "quality.sharpness=2", *TINY])
    said = capsys.readouterr().out
    assert "digits.legibility: true mean" in said and "quality.sharpness: true mean" in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert "prices of the floors" in page and "violation/quality.sharpness" in page
    assert [there for _, there in scored] == [False, True], "saved before anything else can fail"
    ds.FewStepStudent.from_pretrained(tmp_path / "out")


def test_multi_reward(student, tiny, scored, tmp_path, capsys):
    """With one update there is no refresh, so that no true score tells what became of it."""
    few = ["--queries", "32", "--updates", "1", "--device", "cpu"]
    multi_reward.main(["--student", student, "--output", str(tmp_path / "out"), *few])
    said = capsys.readouterr().out
    for name, weight in {"digits.legibility": "1", "quality.sharpness": "0.3"}.items():
        before, after = (float(dataset.rewards[name].mean()) for dataset, _ in scored)
        assert f"{name}, weight {weight}: true mean {before:.4f} -> {after:.4f}" in said
    assert "0 true scores while tuning" in said
    assert [there for _, there in scored] == [False, True]
    ds.FewStepStudent.from_pretrained(tmp_path / "out")


def test_custom_metric(student, tiny, tmp_path, capsys):
    custom_metric.main(["--student", student, "--output", str(tmp_path / "out"), *TINY])
    said = capsys.readouterr().out
    assert "proxy on unseen samples" in said
    assert 0 < said.index("student written") < said.index("update 2: true {'custom.boldness': ")
    before, after = (ds.FewStepStudent.from_pretrained(path) for path in (student, tmp_path / "out"))
    weights = zip(before.parameters(), after.parameters(), strict=True)
    assert any(not torch.equal(old, new) for old, new in weights)


def test_the_metric_of_ones_own_is_the_share_of_bright_pixels():
    videos = torch.zeros(2, 3, 3, 4, 4)
    videos[1, :, 2, :2] = 0.9
    assert custom_metric.boldness(videos).tolist() == [0.0, 0.5]
    lr.check_metric(lr.create_metric("custom.boldness"))


def test_pareto(student, tiny, scored, tmp_path, capsys):
    metrics = ["--metric", "digits.legibility", "--metric", "quality.sharpness"]
    sizes = ["--points", "2", "--scored", "8", "--rank", "1"]
    pareto.main(["--student", student, "--output", str(tmp_path / "out"), *metrics, *sizes, *TINY])
    assert "hypervolume over the student" in capsys.readouterr().out
    assert [there for _, there in scored] == [False, True, True]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Pareto front" in page and "before tuning" in page
    policy = lr.WeightConditioned.from_pretrained(ds.FewStepStudent.from_pretrained(student), tmp_path / "out")
    assert policy.reward_names == ("digits.legibility", "quality.sharpness")
    assert any(bool((addition.up != 0).any()) for addition in policy.additions)
    with pytest.raises(SystemExit):
        pareto.main(["--metric", "digits.legibility"])
    assert "two metrics" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ALL)
def test_a_folder_of_somebody_else_is_refused_before_any_work(recipe, student, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "load_student", None)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FolderInUseError, match="give a new folder"):
        recipe.main(["--student", student, "--output", str(tmp_path), *TINY])


@pytest.mark.parametrize("recipe", ALL)
def test_all_parts_are_on_the_device_asked_for(recipe, begin, monkeypatch):
    monkeypatch.setattr(recipe, "choose_device", lambda name: f"chosen of {name}")
    given = begin(recipe)
    assert given["student"] == {"device": "chosen of cpu"}
    assert given["proxy"]["config"].device == given["trainer"]["config"].device == "cpu"


@pytest.mark.parametrize("recipe", ALL)
def test_a_device_that_is_not_there_is_refused_before_any_work(recipe, tmp_path):
    with pytest.raises(DeviceError, match="cuda:99"):
        recipe.main(["--student", "nowhere", "--output", str(tmp_path / "out"), "--device", "cuda:99"])


def test_several_metrics_are_weighed_with_the_sign_that_is_better(begin):
    metrics = ["quality.blur", "digits.legibility", "compression.jpeg_size=0.5", "quality.sharpness=-2"]
    given = begin(multi_reward, *(part for name in metrics for part in ("--metric", name)))
    expected = {"quality.blur": -1, "digits.legibility": 1, "compression.jpeg_size": 0.5, "quality.sharpness": -2}
    assert given["trainer"]["reward"].weights == expected
    assert given["trainer"]["reward"].normalize == "zscore"


@pytest.mark.parametrize(("raised", "sign"), [("quality.blur", -1), ("quality.sharpness", 1)])
def test_a_metric_of_which_less_is_better_is_lowered_while_others_keep_their_level(begin, raised, sign):
    reward = begin(constrained, "--raise", raised, "--keep", "digits.legibility=0.9")["trainer"]["reward"]
    assert sign * reward.objective.weights[raised] > 0
    assert list(reward.floors) == ["digits.legibility"]


@pytest.mark.parametrize(
    ("recipe", "arguments", "told"),
    [
        (constrained, ["--keep", "quality.blur=0.98"], "--keep quality.blur: less of it is better, and a floor"),
        (pareto, ["--metric", "digits.legibility", "--metric", "quality.blur"], "--metric quality.blur: less of it"),
    ],
)
def test_a_metric_of_which_less_is_better_is_refused_where_more_is_asked_for(
    recipe, arguments, told, student, tmp_path, monkeypatch
):
    monkeypatch.setattr(lr, "collect_rewards", None)
    with pytest.raises(ConfigError, match=f"{re.escape(told)}.*register its negative"):
        recipe.main(["--student", student, "--output", str(tmp_path / "out"), *TINY, *arguments])


@pytest.mark.parametrize("recipe", [constrained, multi_reward])
def test_help_and_mistakes(recipe, capsys):
    with pytest.raises(SystemExit) as left:
        recipe.main(["--help"])
    assert left.value.code == 0 and "--student" in capsys.readouterr().out
    flag = "--keep" if recipe is constrained else "--metric"
    with pytest.raises(SystemExit):
        recipe.main([flag, "motion.dynamic_degree=much"])
    assert "'motion.dynamic_degree=much' is not name=" in capsys.readouterr().err
