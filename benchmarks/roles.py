"""What a VSD update costs with one shared base and adapters, and with full networks: ``python -m benchmarks.roles``.

Student, fake score and target as adapters on one frozen teacher (:class:`distillation.roles.SharedBase`), held in
float32 or in bf16, against four networks of their own, each with and without gradient checkpointing, through the
trainer's own stage and without data. With ``--peer FOLDER``, a checkout of NVlabs/FastGen, its DMD2 updates the same
network with the same batch, precision and number of fake score updates. Every measurement has a fresh interpreter, and
the ways take turns. Results go into ``results/roles.json``, a section for each request: what was measured together is
compared, and replaced, together. Linux only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import distillation as ds
from benchmarks.fastgen_peer import DMD2, EMA_DECAY, LEARNING_RATE, check_folder
from benchmarks.interpreter import run_apart
from benchmarks.meters import SPARE, free_mib, memory, settle
from benchmarks.provenance import device_name, provenance
from benchmarks.result_files import RESULTS, Sections, add_results
from benchmarks.role_sizes import SIZES, TINIEST, Size
from distillation.trainer import DistillationStage, start_student
from recipes.origin import commit_of

BAR = 1 / 3
"""Most that shared roles may take of full networks' memory."""
CPU_SIZES, GPU_SIZES = ("digits", "narrow", "narrow, long", "middle", "wide"), ("wan-1.3b",)


@dataclass(frozen=True)
class Way:
    """Who plays the roles.

    Attributes:
        kind: "full", "shared", "narrow" (shared, on a base in bf16) or "peer".
        checkpointed: with gradient checkpointing.
    """

    kind: str
    checkpointed: bool

    @property
    def name(self) -> str:
        """What results call it."""
        return f"{self.kind}, checkpointed" if self.checkpointed else self.kind


KINDS = ("full", "shared", "narrow", "peer")
WAYS = {way.name: way for way in (Way(kind, also) for also in (False, True) for kind in KINDS)}


@dataclass(frozen=True)
class Run:
    """The updates of one way at one size; JSON-able, so that another interpreter can do them.

    Attributes:
        way: one of :data:`WAYS`.
        size: one of :data:`SIZES`.
        num_steps: timed updates, after one that is not.
        rank: of the adapters.
        fake_updates: fake score updates per student update.
        guidance_scale: of the teacher.
        device: torch device.
        mixed_precision: "no" or "bf16"; weights are float32, but for the base of the ways that are "narrow".
        peer: a checkout of FastGen, or None.
    """

    way: str
    size: str
    num_steps: int = 1
    rank: int = 16
    fake_updates: int = 5
    guidance_scale: float = 5.0
    device: str = "cpu"
    mixed_precision: str = "no"
    peer: str | None = None

    def do(self) -> dict[str, Any]:
        """Update, and say what that took.

        Returns:
            ``seconds`` of each timed update and ``cpu_seconds`` that this interpreter spent on it, ``memory``, the most
            MiB above what is held when one update of the tiniest network is over and forgotten, and ``calls`` of a
            transformer in an update. ``out_of_memory`` alone where the accelerator had too little.
        """
        self._updates(TINIEST, [])(0)
        held = settle(self.device)
        calls: list[int] = []
        seconds, cpu_seconds = [], []
        try:
            update = self._updates(SIZES[self.size], calls)
            for step in range(self.num_steps + 1):
                calls.clear()
                begun = time.perf_counter(), time.process_time()
                update(step)
                if self.device != "cpu":
                    torch.cuda.synchronize(self.device)
                seconds.append(time.perf_counter() - begun[0])
                cpu_seconds.append(time.process_time() - begun[1])
        except torch.OutOfMemoryError as error:
            return {"out_of_memory": str(error).split(". GPU")[0]}
        taken = memory("VmHWM", self.device) - held
        return {"seconds": seconds[1:], "cpu_seconds": cpu_seconds[1:], "memory": taken, "calls": len(calls)}

    def _updates(self, size: Size, calls: list[int]) -> Callable[[int], object]:
        """Return what updates once; ``calls`` grows by one with every call of a transformer, copies included."""
        way = WAYS[self.way]

        def build() -> nn.Module:
            with torch.device(self.device):
                network = size.build(torch.bfloat16 if way.kind == "narrow" else torch.float32)
            network.register_forward_hook(lambda *_: calls.append(1))
            return network

        if way.kind == "peer":
            condition = size.texts(["a clip"] * size.batch_size).embeddings
            return DMD2(
                Path(self.peer or ""),
                build,
                latent_shape=size.latents,
                condition=condition,
                negative=size.texts([""] * size.batch_size).embeddings,
                guidance_scale=self.guidance_scale,
                fake_updates=self.fake_updates,
                checkpointed=way.checkpointed,
                device=self.device,
                mixed_precision=self.mixed_precision,
            ).update
        return self._stage(size, way, build).step

    def _stage(self, size: Size, way: Way, build: Callable[[], nn.Module]) -> DistillationStage:
        """Return the VSD stage of the trainer."""
        from distillation.families.wan import WanDenoiser

        teacher = _Teacher(WanDenoiser(build().requires_grad_(False), ds.RectifiedFlow()), size)
        config = ds.DistillationConfig(
            vsd_steps=self.num_steps + 1,
            cd_steps=0,
            batch_size=size.batch_size,
            step_counts=[1],
            guidance_scale=self.guidance_scale,
            learning_rate=LEARNING_RATE,
            fake_learning_rate=LEARNING_RATE,
            fake_updates=self.fake_updates,
            ema_decay=EMA_DECAY,
            adapter_rank=None if way.kind == "full" else self.rank,
            gradient_checkpointing=way.checkpointed,
            log_every=self.num_steps + 1,  # the fake score's lag is an additional call, in the update that is not timed
            progress=False,
            mixed_precision=self.mixed_precision,
            device=self.device,
        )
        student = start_student(teacher, config, {1: [1.0]})
        trainer = ds.DistillationTrainer(teacher, student, ["a clip"], config)
        return DistillationStage(trainer.setup, "vsd", self.num_steps + 1, ("vsd",))


