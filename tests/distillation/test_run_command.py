"""`latent-distill run` on a tiny pipeline: real files, a process that is really killed, refusals before any work."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

import distillation as ds
from distillation import run_command
from distillation.cli import build_parser, main
from distillation.families.adapters import load_adapter
from latent_rewards.training.ranks import Ranks

SIZE = {"num_frames": 5, "height": 16, "width": 16}
DISTILLATION = {
    "vsd_steps": 3,
    "cd_steps": 2,
    "batch_size": 2,
    "step_counts": [1, 2],
    "fake_updates": 1,
    "learning_rate": 1e-3,
    "checkpoint_every": 1,
    "progress": False,
}

# Dies as the kernel kills it, with the second checkpoint whole and the third not begun.
KILLED = """
import os, signal, sys
from latent_rewards.training.loop import TrainingLoop
save = TrainingLoop.save
def then_die(self):
    save(self)
    if self.name == "vsd" and self.step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
TrainingLoop.save = then_die
from distillation.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def write(tmp_path, wan_pipeline):
    """Write a settings file for the tiny pipeline; returns its path."""

    def write(output="run", **changes):
        (tmp_path / "prompts.txt").write_text("a digit moves left\n\ntwo digits rest\n")
        content = {
            "teacher": {"path": str(wan_pipeline), **SIZE, "device": "cpu"},
            "data": {"prompts_file": str(tmp_path / "prompts.txt")},
            "distillation": {**DISTILLATION, "output_dir": str(tmp_path / output)},
        }
        for section, values in changes.items():
            content[section] = {**content.get(section, {}), **values}
        file = tmp_path / f"{output}.yaml"
        file.write_text(yaml.safe_dump(content))
        return str(file)

    return write


def weights(folder):
    return ds.FewStepStudent.from_pretrained(folder).denoiser.state_dict()


class Stored:
    """Something that is saved as a run's student is."""

    def save_pretrained(self, path, *, merge_adapters):
        assert merge_adapters
        from latent_rewards.training.checkpoint import commit_directory

        with commit_directory(path) as folder:
            (folder / "weights").write_text("1")


