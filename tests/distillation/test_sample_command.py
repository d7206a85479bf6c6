"""`latent-distill sample`: the student's own videos, whatever the batch size, and as many as were asked for."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

import distillation as ds
from distillation.cli import main
from latent_rewards.training.checkpoint import MANIFEST
from latent_rewards.training.randomness import sample_noise


def decoded(path):
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_sample_is_the_students_video(student_folder, tmp_path, capsys):
    out = tmp_path / "videos" / "out.mp4"
    command = ["sample", str(student_folder), "--prompt", "two digits rest", "--seed", "3", "--device", "cpu"]
    assert main([*command, "--num-steps", "2", "--output", str(out)]) == 0
    frames = torch.from_numpy(np.stack(decoded(out))).float() / 255
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
    assert main([*command, "--dtype", "bfloat16"]) == 2
    assert "sample.dtype = 'float32', now 'bfloat16'" in capsys.readouterr().err


def test_a_prompt_lies_beside_each_video_of_a_folder_and_beside_no_lone_file(student_folder, tmp_path):
    command = ["sample", str(student_folder), "--num-steps", "1", "--device", "cpu"]
    folder, prompts = tmp_path / "out", tmp_path / "p.txt"
    assert main([*command, "--prompt", "two digits rest", "--per-prompt", "2", "--output", str(folder)]) == 0
    found = {file.name: file.read_text() for file in folder.glob("*.txt")}
    assert found == dict.fromkeys(("00000.txt", "00001.txt"), "two digits rest\n")
    prompts.write_text("a digit moves left")
    assert main([*command, "--prompts", str(prompts), "--output", str(tmp_path / "alone.mp4")]) == 0
    assert (tmp_path / "alone.mp4").is_file() and not (tmp_path / "alone.txt").exists()


def test_an_adapter_is_sampled_on_its_base(wan_pipeline, student_folder, tmp_path, monkeypatch, capsys):
    teacher = ds.load_teacher(wan_pipeline, num_frames=5, height=16, width=16)
    student = ds.start_student(teacher, ds.DistillationConfig(adapter_rank=2))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1)  # an adapter starts as nothing
    student.save_pretrained(tmp_path / "adapter", merge_adapters=False)
    student.save_pretrained(tmp_path / "whole")
    written = {}
    monkeypatch.setattr("distillation.videos.write_mp4", lambda file, video, fps: written.update({file.stem: video}))
    rest = ["--prompt", "two digits rest", "--device", "cpu", "--output"]
    adapter = ["sample", str(tmp_path / "adapter"), *rest, str(tmp_path / "adapter.mp4")]
    monkeypatch.setattr("distillation.places.Ranks.wait_for", lambda self, done: None)
    assert main([*adapter, "--base", str(wan_pipeline)]) == 0
    assert main(["sample", str(tmp_path / "whole"), *rest, str(tmp_path / "whole.mp4")]) == 0
    assert main(["sample", str(student_folder), *rest, str(tmp_path / "before.mp4")]) == 0
    torch.testing.assert_close(written["adapter"], written["whole"], rtol=0, atol=1e-4)
    assert float((written["adapter"] - written["before"]).abs().max()) > 0.01
    assert main([*adapter, "--base", str(tmp_path)]) == 2
    assert main(["sample", str(student_folder), "--base", str(wan_pipeline), *rest, str(tmp_path / "o.mp4")]) == 2
    said = capsys.readouterr().err
    assert "has no model_index.json" in said and "holds a whole student, which needs no --base" in said


def test_a_folder_of_videos_needs_a_student_that_can_be_told_from_others(student_folder, tmp_path, capsys):
    bare = shutil.copytree(student_folder, tmp_path / "bare")
    (bare / MANIFEST).unlink()
    command = ["sample", str(bare), "--prompt", "two digits rest", "--num-steps", "1", "--device", "cpu"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "has no manifest.json" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--num-steps", "3"], "samples in 1, 2, 4 steps; got --num-steps 3"),
        (["--prompt", "  "], "the prompt is empty"),
        (["--per-prompt", "2"], "is one file, for 2 videos"),
        (["--fps", "0"], "--fps must be positive"),
        (["--fps", "inf"], "--fps must be positive and finite; got inf"),
        (["--output", "cat.avi"], "videos are written as .mp4"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    ],
)
def test_samples_that_cannot_be_drawn_say_why(student_folder, tmp_path, capsys, changes, message):
    command = ["sample", str(student_folder), "--prompt", "a", "--output", str(tmp_path / "o.mp4"), "--device", "cpu"]
    assert main([*command, *changes]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "o.mp4").exists()


def test_a_teacher_is_no_student(wan_pipeline, tmp_path, capsys):
    assert main(["sample", str(wan_pipeline), "--prompt", "a", "--output", str(tmp_path / "o.mp4")]) == 2
    assert "holds no student" in capsys.readouterr().err
