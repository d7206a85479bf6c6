"""The loaders that pyproject.toml names load what this repository stores, codec included."""

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import distillation as ds
from latent_rewards import collect_command
from latent_rewards.collect_command import CODECS, POLICIES, codec_of, load_stored

ROOT = Path(__file__).parents[2]
TEACHER = ROOT / "recipes" / "moving_digits" / "weights" / "teacher"


@pytest.fixture
def declared(monkeypatch):
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    points = {group: [EntryPoint(name, value, group) for name, value in groups[group].items()] for group in groups}
    monkeypatch.setattr(collect_command, "entry_points", lambda group: points[group])


def test_a_stored_student_or_teacher_brings_its_codec(declared, tmp_path):
    teacher = load_stored(str(TEACHER), None, [CODECS, POLICIES])
    assert codec_of(teacher, "teacher") is teacher.codec
    student = ds.FewStepStudent(
        teacher.denoiser, encode=teacher.encode, latent_shape=teacher.latent_shape, exporter=teacher.exporter
    )
    student.save_pretrained(tmp_path / "student")
    loaded = load_stored(str(tmp_path / "student"), None, [POLICIES])
    assert isinstance(loaded, ds.FewStepStudent)
    assert codec_of(loaded, "student").fingerprint == teacher.codec.fingerprint
