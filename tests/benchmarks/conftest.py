"""A student that was not trained: the embedded teacher, stored as a student."""

import copy

import pytest

import distillation as ds

TEACHER = "recipes/moving_digits/weights/teacher"


@pytest.fixture(scope="session")
def untrained_student(tmp_path_factory):
    teacher = ds.load_teacher(TEACHER)
    student = ds.FewStepStudent(
        copy.deepcopy(teacher.denoiser),
        encode=teacher.encode,
        latent_shape=teacher.latent_shape,
        exporter=teacher.exporter,
    )
    folder = tmp_path_factory.mktemp("untrained") / "student"
    student.save_pretrained(folder)
    return folder
