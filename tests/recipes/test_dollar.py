import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import latent_rewards as lr
from latent_rewards.contracts import ConfigError
from latent_rewards.training.devices import DeviceError
from latent_rewards.training.run_folder import RunFolder
from latent_rewards.training.settings import SettingsError, read_settings
from recipes import dollar
from recipes.dollar import SECTIONS, Dollar
from recipes.moving_digits.benchmark import DigitsBenchmark
from recipes.run_settings import RunConfig, begun_with, check_sections

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("[!d]*.yaml"))

TINY = {
    "run": {
        "name": "tiny",
        "teacher": str(ROOT / "recipes/moving_digits/weights/teacher"),
        "num_prompts": 64,
        "num_latents": 16,
        "num_queries": 48,
        "num_eval_prompts": 2,
        "device": "cpu",
        "batch_size": 16,
    },
    "distillation": {
        "vsd_steps": 2,
        "cd_steps": 2,
        "batch_size": 2,
        "guidance_scale": 2.0,
        "fake_updates": 1,
        "temporal_weight": 0.1,
        "causal_first_frame": True,
        "checkpoint_every": 1,
        "progress": False,
    },
    "proxy": {"ensemble_size": 2, "num_updates": 4, "width": 8, "progress": False},
    "lro": {
        "num_updates": 3,
        "prompts_per_update": 2,
        "num_generations": 2,
        "num_draws": 2,
        "refresh_every": 2,
        "refresh_queries": 8,
        "refresh_steps": 2,
        "holdout_every": 2,
        "holdout_samples": 8,
        "checkpoint_every": 1,
        "progress": False,
    },
    "anchor": {"warmup": 1},
}


