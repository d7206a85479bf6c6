"""Peak memory of training a proxy on 10,000 and on 100,000 latents on disk: ``python -m benchmarks.proxy_memory``.

Synthetic latents are written shard by shard; each training runs in an interpreter of its own, whose peak resident set
is compared. One pair reads latents on demand, as data sets above ``in_memory_mib`` are, the other as a whole. The
result goes into ``results/proxy_memory.json``. Linux only.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.interpreter import run_apart_whole
from benchmarks.meters import memory
from benchmarks.provenance import provenance
from benchmarks.result_files import RESULTS, add_results, write_result
from latent_rewards.dataset import RewardDataset, write_complete
from latent_rewards.proxies import ProxyConfig, train_proxy
from latent_rewards.training.randomness import generator

SHAPE = (4, 3, 8, 8)
"""(C, F, H, W); 1,536 bytes in bfloat16."""

SHARD_ROWS = 5000
SAMPLES_PER_PROMPT = 8
ON_DEMAND, WHOLE = 4, 1024
"""Most MiB of latents that are read as a whole."""


@dataclass(frozen=True)
class Work:
    """One training; JSON-able, so that another interpreter can do it.

    Attributes:
        folder: the data set.
        in_memory_mib: see :class:`latent_rewards.proxies.ProxyConfig`.
        num_updates: per network.
    """

    folder: str
    in_memory_mib: int
    num_updates: int = 50

    def run(self) -> dict[str, float]:
        """Load and train; return seconds, peak MiB before and after the training, and rows read per second."""
        torch.set_num_threads(1)
        dataset = RewardDataset.load(self.folder)
        rows_per_second = random_rows_per_second(dataset)
        loaded, begun = memory("VmHWM", "cpu"), time.perf_counter()
        config = ProxyConfig(
            width=16,
            depth=1,
            ensemble_size=2,
            num_updates=self.num_updates,
            in_memory_mib=self.in_memory_mib,
            progress=False,
        )
        proxy = train_proxy(dataset, config=config)
        return {
            "peak_mib": memory("VmHWM", "cpu"),
            "peak_mib_before_training": loaded,
            "seconds": time.perf_counter() - begun,
            "rows_per_second": rows_per_second,
            "spearman": proxy.report["level"]["spearman"],
        }


def random_rows_per_second(dataset: RewardDataset, *, batch_size: int = 64, batches: int = 100) -> float:
    """Return how many random rows per second are read in batches."""
    source = generator(0, "proxy-memory/rows", 0)
    begun = time.perf_counter()
    for _ in range(batches):
        dataset.latents(torch.randint(len(dataset), (batch_size,), generator=source))
    return batches * batch_size / (time.perf_counter() - begun)


def write_dataset(folder: Path, num_samples: int, *, shard_rows: int = SHARD_ROWS) -> None:
    """Write a collection of synthetic latents, never holding more than one shard.

    The reward "level" is the mean of channel 0 plus noise; 8 neighbouring samples share a prompt.
    """
    parts = []
    for number, start in enumerate(range(0, num_samples, shard_rows)):
        count = min(shard_rows, num_samples - start)
        source = generator(0, "proxy-memory/latents", number)
        latents = torch.randn(count, *SHAPE, generator=source) + torch.randn(count, SHAPE[0], 1, 1, 1, generator=source)
        level = latents[:, 0].mean(dim=(1, 2, 3)) + 0.1 * torch.randn(count, generator=source)
        prompts = [f"a clip of scene {(start + i) // SAMPLES_PER_PROMPT} from above" for i in range(count)]
        parts.append(folder / f"part-{number:05d}")
        RewardDataset.from_tensors(latents.bfloat16(), prompts, {"level": level}, latent_space="synthetic").save(
            parts[-1]
        )
    write_complete(folder, parts, {})


def measure(work: Work) -> dict[str, float]:
    """Return what :meth:`Work.run` returns in an interpreter of its own.

    Raises:
        RuntimeError: it failed or was killed.
    """
    return run_apart_whole("benchmarks.proxy_memory", "the training", asdict(work))


def compare(counts: list[int], scratch: Path, num_updates: int) -> dict[str, Any]:
    """Return the measurements of every count, on demand and as a whole, and the ratio of last to first peak."""
    for count in counts:
        write_dataset(scratch / str(count), count)
    result: dict[str, Any] = {
        "num_samples": counts,
        "latents_mib": [count * 2 * int(torch.tensor(SHAPE).prod()) / 2**20 for count in counts],
        "num_updates": num_updates,
    }
    for name, limit in (("on_demand", ON_DEMAND), ("as_a_whole", WHOLE)):
        runs = [measure(Work(str(scratch / str(count)), limit, num_updates)) for count in counts]
        result[name] = {key: [run[key] for run in runs] for key in runs[0]}
        result[name]["last_over_first_peak"] = runs[-1]["peak_mib"] / runs[0]["peak_mib"]
    return result


def main() -> None:
    """Measure, or (``--run``) be the process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000], help="default: %(default)s")
    parser.add_argument("--updates", type=int, default=50, help="per network (default: %(default)s)")
    parser.add_argument("--note", default="", help="what else the machine did; stored with the result")
    add_results(parser, RESULTS / "proxy_memory.json", "file that the result is written into")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(Work(**options.run).run()))
        return
    with tempfile.TemporaryDirectory() as scratch:
        result = {"note": options.note, **compare(options.samples, Path(scratch), options.updates)}
    write_result(options.results, {**result, **provenance()})
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
