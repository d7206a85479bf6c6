"""What a user sees of a metric's fault, in this process and in a child: one table.

Some faults take the interpreter with them; those run in a process of their own, and the table says how it dies. That is
what ``isolate`` is for.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from latent_rewards.contracts import (
    LatentRewardsError,
    MetricCrashError,
    MetricError,
    MetricOutputError,
    MetricTimeoutError,
)
from latent_rewards.metrics import create_metric, isolate
from latent_rewards.metrics.isolation import IsolatedMetric

SOURCE = """
import ctypes, os, signal, sys, time
import torch
from latent_rewards.metrics import register_metric

def flood():
    for _ in range(64):
        os.write(1, b"x" * 2**16)

def change(videos):
    videos.mul_(0)

FAULTS = {
    "none": lambda videos: None,
    "raises": lambda videos: 1 / 0,
    "memory": lambda videos: bytearray(1 << 60),
    "hangs": lambda videos: time.sleep(600),
    "exits": lambda videos: sys.exit(4),
    "segfault": lambda videos: ctypes.string_at(0),
    "killed": lambda videos: os.kill(os.getpid(), signal.SIGKILL),
    "floods": lambda videos: flood(),
    "changes": change,
}
ANSWERS = {
    "shape": lambda values: values[:, None],
    "dtype": lambda values: values + 0j,
    "text": lambda values: ["good"] * len(values),
    "nan": lambda values: values * float("nan"),
    "infinity": lambda values: values / 0,
    "range": lambda values: values + 7,
}

@register_metric("faulty", version="1", value_range=(0, 1), needs_prompt=True)
def faulty(videos, *, prompts):
    values = videos.flatten(1).mean(dim=1)
    FAULTS.get(prompts[0], FAULTS["none"])(videos)
    return ANSWERS.get(prompts[0], lambda values: values)(values)
"""

# Each ending is run in a copy of this process, which says on its standard error how it went on.
ENDINGS = """
import json, os, sys, time, torch
from latent_rewards.metrics import create_metric
metric, videos, ends = create_metric("faulty_metrics:faulty"), torch.full((2, 1, 3, 4, 4), 0.5), {}
for kind in ("hangs", "exits", "segfault", "killed", "floods"):
    copy = os.fork()
    if not copy:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        metric(videos, [kind] * 2)
        os._exit(0)
    deadline = time.monotonic() + (2 if kind == "hangs" else 60)
    while not (ended := os.waitpid(copy, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.02)
    if not ended[0]:
        os.kill(copy, 9)
        os.waitpid(copy, 0)
    ends[kind] = os.waitstatus_to_exitcode(ended[1]) if ended[0] else "still running"
print(json.dumps(ends))
"""

TABLE = [
    # fault, here, in a child
    ("raises", (MetricError, r"raised ZeroDivisionError on 2 video\(s\): division by zero"), "the same"),
    ("memory", (MetricError, r"raised MemoryError on 2 video\(s\)"), "the same"),
    ("hangs", "still running", (MetricTimeoutError, r"did not answer within 3 s; its child process was killed")),
    ("exits", 4, (MetricCrashError, r"its child process died \(exit status 4\)")),
    ("segfault", -11, (MetricCrashError, r"its child process died \(killed by SIGSEGV\)")),
    ("killed", -9, (MetricCrashError, r"its child process died \(killed by SIGKILL\)")),
    ("floods", 0, None),
    ("shape", (MetricOutputError, r"returned shape \(2, 1\); expected 2 real numbers"), "the same"),
    ("dtype", (MetricOutputError, r"returned complex numbers \(torch.complex64\)"), "the same"),
    ("text", (MetricOutputError, r"returned something that is not numbers"), "the same"),
    ("nan", (MetricOutputError, r"returned NaN for samples \[0, 1\]; register it with may_be_nan"), "the same"),
    ("infinity", (MetricOutputError, r"returned infinity for samples \[0, 1\]"), "the same"),
    ("range", (MetricOutputError, r"promises values in \[0, 1\] and returned 7.5, 7.5"), "the same"),
    ("changes", (MetricError, r"changes the videos it is given; it must work on a copy"), "the same"),
]
"""An error and its words, the exit status of the process that scored (negative: a signal), or None: no harm."""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "faulty_metrics.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    yield "faulty_metrics"
    sys.path.remove(str(folder))


@pytest.fixture(autouse=True)
def _imported_anew() -> Iterator[None]:
    """The registry forgets what a test registered, so the module must register again."""
    yield
    sys.modules.pop("faulty_metrics", None)


@pytest.fixture(scope="module")
def isolated(module: str) -> Iterator[IsolatedMetric]:
    with isolate(f"{module}:faulty", timeout=3.0) as metric:
        yield metric


@pytest.fixture(scope="module")
def endings(module: str) -> dict[str, int | str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ENDINGS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("place", ["here", "isolated"])
@pytest.mark.parametrize(("fault", "here", "elsewhere"), TABLE, ids=[row[0] for row in TABLE])
def test_what_a_user_sees_of_a_fault(
    fault: str, here: object, elsewhere: object, place: str, request: pytest.FixtureRequest
) -> None:
    if place == "here" and not isinstance(here, tuple):
        assert request.getfixturevalue("endings")[fault] == here
        return
    expected = here if place == "here" or elsewhere == "the same" else elsewhere
    if place == "here":
        metric = create_metric(f"{request.getfixturevalue('module')}:faulty")
    else:
        metric = request.getfixturevalue("isolated")
    videos = torch.full((2, 1, 3, 4, 4), 0.5)
    if expected is None:
        assert metric(videos, [fault] * 2).tolist() == [0.5, 0.5]
    else:
        error, words = expected
        with pytest.raises(LatentRewardsError, match=f"^metric 'faulty'.*{words}") as caught:
            metric(videos, [fault] * 2)
        assert type(caught.value) is error
    damaged = fault == "changes" and place == "here"
    assert bool((videos == 0.5).all()) != damaged
    assert metric(torch.full_like(videos, 0.25), ["none"] * 2).tolist() == [0.25, 0.25]