@pytest.fixture
def settings(tmp_path):
    TINY["run"]["output_dir"] = str(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return read_settings(tmp_path / "tiny.yaml", SECTIONS)


def test_killed_after_each_stage_it_resumes_and_ends_in_a_report(settings, tmp_path, monkeypatch):
    made = []
    for stage in ("collect", "fit", "tune", "evaluate", "run to the end"):
        with monkeypatch.context() as patch:
            for owner, name in ((dollar.ds.DistillationTrainer, "train"), (lr.ReinforceTrainer, "train")):
                original = getattr(owner, name)
                patch.setattr(owner, name, lambda self, f=original, o=owner: (made.append(o.__name__), f(self))[1])
            if hasattr(Dollar, stage):
                patch.setattr(Dollar, stage, lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    Dollar(settings).run()
            else:
                report = Dollar(settings).run()
    assert made == ["DistillationTrainer", "DistillationTrainer", "ReinforceTrainer"]
    page = report.read_text()
    assert page.count("<video") == 2 * 11 and "digits.legibility" in page
    rows = [json.loads(f.read_text())["label"] for f in (tmp_path / "tiny" / "evaluation").glob("*/row.json")]
    assert {"real clips", "teacher, 50 steps", "VSD→CD, 1 step", "VSD→CD→LRO (reinforce), 4 steps"} <= set(rows)


def test_two_processes_share_a_run_and_the_first_writes_it(settings, tmp_path, launch):
    done = launch(Path(dollar.__file__), "--config", tmp_path / "tiny.yaml")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tiny"
    assert done.stdout.count("report: ") == 1 and (folder / "report.html").read_text().count("<video") == 2 * 11
    assert len(lr.RewardDataset.load(folder / "rewards")) == TINY["run"]["num_queries"]
    curves = json.loads((folder / "lro_reinforce" / "result.json").read_text())
    assert len(curves["history"]) == 3 and curves["num_queries"] == 8
    # One process finds all of it done, and what it shows meanwhile is not remembered.
    settings["lro"].progress = True
    rows = folder / "evaluation" / "VSD,_4_steps" / "row.json"
    written = rows.stat().st_mtime_ns
    Dollar(settings).run()
    assert rows.stat().st_mtime_ns == written


def test_a_student_of_a_run_brings_no_text_encoder_and_no_codec_of_its_own(settings, tmp_path):
    settings["run"].text_dtype = "bfloat16"
    pipeline = Dollar(settings)
    teacher = pipeline.teacher
    assert {value.dtype for value in teacher.encode.text_encoder.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in teacher.denoiser.parameters()} == {torch.float32}
    begun = dollar.ds.start_student(teacher, settings["distillation"])
    begun.save_pretrained(tmp_path / "student")
    loaded = pipeline.load_student(tmp_path / "student")
    assert loaded._parts["encode"] is teacher.encode and loaded.exporter is teacher.exporter
    assert loaded.grids == begun.grids
    noise = torch.randn(4, 1, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        condition = loaded.encode(pipeline.prompts[:1])
        # Weights are stored in bfloat16, as the teacher's were.
        torch.testing.assert_close(loaded.sample(condition, noise), begun.eval().sample(condition, noise))


@pytest.mark.parametrize(
    ("distillation", "made"),
    [
        ({}, {"VSD": ("student_vsd", {"cd_steps": 0}), "VSD→CD": ("student", {})}),
        ({"cd_steps": 0}, {"VSD": ("student", {})}),
        ({"vsd_steps": 0}, {"CD": ("student", {})}),
        ({"schedule": "joint"}, {"VSD + CD": ("student", {})}),
    ],
)
def test_rows_are_named_after_the_stages_there_are(settings, distillation, made, monkeypatch):
    settings["distillation"] = dataclasses.replace(settings["distillation"], **distillation)
    rows, given, asked = {}, [], []
    monkeypatch.setattr(Dollar, "distil", lambda self, *name, **options: asked.append((*name, options)) or asked[-1])
    monkeypatch.setattr(Dollar, "collect", lambda self, student: given.append(student))
    monkeypatch.setattr(Dollar, "fit", lambda *parts: SimpleNamespace(report={}))
    monkeypatch.setattr(Dollar, "tune", lambda self, name, student, *parts: (given.append(student), {}))
    monkeypatch.setattr(Dollar, "evaluate", lambda self, students: rows.update(students))
    monkeypatch.setattr(dollar, "write_report", lambda *parts, **options: None)
    Dollar(settings).run()
    *labels, last = made
    assert list(rows) == [*labels, last, f"{last}→LRO (reinforce)"] and rows.items() >= made.items()
    assert given == [("student", {})] * 2 and asked == [*made.values()]


def test_the_page_is_told_of_which_metrics_less_is_better(settings, monkeypatch):
    settings["run"].metrics, settings["run"].holdout = ["digits.legibility", "quality.blur"], ["compression.jpeg_size"]
    settings["run"].trainers, told = [], {}
    for stage in ("distil", "collect", "evaluate"):
        monkeypatch.setattr(Dollar, stage, lambda *parts, **options: None)
    monkeypatch.setattr(Dollar, "fit", lambda *parts: SimpleNamespace(report={}))
    monkeypatch.setattr(dollar, "write_report", lambda *parts, **options: told.update(options))
    Dollar(settings).run()
    assert told["lower_is_better"] == {"quality.blur", "compression.jpeg_size"}
    settings["run"].holdout, settings["run"].name = [], "other"
    Dollar(settings).run()
    assert told["lower_is_better"] == {"quality.blur"}


@pytest.mark.parametrize(("own", "expected"), [(3.0, 3.0), (None, 2.0)])
def test_the_teachers_rows_have_a_guidance_of_their_own(settings, own, expected, monkeypatch):
    settings["run"].guidance_scale = own
    asked = []
    monkeypatch.setattr(Dollar, "benchmark", lambda self: SimpleNamespace(add=lambda *a, **k: None))
    monkeypatch.setattr(Dollar, "teacher_sampler", lambda self, steps, guidance: asked.append(guidance))
    monkeypatch.setattr(Dollar, "student_sampler", lambda *a: None)
    Dollar(settings).evaluate({})
    assert asked == [expected] * 3


@pytest.mark.parametrize(
    ("asked", "held"), [({}, []), ({"holdout": ["motion.dynamic_degree"]}, ["motion.dynamic_degree"])]
)
def test_metrics_held_out_by_default_are_those_of_the_world(settings, tmp_path, asked, held):
    assert settings["run"].holdout == ["digits.legibility_holdout"]
    assert RunConfig(holdout=[]).holdout == []
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    metrics = {"metrics": ["quality.sharpness"], **asked}
    run = {**TINY["run"], "world": "prompts", "prompts_file": str(tmp_path / "prompts.txt"), "num_eval_prompts": 1}
    pipeline = Dollar({**settings, "run": RunConfig(**run, **metrics)})
    benchmark = pipeline.benchmark()
    assert list(benchmark.metrics) == ["quality.sharpness", *held]
    assert (benchmark.folder, benchmark.batch_size) == (tmp_path / "tiny" / "evaluation", 16)
    assert (pipeline.holdout is None) == (not held)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_configuration_is_valid(path):
    settings = read_settings(path, SECTIONS)
    assert settings["run"].name
    check_sections(settings, 1)


def test_an_unknown_key_is_named_with_its_neighbour(tmp_path):
    (tmp_path / "typo.yaml").write_text("lro: {num_update: 3}")
    with pytest.raises(SettingsError, match="did you mean 'num_updates'"):
        dollar.main(["--config", str(tmp_path / "typo.yaml")])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"metrics": ["a", "b"], "weights": [1.0]}, "1 weights for 2 metrics"),
        ({"trainers": ["ppo"]}, "unknown trainers"),
        ({"world": "prompts"}, "needs prompts_file"),
        ({"num_eval_prompts": 0}, "num_eval_prompts must be at least 1; got 0"),
        ({"num_prompts": 0}, "num_prompts must be at least 1; got 0"),
        ({"num_queries": -1}, "num_queries must be at least 1; got -1"),
        ({"num_steps": 0}, "num_steps must be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"batch_size": "many"}, "batch_size must be a whole number; got 'many'"),
        ({"num_latents": -1}, "num_latents must be at least 0; got -1"),
        ({"world": "digits"}, "world must be one of 'moving_digits', 'prompts'; got 'digits'"),
        ({"fps": 0}, "fps must be a positive number; got 0"),
        ({"fps": float("nan")}, "fps must be a finite number or None; got nan"),
        ({"guidance_scale": 0}, "guidance_scale must be positive, .* got 0"),
        ({"guidance_scale": -2}, "guidance_scale must be positive, .* got -2"),
        ({"name": ""}, "name must name a folder of its own below output_dir; got ''"),
        ({"name": ".."}, "a folder of its own below output_dir"),
        ({"num_eval_prompts": 41}, "num_eval_prompts: count must be even and between 2 and 200; got 41"),
        ({"num_eval_prompts": 300}, "between 2 and 200; got 300"),
    ],
)
def test_contradictions_are_refused(tmp_path, section, message):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"run": section}))
    with pytest.raises(SettingsError, match=message):
        read_settings(tmp_path / "bad.yaml", SECTIONS)


