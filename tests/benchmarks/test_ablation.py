import json
import sys
from types import SimpleNamespace

import pytest
import yaml

from benchmarks import ablation, headroom, temporal
from benchmarks.ablation import CLAIMS, TITLES, Ablation, summarise
from benchmarks.passes import passes
from latent_rewards.contracts import ConfigError
from latent_rewards.training.devices import DeviceError
from latent_rewards.training.settings import read_settings
from recipes.dollar import SECTIONS, Dollar
from recipes.moving_digits.benchmark import REAL_CLIPS, DigitsBenchmark

STEPS = ("4 steps", "2 steps", "1 step")
SCORES = ("total", "quality", "semantic", "diversity", "frechet", "accuracy/digit", "digits.legibility")


def test_cd_at_low_noise_takes_what_vsd_and_cd_take(monkeypatch, tmp_path):
    trained = []
    monkeypatch.setattr(ablation, "_distil", lambda pipeline, config: trained.append(config))
    race = Ablation("recipes/configs/moving_digits_full.yaml", tmp_path)
    settings = read_settings(race.config, SECTIONS)
    pipeline = SimpleNamespace(settings=settings, config=settings["run"])
    ablation._low_noise(race, pipeline, tmp_path)
    (config,) = trained
    spent = config.vsd_steps * passes(config, "vsd") + config.cd_steps * passes(config, "cd")
    assert spent == pytest.approx(race.budget(pipeline), abs=passes(config, "vsd") / 2)
    assert config.cd_on_samples and config.num_cd_intervals == 1 and config.cd_steps == ablation.LOW_NOISE_UPDATES


def result(method, seed, total):
    rows = {
        f"{TITLES[method]}, {steps}": {"scores": dict.fromkeys(SCORES, total + bonus)}
        for steps, bonus in (("4 steps", 2.0), ("2 steps", 1.0), ("1 step", 0.0))
    }
    differences = {
        f"{label} minus teacher, 50 steps": {score: {"difference": 1.0} for score in SCORES} for label in rows
    }
    return {"method": method, "seed": seed, "rows": rows, "differences": differences}


def test_orderings_are_told_over_the_seeds_both_have():
    results = [result("vsd_cd", seed, total) for seed, total in ((0, 60.0), (1, 50.0), (2, 70.0))]
    results += [result("cd", seed, total) for seed, total in ((0, 55.0), (1, 53.0))]
    summary, markdown = summarise(results)
    told = summary["orderings"]["VSD→CD above CD alone"]["4 steps"]
    assert told == {"difference": pytest.approx(1.0), "agree": 1, "seeds": 2}
    assert set(summary["orderings"]) == {"VSD→CD above CD alone"}
    assert summary["rows"]["VSD→CD, 4 steps"]["total"]["mean"] == pytest.approx(62.0)
    assert summary["seeds"] == {"vsd_cd": [0, 1, 2], "cd": [0, 1]}
    assert "| VSD→CD above CD alone | +1.0 (1 of 2) | +1.0 (1 of 2) | +1.0 (1 of 2) |" in markdown


def test_every_claim_is_of_methods_there_are():
    assert {method for pair in CLAIMS.values() for method in pair} <= set(TITLES)


def test_the_share_of_terms_is_that_of_the_loss_they_go_with():
    history = [{"vsd_loss": 1.0, "temporal_loss": 2.0, "feature_loss": 4.0}] * 10 + [{"cd_loss": 4.0}] * 10
    weights = {"temporal_weight": 0.1, "feature_weight": 0.05, "correspondence_weight": 3.0}
    assert temporal.share_of_terms(history, weights) == {"first": pytest.approx(0.4), "last": 0.0}


@pytest.fixture
def small(tmp_path):
    """The demo's settings with eight encoded clips."""
    settings = yaml.safe_load(open("recipes/configs/moving_digits.yaml"))
    settings["run"] |= {"num_latents": 8, "num_prompts": 8}
    settings["distillation"] |= {"batch_size": 2, "progress": False}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    module.main()