class _Teacher:
    """What the trainer asks of a teacher."""

    def __init__(self, denoiser: nn.Module, size: Size) -> None:
        self.denoiser, self.encode, self.latent_shape = denoiser.eval(), size.texts, size.latents


def expected_mib(way: Way, size: Size) -> float:
    """Return the MiB of weights, gradients and optimiser states, without adapters and activations.

    Full networks are four, two of them with the two states of AdamW, one of them with gradients at a time.
    """
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in size.build().parameters()) * 4 / 2**20
    return weights * {"shared": 1, "narrow": 0.5}.get(way.kind, 9)


def attempt(run: Run, free: float) -> dict[str, Any]:
    """Measure a run in an interpreter of its own unless more than ``free`` MiB are expected of it; return a row."""
    row: dict[str, Any] = {"way": run.way, "size": run.size}
    expected = expected_mib(WAYS[run.way], SIZES[run.size])
    if expected > free:
        return {**row, "left_out": f"{expected:.0f} MiB of weights and states expected, {free:.0f} free for them"}
    try:
        return {**row, **run_apart("benchmarks.roles", run.way, asdict(run))}
    except RuntimeError as error:
        return {**row, "failed": str(error)}


def take_turns(
    sizes: Sequence[str],
    ways: Sequence[str],
    rounds: int,
    measure: Callable[[str, str], dict[str, Any]],
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Measure every way in every round, every other one backwards; return the rows, of which ``keep`` is told too."""
    rows: list[dict[str, Any]] = []
    for size in sizes:
        for number in range(rounds):
            for way in ways if number % 2 == 0 else ways[::-1]:
                rows.append({"round": number, **measure(way, size)})
                print(json.dumps(rows[-1]), flush=True)
                keep(rows)
    return rows


COSTS: dict[str, Callable[[dict[str, Any]], float]] = {
    "memory": lambda row: float(row["memory"]),
    "seconds": lambda row: statistics.median(row["seconds"]),
    "cpu_seconds": lambda row: statistics.median(row["cpu_seconds"]),
}


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each size, what each way takes over each other one: medians over the rounds that measured both."""
    told = []
    for size in dict.fromkeys(row["size"] for row in rows):
        measured = [row for row in rows if row["size"] == size and "seconds" in row]
        by_way = {way: {row["round"]: row for row in measured if row["way"] == way} for way in WAYS}
        over: dict[str, dict[str, dict[str, float]]] = {}
        for way, mine in by_way.items():
            for base, theirs in by_way.items():
                both = sorted(mine.keys() & theirs.keys())
                if both and way != base:
                    over.setdefault(way, {})[base] = {
                        name: statistics.median(cost(mine[number]) / cost(theirs[number]) for number in both)
                        for name, cost in COSTS.items()
                    }
        told.append({"size": size, "over": over})
    return told


def bars(compared: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return whether the size of most weights keeps the bars, each like for like: with checkpointing or without.

    Args:
        compared: of :func:`ratios`, one or more.

    Returns:
        Memory of shared roles over that of full networks, at most a third where ``memory_kept``; seconds over the
        peer's, at most 1 where ``seconds_kept``; None where one of both is not measured.
    """
    largest = max(compared, key=lambda entry: expected_mib(Way("shared", False), SIZES[entry["size"]]))
    told: dict[str, Any] = {}
    for checkpointed in (False, True):
        full, shared, peer = (Way(kind, checkpointed).name for kind in ("full", "shared", "peer"))
        over = largest["over"].get(shared, {})
        memory_ratio, seconds = over.get(full, {}).get("memory"), over.get(peer, {}).get("seconds")
        told[shared] = {
            "memory_over_full": memory_ratio,
            "memory_kept": None if memory_ratio is None else memory_ratio <= BAR,
            "seconds_over_peer": seconds,
            "seconds_kept": None if seconds is None else seconds <= 1,
        }
    return {"size": largest["size"], **told}


def main() -> None:
    """Measure, or (``--run``) be the interpreter that is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help=f"default: {CPU_SIZES}, on a GPU {GPU_SIZES}")
    parser.add_argument("--only", nargs="+", default=list(WAYS), choices=list(WAYS), help="default: all ways")
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which the ways take turns")
    parser.add_argument("--steps", type=int, default=1, help="timed updates in a round, after one that is not")
    parser.add_argument("--rank", type=int, default=Run.rank, help="of the adapters")
    parser.add_argument(
        "--fake-updates", type=int, default=Run.fake_updates, help="fake score updates per student update"
    )
    parser.add_argument(
        "--precision",
        default="no",
        choices=("no", "bf16"),
        help="autocast; the ways 'narrow' are measured in bf16 only",
    )
    parser.add_argument("--peer", type=Path, help="a checkout of NVlabs/FastGen; without it the peer is left out")
    parser.add_argument("--note", default="", help="what else the machine did; stored with the result")
    add_results(parser, RESULTS / "roles.json", "file that results are written into")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(Run(**options.run).do()))
        return
    measure_all(options)