@pytest.fixture
def begin(settings):
    """Begin a run, or go on with it, with settings changed; nothing is made."""

    def start(changes, run):
        changed = {name: dataclasses.replace(settings[name], **values) for name, values in changes.items()}
        changed["run"] = dataclasses.replace(changed.get("run", settings["run"]), **run)
        pipeline = Dollar({**settings, **changed})
        pipeline.folder.remember(pipeline.remembered())
        return pipeline

    return start


FREE = {
    "distillation": {"progress": True, "checkpoint_every": 7, "gradient_checkpointing": True},
    "proxy": {"progress": True},
    "lro": {"log_with": "tensorboard", "checkpoint_every": 7, "progress": True},
}


@pytest.mark.parametrize("by", ["this version", "one that remembered all"])
def test_what_changes_nothing_that_is_kept_may_change(settings, begin, tmp_path, by):
    if by == "this version":
        begin({}, {})
    else:
        RunFolder(tmp_path / "tiny").remember(settings)
        stored = tmp_path / "tiny" / "settings" / "settings.json"
        known = json.loads(stored.read_text())
        del known["run"]["fps"], known["lro"]["progress"]  # as if they were new
        stored.write_text(json.dumps(known))
    elsewhere = str(tmp_path / "tiny" / "..")
    free = {
        "trainers": ["reinforce", "differentiable"],
        "device": None,
        "output_dir": elsewhere,
        "num_eval_prompts": 4,
        "fps": 12.0,
    }
    begin(FREE, free)
    for changes, message in (({"num_prompts": 65}, "num_prompts = 64, now 65"), ({"seed": 1}, "seed = 0, now 1")):
        with pytest.raises(SettingsError, match=message):
            begin({}, changes)


