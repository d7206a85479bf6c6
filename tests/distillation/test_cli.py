"""`latent-distill run`, `sample` and `info` on a tiny pipeline: real files, a process that is really killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml

import distillation as ds
from distillation.cli import build_parser, main
from latent_rewards.training.run_folder import RunFolder

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
def write(tmp_path, tiny_wan):
    """Write a settings file for the tiny pipeline; returns its path."""

    def write(output="run", **changes):
        (tmp_path / "prompts.txt").write_text("a digit moves left\n\ntwo digits rest\n")
        content = {
            "teacher": {"path": str(tiny_wan), **SIZE, "device": "cpu"},
            "data": {"prompts_file": str(tmp_path / "prompts.txt")},
            "distillation": {**DISTILLATION, "output_dir": str(tmp_path / output)},
        }
        for section, values in changes.items():
            content[section] = {**content.get(section, {}), **values}
        file = tmp_path / f"{output}.yaml"
        file.write_text(yaml.safe_dump(content))
        return str(file)

    return write


@pytest.fixture(scope="module")
def teacher(tiny_wan):
    return ds.load_teacher(tiny_wan, **SIZE)


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory, teacher):
    """An untrained student as a folder."""
    folder = tmp_path_factory.mktemp("student") / "student"
    student = ds.FewStepStudent(
        teacher.denoiser, encode=teacher.encode, latent_shape=teacher.latent_shape, exporter=teacher.exporter
    )
    student.save_pretrained(folder)
    return folder


def weights(folder):
    return ds.FewStepStudent.from_pretrained(folder).denoiser.state_dict()


def decoded(path):
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_killed_run_resumes_to_the_weights_of_an_undisturbed_one(write, tmp_path, tiny_wan, capsys):
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
    untrained = ds.load_teacher(tiny_wan, **SIZE).denoiser.state_dict()
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
    assert main(["run", "--config", file, "--log-every", "3"]) == 0
    (tmp_path / "prompts.txt").write_text("something else\n")
    assert main(["run", "--config", file]) == 2
    assert "sources.data" in capsys.readouterr().err


class Stored:
    """Something that is saved as a run's student is."""

    def save_pretrained(self, path):
        from latent_rewards.training.checkpoint import commit_directory

        with commit_directory(path) as folder:
            (folder / "weights").write_text("1")


def test_flags_win_over_the_file(write, tmp_path):
    from distillation.run_command import settings_of

    arguments = ["run", "--config", write(), "--vsd-steps", "7", "--step-counts", "[1]", "--output-dir", "elsewhere"]
    section = settings_of(build_parser().parse_args(arguments))["distillation"]
    assert (section.vsd_steps, section.cd_steps, section.step_counts) == (7, 2, [1])
    assert section.output_dir == "elsewhere"


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
        ({"distillation": {"vsd_step": 3}}, "did you mean 'vsd_steps'"),
        ({"techer": {}}, "did you mean 'teacher'"),
        ({"distillation": {"step_counts": [3]}}, "step_counts holds 3, and the student samples in 1, 2, 4 steps"),
        ({"student": {"timesteps": {2: [0.5, 1.0]}}}, "is not strictly descending"),
        ({"teacher": {"path": ""}}, "path is missing"),
        ({"teacher": {"path": "nowhere/at/all"}}, "neither a folder nor a hub id"),
        ({"teacher": {"dtype": "float16"}}, "dtype must be float32 or bfloat16"),
        ({"teacher": {"num_frames": 6}}, "takes 4 n \\+ 1 frames"),
        ({"data": {"prompts_file": "nowhere.txt"}}, "no prompts file nowhere.txt"),
        ({"data": {"cache": "c"}}, "exactly one of prompts_file and cache"),
        ({"data": {"prompts_file": None, "cache": "nowhere"}}, "nowhere holds no cache"),
        ({"distillation": {"output_dir": None}}, "no output folder"),
    ],
)
def test_what_cannot_run_says_why_before_any_work(write, tmp_path, capsys, changes, message, monkeypatch):
    import re

    monkeypatch.setattr(ds.DistillationTrainer, "train", lambda self: pytest.fail("the run went on"))
    assert main(["run", "--config", write(**changes)]) == 2
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].startswith("latent-distill: ") and re.search(message, printed)


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


