"""A commit is told with whether files differ from it."""

import subprocess

import pytest

from recipes.origin import commit_of


def git(folder, *arguments):
    named = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
    done = subprocess.run(["git", *named, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init", "-q")
    for name in ("benchmarks/script.py", "benchmarks/results/a.json", "library.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_a_tree_as_it_was_committed_is_told_by_its_commit_alone(repository):
    commit = git(repository, "rev-parse", "--short", "HEAD")
    assert commit_of(repository / "benchmarks") == commit
    (repository / "benchmarks" / "results" / "a.json").write_text("measured again")
    (repository / "notes.txt").write_text("untracked")
    assert commit_of(repository / "benchmarks") == commit


@pytest.mark.parametrize("name", ["library.py", "benchmarks/script.py"])
def test_a_changed_file_anywhere_marks_the_commit(repository, name):
    (repository / name).write_text("after")
    assert commit_of(repository / "benchmarks") == git(repository, "rev-parse", "--short", "HEAD") + "+dirty"


def test_without_a_repository_or_without_git_no_commit_is_known(repository, tmp_path_factory, monkeypatch):
    alone = tmp_path_factory.mktemp("alone")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(alone.parent))
    assert commit_of(alone) is None
    monkeypatch.setenv("PATH", str(alone))
    assert commit_of(repository) is None