def test_a_damaged_memory_is_left_to_the_folder(begin, tmp_path):
    assert begun_with(begin({}, {}).folder.path)["run"]["num_eval_prompts"] == 2
    (tmp_path / "tiny" / "settings" / "settings.json").write_text("{")
    assert begun_with(tmp_path / "tiny") == {} == begun_with(tmp_path / "nowhere")


def test_rows_of_other_evaluation_prompts_are_kept_apart(begin, monkeypatch):
    monkeypatch.setattr(DigitsBenchmark, "__init__", lambda self, *parts, **asked: self.__dict__.update(at=parts[2]))
    monkeypatch.setattr(DigitsBenchmark, "add_ceilings", lambda self: None)
    at = [begin({}, {"num_eval_prompts": count}).benchmark().at.name for count in (2, 4, 2)]
    assert at == ["evaluation", "evaluation_4", "evaluation"]


def test_a_run_does_not_go_on_with_other_prompts(settings, begin, tmp_path):
    file = tmp_path / "prompts.txt"
    world = {"world": "prompts", "prompts_file": str(file), "num_eval_prompts": 1, "metrics": ["quality.sharpness"]}

    def start(prompts, **changes):
        file.write_text(prompts)
        begin({}, {**world, "holdout": [], **changes})

    start("a\nb\nc\n")
    start("\n a\nb \nc")
    with pytest.raises(SettingsError, match=r"prompts_file.sha256 = .*restore it"):
        start("a\nb\nd\n")
    with pytest.raises(SettingsError, match="num_eval_prompts = 1, now 2"):
        start("a\nb\nc\n", num_eval_prompts=2)
    # A folder that was begun without remembering them goes on.
    start("a\nb\nc\n", name="old")
    stored = tmp_path / "old" / "settings" / "settings.json"
    stored.write_text(json.dumps({k: v for k, v in json.loads(stored.read_text()).items() if k != "prompts_file"}))
    start("a\nb\nd\n", name="old")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"num_queries": 31}}, "num_queries = 31 samples are too few .* at least proxy.min_samples = 32"),
        ({"proxy": {"objective": "thurstone"}}, "'thurstone' learns from preferences, .* use one of mse, huber"),
        ({"run": {"num_steps": 3}}, "num_steps asks for 3 steps, and the student samples in one of 1, 2, 4"),
        ({"lro": {"step_counts": [4, 8]}}, "lro.step_counts asks for 8 steps"),
        ({"distillation": {"step_counts": [3]}}, "distillation.step_counts asks for 3 steps"),
        ({"run": {"num_steps": 1}}, r"num_steps = 1 is what .* lro.step_counts = \[4\] is what it is tuned at; put 1"),
        ({"distillation": {"seed": 7}}, "distillation.seed = 7 has no effect: all stages take run.seed"),
        ({"proxy": {"device": "cuda:5"}}, "proxy.device = 'cuda:5' has no effect: .* run.device"),
        ({"lro": {"output_dir": "mine"}}, "lro.output_dir = 'mine' has no effect: .* run.output_dir"),
        ({"lro": {"estimator": "pathwise"}}, "trainers, which has 'reinforce': .* belongs to the other trainer"),
        ({"lro": {"estimator": "reinforce", "num_generations": 1}}, "num_generations must be at least 2"),
    ],
)
def test_sections_that_do_not_fit_are_refused_before_the_teacher_is_loaded(settings, changes, message):
    for name, values in changes.items():
        settings[name] = dataclasses.replace(settings[name], **values)
    settings["run"].teacher = "nowhere"
    with pytest.raises(SettingsError, match=message):
        Dollar(settings)