def test_methods_are_trained_scored_and_compared(small, tmp_path, monkeypatch, capsys):
    results, real_pipeline = tmp_path / "results", DigitsBenchmark.add

    def shorter(self, label, sample, *, num_steps, network_evaluations):
        if label in ("teacher, 8 steps", "teacher, 4 steps"):
            return None
        return real_pipeline(self, label, sample, num_steps=num_steps, network_evaluations=network_evaluations)

    monkeypatch.setattr(DigitsBenchmark, "add", shorter)
    where = ("--runs", tmp_path / "runs", "--device", "cpu", "--config", small, "--results")
    some = ("--share", 0.0002, "--prompts", 2, "--seeds", 0)
    run(ablation, monkeypatch, *where, results, *some, "--methods", "progressive", "turbo")
    found = json.loads((results / "progressive-seed0.json").read_text())
    assert list(found["rows"]) == [f"progressive distillation, {steps}" for steps in ("4 steps", "2 steps", "1 step")]
    assert all(set(SCORES) <= set(row["scores"]) for row in found["rows"].values())
    seeds = json.loads((results / "summary.json").read_text())["seeds"]
    assert seeds == {"reference": [0], "progressive": [0], "turbo": [0]}
    capsys.readouterr()
    run(ablation, monkeypatch, *where, results, "--summary")
    assert "| T2V-Turbo, 1 step |" in capsys.readouterr().out
    drawn, student_sampler, clock = [], Dollar.student_sampler, iter((10.0, 17.0))

    def counted(self, student, num_steps):
        sample = student_sampler(self, student, num_steps)
        return lambda prompts, noise: drawn.append(len(prompts)) or sample(prompts, noise)

    monkeypatch.setattr(Dollar, "student_sampler", counted)
    monkeypatch.setattr(temporal, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    run(temporal, monkeypatch, *where, tmp_path / "motion", *some, "--terms", "feature")
    told = json.loads((tmp_path / "motion" / "feature-seed0.json").read_text())
    assert drawn == [8], "the judge and the metrics of motion see the same clips"
    assert (told["seconds"], told["device"]) == (7.0, "cpu")
    assert set(told["metrics"]) == set(temporal.METRICS) and told["shares"]["vsd"]["first"] > 0


@pytest.mark.parametrize("module", [ablation, temporal, headroom])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("--share", 0.5), "share = 1.0, now 0.5"),
        (("--prompts", 4), "prompts = 40, now 4"),
        (("--config", "{folder}/changed.yaml"), "distillation.learning_rate = .*, now 0.05"),
    ],
)
def test_results_of_a_trial_are_not_taken_for_the_full_runs(module, changed, said, tmp_path, monkeypatch):
    measured = []

    def measure(self, *of):
        measured.append(of)
        return {"seconds": 0.0, "metrics": {}}

    for kind, name in ((Ablation, "measure"), (Ablation, "reference"), (temporal.Terms, "motion")):
        monkeypatch.setattr(kind, name, measure)
    monkeypatch.setattr(temporal.Terms, "real", measure)
    monkeypatch.setattr(headroom.Headroom, "headroom", measure)
    monkeypatch.setattr(module, "summarise", lambda results: ({}, ""))
    config = yaml.safe_load(open("recipes/configs/moving_digits.yaml"))
    config["distillation"]["learning_rate"] = 0.05
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(config))
    changed = [str(argument).format(folder=tmp_path) for argument in changed]
    where = ("--results", tmp_path, "--device", "cpu", "--config", "recipes/configs/moving_digits.yaml", "--seeds", 1)
    run(module, monkeypatch, *where)
    count = len(measured)
    run(module, monkeypatch, *where)
    assert len(measured) == count > 0
    with pytest.raises(ConfigError, match=f"was measured with .*{said}"):
        run(module, monkeypatch, *where, 1, 0, *changed)
    assert len(measured) == count, "refused before anything was measured"


