"""What is told of an interpreter that was killed, ran out of memory or failed."""

from argparse import Namespace

import pytest

from benchmarks import interpreter
from benchmarks.interpreter import run_apart, run_apart_whole


def ends(monkeypatch, **how):
    asked = []

    def run(command, **options):
        asked.append(command)
        return Namespace(**how)

    monkeypatch.setattr(interpreter.subprocess, "run", run)
    return asked


@pytest.mark.parametrize(
    ("status", "written", "said"),
    [
        (interpreter.KILLED, "", "the interpreter was killed"),
        (1, "Traceback\nRuntimeError: CUDA error: out of memory\n", "RuntimeError: CUDA error: out of memory"),
    ],
)
def test_one_that_was_killed_or_says_so_ran_out_of_memory(status, written, said, monkeypatch):
    ends(monkeypatch, returncode=status, stderr=written)
    assert run_apart("benchmarks.roles", "shared", {}) == {"out_of_memory": said}


def test_its_last_line_is_read_and_its_task_is_told(monkeypatch):
    asked = ends(monkeypatch, returncode=0, stdout='a word\n{"seconds": [1.0]}\n', stderr="")
    assert run_apart("benchmarks.roles", "shared", {"way": "shared"}) == {"seconds": [1.0]}
    assert asked[0][1:] == ["-m", "benchmarks.roles", "--run", '{"way": "shared"}']


def test_one_that_fails_says_what_it_wrote(monkeypatch):
    ends(monkeypatch, returncode=3, stderr="KeyError: 'x'")
    with pytest.raises(RuntimeError, match="^shared ended with status 3: KeyError: 'x'"):
        run_apart("benchmarks.roles", "shared", {})


def test_too_little_memory_is_a_failure_where_a_result_must_be_whole(monkeypatch):
    ends(monkeypatch, returncode=interpreter.KILLED, stderr="")
    with pytest.raises(RuntimeError, match="^the training ran out of memory: the interpreter was killed"):
        run_apart_whole("benchmarks.proxy_memory", "the training", {})
    ends(monkeypatch, returncode=0, stdout='{"seconds": [1.0]}\n', stderr="")
    assert run_apart_whole("benchmarks.proxy_memory", "the training", {}) == {"seconds": [1.0]}
