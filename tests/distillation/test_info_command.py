"""`latent-distill info`: what folders hold."""

from __future__ import annotations

import json
import shutil

import pytest

from distillation.cli import main

SIZE = {"num_frames": 5, "height": 16, "width": 16}


def test_info_describes_a_student_and_finds_damage(student_folder, wan_pipeline, tmp_path, tiny_teacher, capsys):
    assert main(["info", str(student_folder), "--check"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["family"], told["latent_shape"], told["step_counts"]) == ("wan", [16, 2, 2, 2], [1, 2, 4])
    assert told["video"] == SIZE and told["timesteps"]["2"] == [1.0, 0.5] and told["eta"] == 1.0
    assert told["schedule"] == "RectifiedFlow(shift=3.0)" and told["noise_levels"]["2"] == pytest.approx([1.0, 0.75])
    assert told["codec"] == tiny_teacher.codec.fingerprint and len(told["fingerprint"]) == 64
    assert main(["info", str(wan_pipeline)]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "diffusers pipeline"
    damaged = tmp_path / "damaged"
    shutil.copytree(student_folder, damaged)
    (damaged / "README.md").write_text("altered")
    assert main(["info", str(damaged), "--check"]) == 2 and main(["info", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "README.md differs from the manifest" in said and "holds no pipeline, run or cache" in said
