"""The Makefile sets its environment up when there is none, however it went; with a Python that installs nothing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
echo "$@" >> calls
mkdir -p "$3/bin"
for name in python pip ruff mypy; do
    printf '#!/bin/sh\\necho %s "$@" >> calls\\n' $name > "$3/bin/$name"
    chmod +x "$3/bin/$name"
done
"""
SETUP = ["-m venv .venv", "pip install --disable-pip-version-check --no-compile -e .[dev]"]
LINT = ["ruff check .", "ruff format --check .", "mypy"]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@pytest.fixture
def make(tmp_path):
    """Run a target in a clone; returns what it called, a line each."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}

    def run(target):
        (tmp_path / "calls").write_text("")
        command = ["make", target, "PYTHON=./python"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "calls").read_text().splitlines()

    return run


def test_an_environment_is_made_once_and_again_when_it_is_gone(make, tmp_path):
    assert make("lint") == SETUP + LINT
    assert make("lint") == LINT
    shutil.rmtree(tmp_path / ".venv")
    assert make("lint") == SETUP + LINT


def test_other_requirements_are_installed_into_the_environment_there_is(make, tmp_path):
    make("setup")
    later = (tmp_path / ".venv").stat().st_mtime + 10
    os.utime(tmp_path / "pyproject.toml", (later, later))
    assert make("lint") == SETUP[1:] + LINT


def test_all_that_a_setup_leaves_is_ignored_by_git(make, tmp_path):
    make("setup")
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    told = subprocess.run(["git", "status", "--porcelain"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert sorted(line.split()[-1] for line in told.stdout.splitlines()) == [
        ".gitignore",
        "Makefile",
        "calls",
        "pyproject.toml",
        "python",
    ]