def test_a_sample_is_the_students_video(student_folder, tmp_path, capsys):
    out = tmp_path / "videos" / "out.mp4"
    command = ["sample", str(student_folder), "--prompt", "two digits rest", "--seed", "3", "--device", "cpu"]
    assert main([*command, "--num-steps", "2", "--output", str(out)]) == 0
    frames = torch.tensor(decoded(out)).float() / 255
    from latent_rewards.training.randomness import sample_noise

    student = ds.FewStepStudent.from_pretrained(student_folder)
    noise = torch.stack([sample_noise(3, f"sample/{k}", 0, [0], student.latent_shape()) for k in range(2)])
    with torch.no_grad():
        latents = student.sample(student.encode(["two digits rest"]), noise, 2)
        expected = student.exporter.codec.decode(latents)[0].permute(0, 2, 3, 1)
    assert frames.shape == expected.shape == (5, 16, 16, 3)
    # H.264 halves the resolution of colour, so grey values are compared.
    assert (frames.mean(-1) - expected.mean(-1)).abs().mean() < 0.03


def test_a_folder_of_samples_goes_on_and_no_batch_size_changes_a_video(student_folder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a digit moves left\ntwo digits rest\n")
    command = ["sample", str(student_folder), "--prompts", str(tmp_path / "p.txt"), "--num-steps", "1"]
    command += ["--device", "cpu", "--per-prompt", "2", "--output", str(tmp_path / "out")]
    assert main([*command, "--batch-size", "4"]) == 0
    videos = sorted((tmp_path / "out").glob("*.mp4"))
    assert [video.with_suffix(".txt").read_text() for video in videos] == [
        *["a digit moves left\n"] * 2, *["two digits rest\n"] * 2
    ]  # fmt: skip
    before = {video.name: video.read_bytes() for video in videos}
    videos[2].unlink()
    kept = videos[1].stat().st_mtime_ns
    assert main(command) == 0
    assert {video.name: video.read_bytes() for video in videos} == before
    assert len(set(before.values())) == 4 and videos[1].stat().st_mtime_ns == kept
    assert main([*command, "--seed", "1"]) == 2
    assert "sample.seed = 0, now 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--num-steps", "3"], "samples in 1, 2, 4 steps; got --num-steps 3"),
        (["--prompt", "  "], "the prompt is empty"),
        (["--per-prompt", "2"], "is one file, for 2 videos"),
        (["--fps", "0"], "--fps must be positive"),
    ],
)
def test_samples_that_cannot_be_drawn_say_why(student_folder, tmp_path, capsys, changes, message):
    command = ["sample", str(student_folder), "--prompt", "a", "--output", str(tmp_path / "o.mp4"), *changes]
    assert main([*command, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "o.mp4").exists()


def test_a_teacher_is_no_student(tiny_wan, tmp_path, capsys):
    assert main(["sample", str(tiny_wan), "--prompt", "a", "--output", str(tmp_path / "o.mp4")]) == 2
    assert "holds no student" in capsys.readouterr().err


def test_info_describes_a_student_and_finds_damage(student_folder, tiny_wan, tmp_path, teacher, capsys):
    import shutil

    assert main(["info", str(student_folder), "--check"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["family"], told["latent_shape"], told["step_counts"]) == ("wan", [16, 2, 2, 2], [1, 2, 4])
    assert told["video"] == SIZE and told["timesteps"]["2"] == [1.0, 0.5] and told["eta"] == 1.0
    assert told["schedule"] == "RectifiedFlow(shift=3.0)" and told["noise_levels"]["2"] == pytest.approx([1.0, 0.75])
    assert told["codec"] == teacher.codec.fingerprint and len(told["fingerprint"]) == 64
    assert main(["info", str(tiny_wan)]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "diffusers pipeline"
    damaged = tmp_path / "damaged"
    shutil.copytree(student_folder, damaged)
    (damaged / "README.md").write_text("altered")
    assert main(["info", str(damaged), "--check"]) == 2 and main(["info", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "README.md differs from the manifest" in said and "holds no pipeline, run or cache" in said


@pytest.mark.parametrize("command", ["run", "encode", "sample", "info"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"latent-distill {command}" in (shown := capsys.readouterr().out) and len(shown) > 500


def test_a_non_finite_loss_ends_the_run_with_1(write, monkeypatch, capsys):
    from latent_rewards.training.loop import NonFiniteError

    def diverged(*arguments):
        raise NonFiniteError("vsd: loss nan at step 4")

    monkeypatch.setattr("distillation.run_command.train", diverged)
    assert main(["run", "--config", write()]) == 1
    assert "loss nan at step 4; the last checkpoint" in capsys.readouterr().err


def test_the_folder_of_a_run_is_begun_once(tmp_path):
    from distillation.places import begin_folder

    assert begin_folder(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "new" / ".tmp-vsd-1").mkdir(parents=True)
    RunFolder(begin_folder(tmp_path / "new")).remember({})
    (tmp_path / "new" / "anything").mkdir()
    assert begin_folder(tmp_path / "new") == tmp_path / "new"
