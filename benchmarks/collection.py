"""Collecting rewards at scale: workers, cache, memory and kills, as ratios; ``python -m benchmarks.collection``.

A small linear policy and two shipped metrics that cost real time (flow warping and H.264), on made-up pixels. Every
number is of one run on one machine and goes into ``results/collection.json``. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

import latent_rewards as lr
from benchmarks.meters import memory
from benchmarks.provenance import provenance
from benchmarks.result_files import RESULTS, Sections, add_results, write_result

METRICS = ("motion.warping_error", "compression.h264_size")
CHEAP_METRICS = ("quality.temporal_flickering", "compression.jpeg_size")
SHAPE = (4, 8, 16, 16)
"""(C, F, H, W) of the latents; the videos are [F, 3, 4 H, 4 W]."""


class Lengths:
    """A condition: one number per prompt."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.values)

    def index_select(self, index: Tensor) -> Lengths:
        """Return the rows at ``index``."""
        return Lengths(self.values[index])

    def to(self, device: torch.device | str) -> Lengths:
        """Return the condition on ``device``."""
        return Lengths(self.values.to(device))


class LinearPolicy(nn.Module):
    """mean = gain x + (length of the prompt) / 100; std 0.5, and 0 at the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.8))

    def encode(self, prompts: Sequence[Any]) -> Lengths:
        """Return the prompts' lengths."""
        return Lengths(torch.tensor([len(prompt) / 100 for prompt in prompts]))

    def latent_shape(self, condition: Lengths) -> tuple[int, int, int, int]:
        """Return (C, F, H, W)."""
        return SHAPE

    def timesteps(self, num_steps: int) -> list[float]:
        """Return a uniform grid."""
        return [1 - step / num_steps for step in range(num_steps)]

    def transition(self, latents: Tensor, step: int, num_steps: int, condition: Lengths) -> tuple[Tensor, Tensor]:
        """Return mean and std of the next latents."""
        mean = self.gain * latents + condition.values[:, None, None, None, None]
        return mean, torch.tensor(0.5 if step + 1 < num_steps else 0.0)


class EnlargingCodec:
    """The first three channels through a sigmoid, four times as large."""

    fingerprint = "enlarging-codec"

    def decode(self, latents: Tensor) -> Tensor:
        """Return videos [B, F, 3, 4 H, 4 W]."""
        frames = torch.sigmoid(latents[:, :3]).transpose(1, 2)
        large = functional.interpolate(frames.flatten(0, 1), scale_factor=4.0, mode="bilinear").clamp(0, 1)
        return large.unflatten(0, frames.shape[:2])

    def encode(self, videos: Tensor) -> Tensor:
        """Return latents [B, 4, F, H, W]: a shrunken video and its mean."""
        small = functional.avg_pool2d(videos.flatten(0, 1), 4).unflatten(0, videos.shape[:2]).transpose(1, 2)
        return torch.cat([small, small.mean(1, keepdim=True)], dim=1)


