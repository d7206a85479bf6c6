"""Training the embedded teacher from nothing, with tiny sizes."""

import json
from dataclasses import replace

import pytest
import torch

import distillation as ds
from distillation.families.export import FolderInUseError
from latent_rewards.training.checkpoint import verify_directory
from latent_rewards.training.settings import SettingsError
from recipes.moving_digits import train_teacher
from recipes.moving_digits.train_teacher import TeacherConfig, train
from recipes.moving_digits.train_vae import VaeConfig


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished training, beside whose pipeline somebody keeps a file."""
    root = tmp_path_factory.mktemp("teacher")
    (root / "training.json").write_text("mine")
    config = TeacherConfig(
        vae=VaeConfig(num_steps=2, batch_size=2),
        num_clips=6,
        num_steps=2,
        batch_size=2,
        work_dir=str(root / "work"),
        output_dir=str(root / "pipeline"),
    )
    assert train(config) == root / "pipeline"
    return root, config


@pytest.fixture
def no_training(monkeypatch):
    def begun(config):
        raise AssertionError("a training was begun")

    monkeypatch.setattr(train_teacher, "cached_vae", begun)


def test_a_pipeline_comes_of_it_and_nothing_beside_it_is_touched(trained):
    root, _ = trained
    teacher = ds.load_teacher(str(root / "pipeline"), device="cpu")
    latents = ds.sample_teacher(
        teacher.denoiser, teacher.encode(["a red digit 3 moving left slowly"]), torch.zeros(1, 16, 5, 8, 8), num_steps=1
    )
    assert teacher.codec.decode(latents).shape == (1, 17, 3, 32, 32)
    assert (root / "training.json").read_text() == "mine"
    assert sorted(path.name for path in root.iterdir()) == ["pipeline", "training.json", "work"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "teacher.seed = 0, now 1"),
        ({"num_steps": 3}, "teacher.num_steps = 2, now 3"),
        ({"num_clips": 7}, "teacher.num_clips = 6, now 7"),
        ({"vae": VaeConfig(num_steps=2, batch_size=2, seed=1)}, "vae.seed = 0, now 1"),
    ],
)
def test_a_folder_begun_with_other_settings_is_refused(trained, change, told, tmp_path, no_training):
    _, config = trained
    with pytest.raises(SettingsError, match=told):
        train(replace(config, **change, output_dir=str(tmp_path / "pipeline")))
    assert not (tmp_path / "pipeline").exists()


def test_with_the_same_settings_it_goes_on_wherever_its_folders_are(trained, tmp_path):
    root, config = trained
    (tmp_path / "moved").symlink_to(root / "work")
    train(replace(config, work_dir=str(tmp_path / "moved"), output_dir=str(tmp_path / "pipeline")))
    verify_directory(tmp_path / "pipeline")
    assert (tmp_path / "pipeline" / "manifest.json").read_text() == (root / "pipeline" / "manifest.json").read_text()


def test_somebody_elses_folder_is_refused_before_the_training(trained, tmp_path, no_training):
    _, config = trained
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FolderInUseError, match="give a new folder"):
        train(replace(config, output_dir=str(tmp_path)))


def test_beside_the_embedded_weights_their_settings_are_written_and_notes_kept(trained, tmp_path, monkeypatch):
    _, config = trained
    monkeypatch.setattr(train_teacher, "EMBEDDED", tmp_path / "teacher")
    (tmp_path / "training.json").write_text(json.dumps({"num_steps": 15000, "figures": {"l1": 0.1}, "note": "by hand"}))
    train(replace(config, output_dir=str(tmp_path / "teacher")))
    told = json.loads((tmp_path / "training.json").read_text())
    assert (told["figures"], told["note"]) == ({"l1": 0.1}, "by hand")
    assert (told["num_steps"], told["num_clips"], told["vae"]["num_steps"]) == (2, 6, 2)
    assert not {"work_dir", "output_dir"} & {*told, *told["vae"]}
