"""`latent-distill info`: what folders hold."""

from __future__ import annotations

import json
import shutil

import pytest

from distillation.cli import main
from distillation.families import SIDECAR
from distillation.families.adapters import ADAPTER_KIND
from latent_rewards.training.checkpoint import commit_directory, save_checkpoint

SIZE = {"num_frames": 5, "height": 16, "width": 16}


def test_info_describes_a_student_and_finds_damage(student_folder, wan_pipeline, tmp_path, tiny_teacher, capsys):
    assert main(["info", str(student_folder), "--check"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["family"], told["latent_shape"], told["step_counts"]) == ("wan", [16, 2, 2, 2], [1, 2, 4])
    assert told["video"] == SIZE and told["timesteps"]["2"] == [1.0, 0.5] and told["eta"] == 1.0
    assert told["schedule"] == "RectifiedFlow(shift=3.0)" and told["noise_levels"]["2"] == pytest.approx([1.0, 0.75])
    assert told["codec"] == tiny_teacher.codec.fingerprint and len(told["fingerprint"]) == 64
    assert main(["info", str(wan_pipeline)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "diffusers pipeline" and told["video"] is None, "it does not say"
    damaged = tmp_path / "damaged"
    shutil.copytree(student_folder, damaged)
    (damaged / "README.md").write_text("altered")
    assert main(["info", str(damaged), "--check"]) == 2 and main(["info", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "README.md differs from the manifest" in said and "holds no pipeline, adapter, run or cache" in said


def test_a_pipeline_that_states_no_size_is_checked_all_the_same(wan_pipeline, tiny_teacher, tmp_path, capsys):
    assert main(["info", str(wan_pipeline), "--check"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["checked"], told["codec"]) == (True, tiny_teacher.codec.fingerprint)
    assert told["schedule"] == str(tiny_teacher.denoiser.schedule) == "RectifiedFlow(shift=3.0)"
    assert told["video"] is None and told["latent_shape"] is None, "it still does not say"
    shutil.copytree(wan_pipeline, tmp_path / "wrong")
    (tmp_path / "wrong" / SIDECAR).write_text(json.dumps({"latent_shape": [4, 2, 2, 2]}))
    assert main(["info", str(tmp_path / "wrong"), "--check"]) == 2
    assert "states the latent shape [4, 2, 2, 2]" in capsys.readouterr().err


def test_work_is_described_by_whose_it_is(tmp_path, capsys):
    def told(name, content, *flags):
        folder = tmp_path / name
        with commit_directory(folder / "settings") as temporary:
            (temporary / "settings.json").write_text(json.dumps(content))
        code = main(["info", str(folder), *flags])
        said = capsys.readouterr()
        return json.loads(said.out) if code == 0 else said.err

    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "00000.mp4").touch()
    videos = {"kind": "videos", "videos": 1, "settings": {"seed": 3}, "checked": True}
    assert told("videos", {"sample": {"seed": 3}}, "--check") == videos
    save_checkpoint(tmp_path / "recipe" / "distillation" / "vsd", 7, {})
    save_checkpoint(tmp_path / "run" / "cd", 5, {})
    assert told("recipe", {"run": {}, "distillation": {}})["updates"] == {"vsd": 7}
    assert told("run", {"teacher": {}, "distillation": {}})["updates"] == {"cd": 5}
    said = told("rewards", {"metrics": {}, "seed": 0})
    assert "rewards is the work of another command, whose settings are metrics, seed" in said


def test_the_size_of_a_cogvideox_video_is_told(tmp_path, capsys):
    vae, folder = {"block_out_channels": [8, 8, 8, 8]}, tmp_path / "pipeline"
    stated = {"transformer/config.json": {"sample_height": 8, "sample_width": 12, "sample_frames": 9}}
    stated |= {"vae/config.json": vae, "model_index.json": {"_class_name": "CogVideoXPipeline"}}
    for name, content in stated.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    assert main(["info", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["video"] == {"num_frames": 9, "height": 64, "width": 96}
    (folder / SIDECAR).write_text(json.dumps({"latent_shape": [16, 5, 4, 6]}))
    assert main(["info", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["video"] == {"num_frames": 17, "height": 32, "width": 48}


def test_an_adapter_is_described_and_checked_and_is_no_student_to_sample(tmp_path, capsys):
    stated = {"kind": ADAPTER_KIND, "rank": 4, "base": "ab", "timesteps": {"4": [1.0, 0.75, 0.5, 0.25], "1": [1.0]}}
    with commit_directory(tmp_path / "adapter") as folder:
        (folder / SIDECAR).write_text(json.dumps(stated))
    assert main(["info", str(tmp_path / "adapter"), "--check"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.items() >= {**stated, "step_counts": [1, 4], "checked": True}.items() and len(told["fingerprint"]) == 64
    assert main(["sample", str(tmp_path / "adapter"), "--prompt", "a", "--output", str(tmp_path / "o.mp4")]) == 2
    assert "holds an adapter, which needs its teacher: name the teacher's pipeline as --base" in capsys.readouterr().err
    (tmp_path / "adapter" / SIDECAR).write_text(json.dumps({**stated, "rank": 5}))
    assert main(["info", str(tmp_path / "adapter"), "--check"]) == 2
    assert "differs from the manifest" in capsys.readouterr().err
    (tmp_path / "adapter" / SIDECAR).write_text("{}")
    assert main(["info", str(tmp_path / "adapter")]) == 2
    assert "no pipeline; write it again" in capsys.readouterr().err