def test_weights_of_a_term_are_settings_of_its_results(tmp_path):
    race = temporal.Terms("recipes/configs/moving_digits.yaml", tmp_path)
    plain, feature = race.trained_with("none"), race.trained_with("feature")
    assert {name for name in plain if plain[name] != feature[name]} == {"distillation.feature_weight"}


def test_the_teachers_row_is_made_before_anything_is_trained(tmp_path, monkeypatch):
    done = []

    class Table:
        def __init__(self, name):
            self.name, self.rows = name, {}

        def add_ceilings(self):
            pass

        def add(self, label, sample, *, num_steps, network_evaluations):
            done.append((self.name, label))
            evaluation = SimpleNamespace(scores={"total": network_evaluations})
            self.rows[label] = SimpleNamespace(evaluation=evaluation, seconds=1.0, network_evaluations=1, commit=None)
            return self.rows[label]

    def paired(table, base, label):
        return table.rows[label].evaluation.scores["total"] - table.rows[base].evaluation.scores["total"]

    config = SimpleNamespace(guidance_scale=3.0)
    pipeline = SimpleNamespace(config=config, teacher_sampler=lambda *_: None, student_sampler=lambda *_: None)
    monkeypatch.setattr(Ablation, "pipeline", lambda self, seed: pipeline)
    monkeypatch.setattr(Ablation, "benchmark", lambda self, pipeline, name: Table(name))
    monkeypatch.setattr(Ablation, "train", lambda self, *_: done.append("trained") or dict.fromkeys(ablation.STEPS))
    monkeypatch.setattr(ablation, "paired", paired)
    race = Ablation("recipes/configs/moving_digits.yaml", tmp_path)
    told = race.measure("vsd", 0)
    assert done[:2] == [(ablation.REFERENCE, ablation.TEACHER), "trained"]
    against = {f"VSD, {steps} minus teacher, 50 steps": int(steps[0]) - 100 for steps in STEPS}
    assert told["differences"] == against
    assert set(told["rows"]) == {f"VSD, {s}" for s in STEPS} and told["device"] == "cpu"
    reference = race.reference()
    assert list(reference["rows"]) == [f"teacher, {steps} steps" for steps in (50, 8, 4)] + ["teacher, 1 step"]
    assert reference["device"] == "cpu"


def test_a_device_that_is_not_there_is_refused_before_any_work(tmp_path):
    with pytest.raises(DeviceError, match="'cuda:7' cannot be used"):
        Ablation("recipes/configs/moving_digits.yaml", tmp_path, device="cuda:7")


def test_real_clips_are_shared_by_evaluations_of_as_many_prompts_alone(tmp_path, monkeypatch):
    def table(codec, shape, folder, *, num_prompts):
        if not (folder / REAL_CLIPS).is_file():
            made.append(folder.name)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / REAL_CLIPS).write_text(f"of {num_prompts} prompts")
        return (folder / REAL_CLIPS).read_text()

    made = []
    monkeypatch.setattr(ablation, "DigitsBenchmark", table)
    race = Ablation("recipes/configs/moving_digits.yaml", tmp_path)
    teacher = SimpleNamespace(latent_shape=None)
    for count in (2, 40):
        pipeline = SimpleNamespace(config=SimpleNamespace(num_eval_prompts=count), codec=None, teacher=teacher)
        for name in (ablation.REFERENCE, "vsd-seed0"):
            assert race.benchmark(pipeline, name) == f"of {count} prompts"
    assert made == [ablation.REFERENCE] * 2


@pytest.mark.parametrize(("module", "flag"), [(ablation, "--methods"), (temporal, "--terms")])
def test_what_there_is_none_of_is_named(module, flag, monkeypatch):
    with pytest.raises(ConfigError, match="nothing"):
        run(module, monkeypatch, flag, "nothing")