def test_a_killed_run_resumes_to_the_weights_of_an_undisturbed_one(write, tmp_path, wan_pipeline, capsys):
    assert main(["run", "--config", write("whole")]) == 0
    command = [sys.executable, "-c", KILLED, "run", "--config", write("killed")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    died = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert died.returncode == -signal.SIGKILL, died.stderr
    killed = tmp_path / "killed"
    assert (killed / "vsd" / "step-00000002").is_dir() and not (killed / "student").exists()
    assert main(["info", str(killed)]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["updates"] == {"vsd": 2}
    assert main(["run", "--config", write("killed")]) == 0
    ours, theirs = weights(killed / "student"), weights(tmp_path / "whole" / "student")
    untrained = ds.load_teacher(wan_pipeline, **SIZE).denoiser.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(not torch.equal(ours[name], untrained[name]) for name in theirs)
    told = json.loads((killed / "summary.json").read_text())
    assert {name: stage["updates"] for name, stage in told["stages"].items()} == {"vsd": 3, "cd": 2}
    assert told["settings"]["student"]["timesteps"] is None


def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(write, tmp_path, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr("distillation.run_command.train", lambda *a: trained.append(1) or Stored())
    file = write(distillation={"vsd_steps": 1, "cd_steps": 0})
    assert [main(["run", "--config", file]) for _ in range(2)] == [0, 0] and trained == [1]
    assert main(["run", "--config", file, "--learning-rate", "0.5"]) == 2
    assert "distillation.learning_rate = 0.001, now 0.5" in capsys.readouterr().err
    # What changes no weights may differ; what the prompts file holds may not.
    assert main(["run", "--config", file, "--log-every", "3", "--gradient-checkpointing"]) == 0
    (tmp_path / "prompts.txt").write_text("something else\n")
    assert main(["run", "--config", file]) == 2
    assert "sources.data" in capsys.readouterr().err


@pytest.mark.parametrize("merged", [True, False])
def test_adapters_are_trained_and_exported_as_asked(write, tmp_path, wan_pipeline, merged):
    changes = {"adapter_rank": 2, "vsd_steps": 2, "cd_steps": 1, "gradient_checkpointing": True}
    assert main(["run", "--config", write(distillation=changes, student={"merge_adapters": merged})]) == 0
    folder = tmp_path / "run" / "student"
    if merged:
        assert not list(folder.glob("*/*lora*")) and weights(folder)
        return
    teacher = ds.load_teacher(wan_pipeline, **SIZE)
    student = load_adapter(folder, teacher)
    assert student.denoiser.roles.rank == 2
    assert max(float(p.detach().abs().max()) for n, p in student.named_parameters() if n.endswith("lora_B")) > 0


@pytest.mark.parametrize(("rank", "held"), [(2, torch.bfloat16), (None, torch.float32)])
def test_a_teacher_is_held_in_bf16_under_adapters_and_never_where_all_is_trained(
    write, tmp_path, monkeypatch, rank, held
):
    teachers, load = [], run_command.load_teacher
    monkeypatch.setattr(run_command, "load_teacher", lambda *a: teachers.append(load(*a)) or teachers[-1])
    changes = {"adapter_rank": rank, "vsd_steps": 1, "cd_steps": 1, "mixed_precision": "bf16"}
    assert main(["run", "--config", write(distillation=changes, teacher={"dtype": "bfloat16"})]) == 0
    layer = teachers[0].denoiser.transformer.blocks[0].ffn.net[2]
    assert getattr(layer, "base_layer", layer).weight.dtype == held
    assert {value.dtype for value in weights(tmp_path / "run" / "student").values()} == {torch.float32}


def test_flags_win_over_the_file(write, tmp_path):
    from distillation.run_command import device_of, settings_of

    arguments = ["run", "--config", write(), "--vsd-steps", "7", "--step-counts", "[1]", "--output-dir", "elsewhere"]
    section = settings_of(build_parser().parse_args(arguments))["distillation"]
    assert (section.vsd_steps, section.cd_steps, section.step_counts) == (7, 2, [1])
    assert section.output_dir == "elsewhere"
    path = write(teacher={"device": "cpu"})
    for flag, wanted in ((["--device", "cuda:1"], "cuda:1"), ([], "cpu")):
        assert device_of(settings_of(build_parser().parse_args(["run", "--config", path, *flag]))) == wanted


def test_two_processes_share_a_run_and_the_first_writes_it(write, tmp_path, launch):
    import distillation.cli

    done = launch(distillation.cli.__file__, "run", "--config", write(distillation={"vsd_steps": 1, "cd_steps": 1}))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("student in ") == 1
    told = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert told["processes"] == 2 and told["stages"]["cd"]["updates"] == 1
    assert (tmp_path / "run" / "student" / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation": {"guidance_scale": 0}}, "guidance_scale must be positive; got 0"),
        ({"distillation": {"adapter_rank": 0}}, "adapter_rank must be at least 1; got 0"),
        ({"student": {"merge_adapters": False}}, "merge_adapters is false but there are none"),
        ({"distillation": {"vsd_step": 3}}, "did you mean 'vsd_steps'"),
        ({"techer": {}}, "did you mean 'teacher'"),
        ({"distillation": {"step_counts": [3]}}, "step_counts holds 3, and the student samples in 1, 2, 4 steps"),
        ({"student": {"timesteps": {2: [0.5, 1.0]}}}, "is not strictly descending"),
        ({"student": {"timesteps": [1.0]}}, r"timesteps must map step counts to times, .*got \[1.0\]"),
        ({"student": {"eta": "much"}}, "eta must be a finite number; got 'much'"),
        ({"teacher": {"path": ""}}, "path is missing"),
        ({"teacher": {"path": "nowhere/at/all"}}, "neither a folder nor a hub id"),
        ({"teacher": {"dtype": "float16"}}, "dtype must be float32 or bfloat16"),
        ({"teacher": {"num_frames": 6}}, "takes 4 n \\+ 1 frames"),
        ({"data": {"prompts_file": "nowhere.txt"}}, "no prompts file nowhere.txt"),
        ({"data": {"cache": "c"}}, "exactly one of prompts_file and cache"),
        ({"data": {"prompts_file": None, "cache": "nowhere"}}, "nowhere holds no cache"),
        ({"distillation": {"output_dir": None}}, "no output folder"),
        ({"teacher": {"device": "cuda:99"}}, "device 'cuda:99' cannot be used"),
        ({"teacher": {"device": None}, "distillation": {"device": "gpu"}}, "device 'gpu' is none; use 'cpu'"),
    ],
)
def test_what_cannot_run_says_why_before_any_work(write, tmp_path, capsys, changes, message, monkeypatch):
    monkeypatch.setattr(ds.DistillationTrainer, "train", lambda self: pytest.fail("the run went on"))
    assert main(["run", "--config", write(**changes)]) == 2
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].startswith("latent-distill: ") and re.search(message, printed)


@pytest.mark.parametrize("index", [0, 1])
def test_the_text_encoder_leaves_the_memory_of_a_process_that_exports_nothing(write, monkeypatch, index):
    class Begun(Exception):
        pass

    def begin(self):
        raise Begun

    teachers, load = [], run_command.load_teacher
    monkeypatch.setattr(run_command, "load_teacher", lambda *a: teachers.append(load(*a)) or teachers[-1])
    monkeypatch.setattr(ds.DistillationTrainer, "train", begin)
    settings = run_command.settings_of(SimpleNamespace(config=write()))
    with pytest.raises(Begun):
        run_command.train(settings, torch.device("cpu"), Ranks(index, 2))
    (teacher,) = teachers
    weights = {parameter.device.type for parameter in teacher.encode.text_encoder.parameters()}
    assert weights == {"meta" if index else "cpu"} and next(teacher.denoiser.parameters()).device.type == "cpu"


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00\x80", b"a\0b\n"])
def test_prompts_that_are_none_are_refused(write, tmp_path, content, capsys):
    file = write()
    (tmp_path / "prompts.txt").write_bytes(content)
    assert main(["run", "--config", file]) == 2
    assert "one prompt a line" in (said := capsys.readouterr().err) or "write one a line" in said


def test_a_grid_that_cannot_be_exported_is_refused_before_training(write, monkeypatch, capsys):
    monkeypatch.setattr(ds.DistillationTrainer, "train", lambda self: pytest.fail("the run went on"))
    file = write(student={"timesteps": {1: [1.0], 2: [0.9, 0.5]}})
    assert main(["run", "--config", file]) == 2
    assert "cannot be exported" in capsys.readouterr().err


def test_an_unsupported_pipeline_is_refused_with_those_that_are(write, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert main(["run", "--config", write(teacher={"path": str(tmp_path / "other")})]) == 2
    said = capsys.readouterr().err
    assert "'FluxPipeline'" in said and "WanPipeline" in said


def test_a_folder_that_holds_something_else_is_left_alone(write, tmp_path, student_folder, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "diary.txt").write_text("mine")
    assert main(["run", "--config", write()]) == 2
    command = ["sample", str(student_folder), "--prompt", "a", "--device", "cpu", "--output", str(tmp_path / "run")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.count("holds something else") == 2 and [p.name for p in (tmp_path / "run").iterdir()] == ["diary.txt"]


def test_a_non_finite_loss_ends_the_run_with_1(write, monkeypatch, capsys):
    from latent_rewards.training.loop import NonFiniteError

    def diverged(*arguments):
        raise NonFiniteError("vsd: loss nan at step 4")

    monkeypatch.setattr("distillation.run_command.train", diverged)
    assert main(["run", "--config", write()]) == 1
    assert "loss nan at step 4; the last checkpoint" in capsys.readouterr().err