def measure_all(options: argparse.Namespace) -> None:
    """Measure what the command line asks for, and store it after every row.

    Raises:
        PeerError: ``--peer`` is no checkout of FastGen.
        ConfigError: the file of results cannot be read.
        DeviceError: there is no such device.
    """
    stored, name = Sections(options.results), device_name(options.device)
    ways = [way for way in WAYS if way in options.only and (WAYS[way].kind != "narrow" or options.precision == "bf16")]
    if options.peer is None:
        ways = [way for way in ways if WAYS[way].kind != "peer"]
        print("the peer is left out: name a checkout of NVlabs/FastGen with --peer FOLDER", flush=True)
    else:
        check_folder(options.peer)
    shared: dict[str, Any] = {
        "num_steps": options.steps,
        "rank": options.rank,
        "fake_updates": options.fake_updates,
        "device": options.device,
        "mixed_precision": options.precision,
    }

    def measure(way: str, size: str) -> dict[str, Any]:
        # An accelerator says itself, at once and without harm, that it has too little.
        free = SPARE * free_mib("cpu") if options.device == "cpu" else float("inf")
        return attempt(Run(way, size, peer=str(options.peer) if options.peer else None, **shared), free)

    sizes = options.sizes or (CPU_SIZES if options.device == "cpu" else GPU_SIZES)
    peer = peer_name(options.peer) if options.peer else None
    facts = {**shared, "device_name": name, "peer": peer, "note": options.note}
    take_turns(
        sizes, ways, options.repeats, measure, lambda rows: stored.write({section_of(options): section(rows, facts)})
    )


def peer_name(folder: Path) -> str:
    """Return what results call a checkout; without a repository of its own, git would tell that of the folder above."""
    commit = commit_of(folder) if (folder / ".git").exists() else None
    return f"NVlabs/FastGen {commit or 'of an unknown commit'}"


def section_of(options: argparse.Namespace) -> str:
    """Return the name of the section of a result: its device, and what differs from a measurement of everything."""
    parts = [options.device, *(options.sizes or ())]
    if options.precision != "no":
        parts.insert(1, options.precision)
    if set(options.only) != set(WAYS):
        parts += [way for way in WAYS if way in options.only]
    if options.fake_updates != Run.fake_updates:
        parts.append(f"{options.fake_updates} fake updates")
    if options.rank != Run.rank:
        parts.append(f"rank {options.rank}")
    if options.peer is not None:
        parts.append("with the peer")
    return "_".join(parts)


def section(rows: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """Return rows, ratios and bars as they are stored, with the facts that all rows share."""
    compared = ratios(rows)
    sizes = {size: {**asdict(SIZES[size]), "tokens": SIZES[size].tokens} for size in {row["size"]: 0 for row in rows}}
    return {"bars": bars(compared), "ratios": compared, "rows": rows, "sizes": sizes, **facts, **provenance()}


if __name__ == "__main__":
    main()