@pytest.mark.parametrize(("section", "key"), [("distillation", "batch_size"), ("lro", "prompts_per_update")])
def test_batches_that_processes_cannot_share_are_refused(settings, section, key):
    check_sections(settings, 2)
    settings[section] = dataclasses.replace(settings[section], **{key: 3})
    with pytest.raises(SettingsError, match=f"{section}.{key} = 3 cannot be shared by 2 processes"):
        check_sections(settings, 2)


def test_what_only_tuning_needs_is_not_asked_of_a_run_without_trainers(settings):
    settings["lro"] = dataclasses.replace(settings["lro"], estimator="pathwise", step_counts=[8], prompts_per_update=3)
    settings["run"].trainers = []
    check_sections(settings, 2)


@pytest.mark.parametrize("weights", [None, [1.0, -2.0]])
def test_a_trainer_that_normalises_each_metric_is_given_a_plain_sum(settings, weights):
    settings["run"].metrics, settings["run"].weights = ["digits.legibility", "quality.blur"], weights
    assert Dollar(settings).reward().normalize == "zscore"
    settings["lro"].multi_objective_aggregation = "normalize_then_sum"
    reward = Dollar(settings).reward()
    assert reward.normalize is None
    assert reward.weights == {"digits.legibility": 1.0, "quality.blur": -1.0 if weights is None else -2.0}
    settings["run"].metrics, settings["run"].weights = ["digits.legibility"], None
    assert Dollar(settings).reward().weights == {"digits.legibility": 1.0}


def test_a_reward_that_cannot_be_taken_apart_is_refused_before_any_work(settings, tmp_path):
    settings["lro"].gradient_aggregation = "upgrad"
    with pytest.raises(ConfigError, match="needs reward=WeightedSum.* of at least two"):
        Dollar(settings)
    settings["run"].trainers = []
    Dollar(settings)


@pytest.mark.parametrize(("name", "file"), [("tiny", "tiny"), ("above/tiny", "above")])
def test_a_file_where_the_run_is_to_be_kept_is_named(settings, tmp_path, name, file):
    (tmp_path / file).write_text("mine")
    settings["run"].name, settings["run"].teacher = name, "nowhere"
    with pytest.raises(SettingsError, match=f"{file} is a file, and .*{name} is where the run is kept; choose another"):
        Dollar(settings)


def test_a_teacher_folder_that_is_none_is_named(settings, tmp_path):
    settings["run"].teacher = str(tmp_path)
    with pytest.raises(ValueError, match="model_index.json"):
        Dollar(settings)


@pytest.mark.parametrize(("trunk", "decodes"), [("pixels", True), ("conv3d", False)])
def test_the_proxy_gets_the_codec_where_its_trunk_reads_pixels(settings, trunk, decodes, monkeypatch):
    given = {}

    def train_proxy(dataset, **options):
        given.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(dollar.lr, "train_proxy", train_proxy)
    pipeline = Dollar({**settings, "proxy": lr.ProxyConfig(trunk=trunk)})
    with pytest.raises(KeyboardInterrupt):
        pipeline.fit(None)
    assert given["codec"] is (pipeline.codec if decodes else None)


def test_a_device_that_is_not_there_is_refused_before_the_teacher_is_loaded(settings, tmp_path):
    settings["run"].teacher, settings["run"].device = "nowhere", "cuda:99"
    with pytest.raises(DeviceError, match="cuda:99"):
        Dollar(settings)