@dataclass(frozen=True)
class Work:
    """One collection; JSON-able, so that another process can do it.

    Attributes:
        num_samples: of the collection.
        folder: what it is collected into, None for memory.
        batch_size: samples per part.
        metrics: names.
        num_workers: see :class:`latent_rewards.MetricOracle`.
        cache_dir: the same.
    """

    num_samples: int
    folder: str | None = None
    batch_size: int = 8
    metrics: tuple[str, ...] = METRICS
    num_workers: int = 0
    cache_dir: str | None = None

    @property
    def num_parts(self) -> int:
        """How many parts the folder holds at the end."""
        return math.ceil(self.num_samples / self.batch_size)

    def run(self, when_ready: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Collect; return the seconds it took when everything was loaded, and this process's peak memory in MiB."""
        torch.set_num_threads(1)
        settings: dict[str, Any] = {"num_steps": 2, "progress": False}
        prompts = ["a circle", "two squares"]
        options: dict[str, Any] = {"num_workers": self.num_workers, "chunk_size": 4}
        with lr.MetricOracle(EnlargingCodec(), list(self.metrics), **options, cache_dir=self.cache_dir) as oracle:
            with tempfile.TemporaryDirectory() as warm_up:
                count = max(2, 4 * self.num_workers)
                lr.collect_rewards(
                    LinearPolicy(), prompts, oracle, num_samples=count, seed=1, output_dir=warm_up, **settings
                )
            when_ready()
            begun = time.perf_counter()
            lr.collect_rewards(
                LinearPolicy(),
                prompts,
                oracle,
                num_samples=self.num_samples,
                batch_size=self.batch_size,
                output_dir=self.folder,
                **settings,
            )
            seconds = time.perf_counter() - begun
        return {"seconds": seconds, "peak_mib": memory("VmHWM", "cpu")}


class Run(Protocol):
    """A process that is collecting; ``subprocess.Popen`` is one."""

    def kill(self) -> None:
        """Send SIGKILL."""
        ...

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        ...

    def wait(self) -> int:
        """Return the exit status, negative for a signal."""
        ...


def start(work: Work) -> subprocess.Popen[str]:
    """Start a collection in an interpreter of its own; returns when it has loaded everything."""
    command = [sys.executable, "-m", "benchmarks.collection", "--work", json.dumps(asdict(work))]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - this module
    assert running.stdout is not None and running.stdout.readline() == "ready\n"  # noqa: S101
    return running


def survive(begin: Callable[[], Run], folder: Path, *, kills: int, parts: int, seed: int) -> dict[str, Any]:
    """Kill a collection at random moments and start it again until it finishes.

    A moment is so many finished parts, and then some milliseconds: a slow machine finds it running too.

    Args:
        begin: starts (or continues) it.
        folder: what it collects into.
        kills: how often; moments that find it finished do not count.
        parts: of the whole collection.
        seed: of the moments.

    Returns:
        The kills that found it running, how many of them found a folder half written, and the parts after each.
    """
    moments = random.Random(seed)  # noqa: S311 - no secret
    counts, half_written = [], 0
    for left in range(kills, 0, -1):
        running = begin()
        # Half of what is left, shared by the kills to come: the last of them is far from the end.
        done = _parts(folder)
        _wait_for_parts(running, folder, done + moments.randint(0, (parts - done) // (2 * left)))
        time.sleep(moments.uniform(0, 0.03))
        running.kill()
        if running.wait() == 0:
            break
        counts.append(_parts(folder))
        half_written += any(folder.glob(".tmp-*"))
    status = begin().wait()
    return {"kills": len(counts), "half_written": half_written, "parts_after_kill": counts, "exit_status": status}


def _parts(folder: Path) -> int:
    return len(list(folder.glob("part-*")))


def _wait_for_parts(running: Run, folder: Path, count: int) -> None:
    while running.poll() is None and _parts(folder) < count:
        time.sleep(0.001)


def content(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def measure_workers(num_samples: int, repeats: int) -> dict[str, Any]:
    """Return the seconds of runs with 0, 1 and 2 workers, taken in turn, and the median ratios."""
    taken: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for _ in range(repeats):
        for count, seconds in taken.items():
            seconds.append(Work(num_samples, num_workers=count).run()["seconds"])

    def ratio(slower: int, faster: int) -> float:
        return statistics.median(a / b for a, b in zip(taken[slower], taken[faster], strict=True))

    return {
        "num_samples": num_samples,
        "seconds": taken,
        "one_worker_over_two": ratio(1, 2),
        "no_worker_over_one": ratio(0, 1),
        "no_worker_over_two": ratio(0, 2),
    }


def measure_cache(num_samples: int, scratch: Path) -> dict[str, Any]:
    """Return the seconds of a collection whose scores are computed, and of one whose scores are known."""
    miss, hit = (Work(num_samples, cache_dir=str(scratch / "cache")).run()["seconds"] for _ in range(2))
    return {"num_samples": num_samples, "miss_seconds": miss, "hit_seconds": hit, "miss_over_hit": miss / hit}


def measure_memory(num_samples: int, scratch: Path) -> dict[str, Any]:
    """Return peak memory at N and 10 N samples, in fresh processes, with and without a worker."""
    video_mib = SHAPE[1] * 3 * 16 * SHAPE[2] * SHAPE[3] * 4 / 2**20
    counts = [num_samples, 10 * num_samples]
    result: dict[str, Any] = {"num_samples": counts, "all_videos_mib": [count * video_mib for count in counts]}
    for workers in (0, 1):
        peaks = []
        for count in counts:
            output, _ = start(Work(count, str(scratch / f"{workers}-{count}"), num_workers=workers)).communicate()
            peaks.append(json.loads(output)["peak_mib"])
        result[f"workers_{workers}"] = {"peak_mib": peaks, "ten_times_over_once": peaks[1] / peaks[0]}
    return result


def measure_kills(work: Work, kills: int, scratch: Path) -> dict[str, Any]:
    """Return what became of a collection that was killed again and again."""
    whole, disturbed = scratch / "undisturbed", scratch / "disturbed"
    replace(work, folder=str(whole), num_workers=0, cache_dir=None).run()
    work = replace(work, folder=str(disturbed))
    result = survive(lambda: start(work), disturbed, kills=kills, parts=work.num_parts, seed=0)
    return {**result, "num_samples": work.num_samples, "byte_equal": content(disturbed) == content(whole)}


SECTIONS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "workers": lambda asked, _: measure_workers(asked.samples, asked.repeats),
    "cache": lambda asked, scratch: measure_cache(asked.samples, scratch),
    "memory": lambda asked, scratch: measure_memory(asked.samples // 4, scratch / "memory"),
    "kills": lambda asked, scratch: measure_kills(
        Work(asked.samples, batch_size=2, metrics=CHEAP_METRICS), asked.kills, scratch / "plain"
    ),
    "kills_with_worker_and_cache": lambda asked, scratch: measure_kills(
        Work(asked.samples, batch_size=2, metrics=CHEAP_METRICS, num_workers=1, cache_dir=str(scratch / "kept")),
        asked.kills // 4,
        scratch / "aided",
    ),
}
"""What there is to measure, by name: of the command line and a folder for scratch."""


def main() -> None:
    """Measure everything, or (``--work``) be the process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=256, help="samples of the timed runs (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each number of workers")
    parser.add_argument("--kills", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--note", default="", help="what else the machine did; stored with the result")
    said = "sections to measure again; the others are kept as they are"
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help=said)
    add_results(parser, RESULTS / "collection.json", "file that results are written into")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(Work(**options.work).run(lambda: print("ready", flush=True))))
        return
    stored, measured = Sections(options.results), {}
    with tempfile.TemporaryDirectory() as name:
        for section in options.only or SECTIONS:
            measured[section] = {"note": options.note, **SECTIONS[section](options, Path(name)), **provenance()}
            stored.write({"metrics": METRICS, section: measured[section]})
    if not options.only:
        # Nothing is left of what an older file told of all its sections at once.
        write_result(options.results, {"metrics": METRICS, **measured})
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
