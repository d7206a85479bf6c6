"""Metrics in workers give what they give in this process, side by side, within a bounded queue."""

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latent_rewards.contracts import ConfigError, MetricCrashError, MetricError
from latent_rewards.metrics import command_metric, create_metric, from_reward_func, http_metric, isolate, registry
from latent_rewards.metrics.metric import Metric
from latent_rewards.metrics.workers import MetricWorkers

SOURCE = """
import os, time
from latent_rewards.metrics import from_reward_func, register_metric

def pid(videos, *, pause=0.0):
    time.sleep(pause)
    return [float(os.getpid())] * len(videos)

def mean(videos, *, scale=1.0):
    if float(videos.max()) > 0.99:
        os._exit(7)
    if float(videos.max()) < 0.01:
        raise ValueError("too dark")
    return videos.flatten(1).mean(1) * scale

class Scaled:
    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, videos):
        return videos.flatten(1).mean(1) * self.scale

def rewards(prompts, completions):
    return [float(video.mean()) for video in completions]

@register_metric("workers.rewards", version="1")
def made_elsewhere(scale=1.0):
    return from_reward_func(rewards, name="mean reward")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("working")
    (folder / "metrics_of_workers.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    registry._DEFINITIONS.pop("workers.rewards", None)


@pytest.fixture(scope="module")
def workers(folder: Path) -> Iterator[MetricWorkers]:
    metrics = {
        "mean": create_metric("metrics_of_workers:mean", scale=2.0),
        "size": create_metric("compression.jpeg_size"),
        "pid": create_metric("metrics_of_workers:pid", pause=0.3),
    }
    workers = MetricWorkers(metrics, 2, timeout=20.0)
    yield workers
    workers.close()


def clips(level: float = 0.9) -> Tensor:
    return level * torch.rand(3, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_values_are_bit_for_bit_those_of_this_process(workers: MetricWorkers) -> None:
    mean, size = workers.submit(lambda ask: list(ask(["mean", "size"], clips(), ["", "", ""]))).result()
    assert torch.equal(mean, create_metric("metrics_of_workers:mean", scale=2.0)(clips()))
    assert torch.equal(size, create_metric("compression.jpeg_size")(clips()))


def test_work_runs_side_by_side_and_waits_when_the_queue_is_full(workers: MetricWorkers) -> None:
    workers.start()
    begun: list[float] = []
    started = time.monotonic()
    futures = []
    for _ in range(5):
        futures.append(workers.submit(lambda ask: float(next(iter(ask(["pid"], clips(), [""] * 3)))[0])))
        begun.append(time.monotonic() - started)
    pids = {future.result() for future in futures}
    assert len(pids) == 2
    # Three places: the fourth waits for the first answer, which takes 0.3 s.
    assert begun[2] < 0.25 < 0.29 < begun[3]


def test_a_crash_and_an_error_reach_their_own_work_only(workers: MetricWorkers) -> None:
    bright, dark = torch.ones(3, 5, 3, 8, 8), torch.zeros(3, 5, 3, 8, 8)
    asked = [
        workers.submit(lambda ask, v=videos: next(iter(ask(["mean"], v, [""] * 3))))
        for videos in (bright, dark, clips())
    ]
    with pytest.raises(MetricCrashError, match=r"'metrics_of_workers:mean' with 3 sample\(s\).*exit status 7"):
        asked[0].result()
    with pytest.raises(MetricError, match=r"raised ValueError on 3 video\(s\): too dark$"):
        asked[1].result()
    assert asked[2].result().shape == (3,)


def test_closing_ends_the_work_and_the_children(folder: Path) -> None:
    workers = MetricWorkers({"pid": create_metric("metrics_of_workers:pid", pause=60.0)}, 1, timeout=100.0)
    futures = [workers.submit(lambda ask: list(ask(["pid"], clips(), [""] * 3))) for _ in range(2)]
    child = workers._running.children[0]
    while child._running is None:
        time.sleep(0.01)
    popen = child._running[0]
    threading.Timer(0.3, workers.close).start()
    started = time.monotonic()
    with pytest.raises(MetricCrashError):
        futures[0].result()
    assert futures[1].cancelled() and time.monotonic() - started < 5.0
    assert popen.poll() is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create_metric(lambda videos: videos.flatten(1).mean(1)), "cannot be imported by another process"),
        (lambda: create_metric(__import__("metrics_of_workers").Scaled(3.0)), "cannot be imported by another process"),
        (lambda: lambda videos: videos, "is a function, which cannot be imported"),
        (lambda: create_metric("metrics_of_workers:Scaled", scale=torch.tensor(2.0)), "as JSON"),
        (lambda: http_metric("judge", "http://127.0.0.1:9/", version="1"), "'judge' cannot be .* register_metric"),
        (lambda: command_metric("tool", [sys.executable, "{folder}"], version="1"), "'tool' .* or use num_workers=0"),
        (lambda: from_reward_func(__import__("metrics_of_workers").rewards), "'rewards' cannot be imported"),
        (lambda: create_metric("metrics_of_workers:made_elsewhere"), "'mean reward' .* the name that is registered"),
    ],
)
def test_what_a_worker_cannot_make_is_refused_before_one_starts(folder: Path, make, message: str) -> None:  # noqa: ANN001
    with pytest.raises(ConfigError, match=message):
        MetricWorkers({"m": make()}, 1, timeout=1.0)


def test_another_metric_of_the_same_name_is_refused(folder: Path) -> None:
    mean = __import__("metrics_of_workers").mean
    workers = MetricWorkers(
        {"m": Metric(name="quality.sharpness", score=mean, origin="metrics_of_workers")}, 1, timeout=1.0
    )
    with pytest.raises(ConfigError, match="'quality.sharpness@0#.* here and 'quality.sharpness@"):
        workers.start()


def test_what_a_registered_function_gets_elsewhere_is_made_again_by_its_name(folder: Path) -> None:
    here = create_metric("metrics_of_workers:made_elsewhere")
    workers = MetricWorkers({"m": here}, 1, timeout=20.0, sources={"m": "workers.rewards"})
    try:
        (values,) = workers.submit(lambda ask: list(ask(["m"], clips(), ["a"] * 3))).result()
    finally:
        workers.close()
    assert torch.equal(values, here(clips(), ["a"] * 3))
    with isolate("workers.rewards", timeout=20.0) as isolated:
        assert torch.equal(isolated(clips(), ["a"] * 3), values)
        with pytest.raises(ConfigError, match="'mean reward' cannot be imported by another process"):
            MetricWorkers({"m": isolated}, 1, timeout=1.0)


def test_numbers_are_checked() -> None:
    metrics = {"m": create_metric("compression.jpeg_size")}
    for arguments, message in [((0,), "num_workers"), ((1, -1.0), "timeout")]:
        with pytest.raises(ConfigError, match=message):
            MetricWorkers(metrics, arguments[0], timeout=arguments[-1] if len(arguments) > 1 else 1.0)
