"""A metric that raises, hangs, exits or crashes becomes a typed error, and nothing it started survives."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latent_rewards.contracts import (
    ConfigError,
    DataError,
    MetricCrashError,
    MetricError,
    MetricOutputError,
    MetricTimeoutError,
    UnknownMetricError,
)
from latent_rewards.metrics import create_metric, isolate
from latent_rewards.metrics.isolation import ChildTraceback, IsolatedMetric

SOURCE = '''
import ctypes, os, subprocess, sys, time
import torch
from latent_rewards.metrics import register_metric

def sleepers(note, stray=False):
    started = [subprocess.Popen(["sleep", "600"]), subprocess.Popen(["sleep", "600"], start_new_session=stray)]
    with open(note, "w") as file:
        file.write(" ".join(str(pid) for pid in [os.getpid(), *(child.pid for child in started)]))

@register_metric("child.obedient", version="5", value_range=(0, 10), needs_prompt=True, differentiable=True)
class Obedient:
    """Does what the prompt says."""

    weights_hash = "abc"

    def __init__(self, scale=1.0, note=""):
        self.scale, self.note = scale, note

    def __call__(self, videos, *, prompts):
        order = prompts[0]
        if order == "raise":
            raise ZeroDivisionError("as told")
        if order == "hang":
            sleepers(self.note, stray=True)
            time.sleep(600)
        if order == "exit":
            sleepers(self.note)
            os._exit(3)
        if order == "quit":
            sys.exit(4)
        if order == "segfault":
            ctypes.string_at(0)
        if order == "misshapen":
            return torch.zeros(len(videos), 1)
        print("noise on standard output")
        return videos.flatten(1).mean(dim=1) * self.scale + len(prompts)

def plain(videos, *, size=2):
    return [os.getpid()] * len(videos)

class Never:
    def __init__(self):
        time.sleep(600)

    def __call__(self, videos):
        return videos

class Failing:
    def __init__(self):
        raise FileNotFoundError("weights.bin")

    def __call__(self, videos):
        return videos

class Dying:
    def __init__(self):
        os._exit(9)

    def __call__(self, videos):
        return videos
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("isolated")
    (folder / "metrics_for_a_child.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def obedient(folder: Path) -> Iterator[IsolatedMetric]:
    options = {"scale": 2.0, "note": str(folder / "pids")}
    with isolate("metrics_for_a_child:Obedient", timeout=5.0, **options) as metric:
        yield metric


def gone(pids: list[int], within: float) -> bool:
    """Whether every process ends within some seconds; a zombie that init has yet to reap counts as ended."""

    def running(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    deadline = time.monotonic() + within
    while any(running(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def pids_noted(folder: Path) -> list[int]:
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    (folder / "pids").unlink()
    assert len(pids) == 3 and os.getpid() not in pids
    return pids


def test_values_and_description_are_those_of_the_metric(obedient: IsolatedMetric, videos: Tensor) -> None:
    torch.testing.assert_close(obedient(videos, ["go"] * 4), videos.flatten(1).mean(dim=1) * 2 + 4)
    assert (obedient.name, obedient.version, obedient.value_range) == ("child.obedient", "5", (0.0, 10.0))
    assert obedient.needs_prompt and obedient.options["scale"] == 2.0
    assert not obedient.differentiable
    assert "metrics_for_a_child" not in sys.modules
    here = create_metric("metrics_for_a_child:Obedient", **obedient.options)
    assert obedient.fingerprint == here.fingerprint
    with pytest.raises(DataError, match="needs the prompts"):
        obedient(videos)


def test_raising_becomes_an_error_and_the_child_stays(obedient: IsolatedMetric, videos: Tensor) -> None:
    obedient(videos, ["go"] * 4)
    before = obedient.child._running
    with pytest.raises(
        MetricError, match=r"'child.obedient' raised ZeroDivisionError.*as told.*4 sample\(s\)"
    ) as caught:
        obedient(videos, ["raise"] * 4)
    assert isinstance(caught.value.__cause__, ChildTraceback) and "sleepers" not in str(caught.value)
    assert "ZeroDivisionError" in str(caught.value.__cause__)
    with pytest.raises(MetricOutputError, match=r"shape \(4, 1\)"):
        obedient(videos, ["misshapen"] * 4)
    assert obedient.child._running is before


def test_a_hang_is_killed_with_all_it_started(folder: Path, videos: Tensor) -> None:
    with isolate("metrics_for_a_child:Obedient", timeout=1.5, note=str(folder / "pids")) as metric:
        started = time.monotonic()
        with pytest.raises(
            MetricTimeoutError, match=r"'child.obedient' with 4 sample\(s\) did not answer within 1.5 s"
        ):
            metric(videos, ["hang"] * 4)
        assert gone(pids_noted(folder), within=2.0)
        assert time.monotonic() - started < 3.5
        assert metric(videos, ["go"] * 4).shape == (4,)


@pytest.mark.parametrize(
    ("order", "ending"), [("exit", "exit status 3"), ("quit", "exit status 4"), ("segfault", "killed by SIGSEGV")]
)
def test_a_crash_is_told_from_a_hang(
    obedient: IsolatedMetric, folder: Path, videos: Tensor, order: str, ending: str
) -> None:
    started = time.monotonic()
    with pytest.raises(
        MetricCrashError, match=rf"'child.obedient' with 4 sample\(s\): its child process died \({ending}"
    ):
        obedient(videos, [order] * 4)
    if order == "exit":
        assert gone(pids_noted(folder), within=2.0)
    assert time.monotonic() - started < 25


def test_closing_kills_the_child_and_a_later_call_starts_another(folder: Path, videos: Tensor) -> None:
    metric = isolate("metrics_for_a_child:plain", timeout=5.0)
    running = metric.child._running[0]
    assert metric(videos)[0] == running.pid != os.getpid()
    metric.close()
    metric.close()
    assert gone([running.pid], within=1.0)
    assert metric(videos)[0] != running.pid
    another = metric.child._running[0].pid
    del metric
    assert gone([another], within=2.0)


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), 9)", "sys.exit()"])
def test_no_child_outlives_its_parent(folder: Path, ending: str) -> None:
    code = (
        "import os, sys, threading, time, torch; from latent_rewards.metrics import isolate\n"
        f"metric = isolate('metrics_for_a_child:Obedient', timeout=60, note={str(folder / 'pids')!r})\n"
        "call = lambda: metric(torch.zeros(1, 1, 3, 4, 4), ['hang'])\n"
        "threading.Thread(target=call, daemon=True).start()\n"
        f"while not os.path.exists({str(folder / 'pids')!r}): time.sleep(0.02)\n"
        "time.sleep(0.2)\n" + ending
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], timeout=240, env=environment)
    assert gone(pids_noted(folder), within=3.0)


def test_a_metric_that_is_made_already_is_made_again_in_the_child(videos: Tensor) -> None:
    metric = create_metric("compression.jpeg_size", quality=30)
    with isolate(metric, timeout=10.0) as isolated:
        assert torch.equal(isolated(videos), metric(videos))
        assert (isolated.fingerprint, isolated.options) == (metric.fingerprint, {"quality": 30})


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("Failing", MetricError, "Failing' could not be made: FileNotFoundError: weights.bin"),
        ("Dying", MetricCrashError, r"Dying' to start: its child process died \(exit status 9"),
        ("Obedient", ConfigError, "'scael'.*'scale'"),
    ],
)
def test_a_metric_that_cannot_start_fails_at_once(folder: Path, name: str, error: type, message: str) -> None:
    options = {"scael": 1} if name == "Obedient" else {}
    with pytest.raises(error, match=message):
        isolate(f"metrics_for_a_child:{name}", timeout=5.0, **options)


def test_a_start_has_a_deadline_of_its_own(folder: Path) -> None:
    with pytest.raises(MetricTimeoutError, match="Never' to start did not answer within 0.5 s"):
        isolate("metrics_for_a_child:Never", timeout=5.0, startup_timeout=0.5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: isolate("quality.sharpnes", timeout=1), UnknownMetricError, "'quality.sharpness'"),
        (lambda: isolate("quality.sharpness", timeout=0), ConfigError, "timeout must be positive"),
        (lambda: isolate(lambda videos: videos, timeout=1), ConfigError, "cannot be imported by another process"),
        (lambda: isolate("quality.exposure", timeout=1, spread=object()), ConfigError, "as JSON"),
        (
            lambda: isolate(create_metric("quality.exposure"), timeout=1, spread=0.1),
            ConfigError,
            "made already",
        ),
    ],
)
def test_what_cannot_travel_is_refused_before_a_child_starts(
    make: Callable[[], object], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_options_are_json_all_the_way(obedient: IsolatedMetric) -> None:
    assert json.loads(json.dumps(obedient.options)) == obedient.options
