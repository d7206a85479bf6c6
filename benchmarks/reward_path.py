"""What the path from a reward back to final latents costs an update: ``python -m benchmarks.reward_path``.

A proxy, with its gradient or by eight draws without one (LRO), against backpropagation through a decoder and a
differentiable metric (VADER, DRaFT): whole clips, whole clips with checkpoints, and the first few frames only. The
decoder has the configuration of Wan 2.1's (random weights). Every way runs at growing sizes, each time in an
interpreter of its own. Results go into ``results/reward_path.json``, a section for each request (device, dtype, and
sizes and ways that are named), and ``--draw`` makes a picture of them, ``results/reward_path.png``. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import latent_rewards as lr
from benchmarks.checkpointed_decoder import CheckpointedWan
from benchmarks.interpreter import run_apart
from benchmarks.meters import SPARE, free_mib, mebibytes, memory, settle
from benchmarks.provenance import device_name, provenance
from benchmarks.proxy_speed import PROMPTS, prepare, read_size
from benchmarks.result_files import RESULTS, Sections, add_results, read_result
from latent_rewards.lro.estimators import smoothed
from latent_rewards.metrics.quality import sharpness
from latent_rewards.rollout import Trajectory

SIZES = ((5, 32, 32), (5, 64, 64), (9, 96, 96), (9, 240, 416), (81, 480, 832))
GPU_SIZES = ((5, 64, 64), (9, 240, 416), (17, 480, 832), (81, 480, 832))
"""Frames, height and width of clips."""

NUM_DRAWS, HEAD_STD = 8, 0.1
"""LROConfig's defaults."""

Size = tuple[int, int, int]
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Way:
    """How a reward is reached.

    Attributes:
        proxy: by a proxy, not by decoding.
        draws: scored without gradient; 0 for a backward pass.
        checkpoints: "" for none, "frames" for one a latent frame, "levels" for segments, frames and blocks, nested.
        frames: latent frames that are decoded, from the first; 0 for all.
    """

    proxy: bool = False
    draws: int = 0
    checkpoints: str = ""
    frames: int = 0


WAYS = {
    "proxy": Way(proxy=True),
    f"proxy, {NUM_DRAWS} draws": Way(proxy=True, draws=NUM_DRAWS),
    "decoder": Way(),
    "decoder, checkpointed": Way(checkpoints="frames"),
    "decoder, three levels of checkpoints": Way(checkpoints="levels"),
    "decoder, 1 latent frame": Way(frames=1),
    "decoder, 2 latent frames": Way(frames=2),
}
"""A first latent frame is one frame of video, two are five: these see little of a clip."""

WHOLE = ("decoder", "decoder, checkpointed", "decoder, three levels of checkpoints")


@dataclass(frozen=True)
class Run:
    """One way at one size; JSON-able, so that another interpreter can do it.

    Attributes:
        way: one of :data:`WAYS`.
        folder: where latents ``[1, C, F, H, W]`` and the proxy lie.
        repeats: timed updates at most.
        limit_seconds: after the first, none is begun that would make them take longer in all.
        device: torch device.
        dtype: of the VAE, "float32" or "bfloat16"; the proxy is float32.
        vae: arguments that differ from Wan 2.1's configuration.
    """

    way: str
    folder: str
    repeats: int
    limit_seconds: float
    device: str
    dtype: str = "float32"
    vae: dict[str, Any] | None = None

    def do(self) -> dict[str, Any]:
        """Take the gradient of the latents, and say what that took.

        Returns:
            ``seconds`` of each update, and MiB: ``weights`` (the proxy's, or the VAE's), ``work`` (most memory above
            what is held when warm) and ``peak`` (of the interpreter, or of an accelerator's allocator). ``work`` and
            ``out_of_memory`` alone where the accelerator had too little.
        """
        stored = load_file(Path(self.folder) / "latents.safetensors")["latents"][:1].to(self.device)
        way = WAYS[self.way]
        loss, weights = self.proxy_loss(way) if way.proxy else self.decoder_loss(way)
        # The proxy reads one size only; a decoder is warm after any.
        gradient(loss, stored if way.proxy else stored[:, :, :1, :4, :4])
        held = settle(self.device)
        seconds: list[float] = []
        try:
            while not seconds or (len(seconds) < self.repeats and sum(seconds) + seconds[-1] < self.limit_seconds):
                begun = time.perf_counter()
                gradient(loss, stored)
                seconds.append(time.perf_counter() - begun)
        except torch.OutOfMemoryError as error:
            return {"out_of_memory": str(error).split(". GPU")[0], "work": memory("VmHWM", self.device) - held}
        peak = memory("VmHWM", self.device)
        return {"seconds": seconds, "weights": weights, "work": peak - held, "peak": peak}

    def proxy_loss(self, way: Way) -> tuple[Loss, float]:
        """Return minus the proxy's score of latents, or the surrogate whose gradient its draws estimate, and MiB."""
        proxy = lr.RewardProxy.from_pretrained(Path(self.folder) / "proxy").to(self.device)

        def score(latents: Tensor) -> Tensor:
            scores = proxy(latents, PROMPTS[:1] * len(latents))
            assert isinstance(scores, Tensor)  # noqa: S101 - there is one reward
            return scores

        drawn = torch.Generator(self.device).manual_seed(0)

        def by_draws(latents: Tensor) -> Tensor:
            # The chain's last step is all there is of a policy here.
            ends = Trajectory([latents.detach(), latents.detach()], None, num_steps=1)  # type: ignore[arg-type]
            noise = torch.randn((way.draws, *latents.shape), device=latents.device, generator=drawn)
            steps = [(latents, torch.zeros((), device=latents.device))]
            settings: dict[str, Any] = {"head_std": HEAD_STD, "head_noise": noise, "num_generations": 1}
            return smoothed(None, ends, score, transitions=steps, **settings)  # type: ignore[arg-type]

        return by_draws if way.draws else lambda latents: -score(latents).mean(), mebibytes(proxy)

    def decoder_loss(self, way: Way) -> tuple[Loss, float]:
        """Return minus the sharpness of what latents are decoded to, and the VAE's MiB."""
        from distillation.families.wan import WanCodec

        vae = random_vae(**(self.vae or {})).to(getattr(torch, self.dtype))
        vae.encoder = vae.quant_conv = nn.Identity()  # nobody encodes here
        settings: dict[str, Any] = {"segment": None, "blocks": True} if way.checkpoints == "levels" else {}
        wrapped = CheckpointedWan(vae, **settings) if way.checkpoints else vae
        codec = WanCodec(wrapped, chunk_size=1).to(self.device)

        def loss(latents: Tensor) -> Tensor:
            return -sharpness(codec.decode(latents[:, :, : way.frames or None])).mean()

        return loss, mebibytes(vae)


def random_vae(**different: Any) -> nn.Module:  # noqa: ANN401 - the class's
    """Return a VAE of Wan 2.1's configuration, except for what is ``different``, with the random weights of a seed."""
    from distillation.families import import_diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae: nn.Module = import_diffusers().AutoencoderKLWan(**different)
    return vae


def gradient(loss: Loss, latents: Tensor) -> Tensor:
    """Return the gradient of ``loss`` at latents, when it is there."""
    latents = latents.detach().clone().requires_grad_()
    loss(latents).backward()
    if latents.is_cuda:
        torch.cuda.synchronize(latents.device)
    assert latents.grad is not None  # noqa: S101 - latents are a leaf
    return latents.grad


def measure(run: Run) -> dict[str, Any]:
    """Do a run in a fresh interpreter; one killed for its memory is told as ``out_of_memory``.

    Raises:
        RuntimeError: it failed.
    """
    return run_apart("benchmarks.reward_path", run.way, asdict(run))


def read_pixels(way: Way, size: Size) -> int:
    """Return the pixels of a clip of that size that pass through the way."""
    frames = min(size[0], 4 * way.frames - 3) if way.frames else size[0]
    return frames * size[1] * size[2]


def forecast(row: dict[str, Any], way: Way, size: Size) -> dict[str, float]:
    """Return MiB (weights and work) and seconds expected at ``size`` from a measured row.

    Both grow as pixels do, or slower: checkpoints share most of their memory, so theirs is at most this.
    """
    larger = read_pixels(way, size) / read_pixels(way, row["size"])
    return {"memory": row["weights"] + larger * row["work"], "seconds": larger * statistics.median(row["seconds"])}


def attempt(
    before: dict[str, Any] | None,
    way: str,
    size: Size,
    measure_it: Callable[[], dict[str, Any]],
    free: float,
    limit: float,
) -> dict[str, Any]:
    """Measure a way at a size unless the row ``before``, its last measured one, foretells too much.

    Args:
        before: None if there is none.
        way: one of :data:`WAYS`.
        size: frames, height and width.
        measure_it: tells what :meth:`Run.do` does.
        free: MiB that may be taken.
        limit: seconds that an update may be expected to take.

    Returns:
        A row with the way, the size, what had been expected of it, if anything was, and what was measured or how that
        ``failed``: the other ways go on.
    """
    row: dict[str, Any] = {"way": way, "size": size}
    if before is not None:
        row["expected"] = forecast(before, WAYS[way], size)
        if row["expected"]["memory"] > free:
            return {**row, "out_of_memory": f"{row['expected']['memory']:.0f} MiB expected, {free:.0f} free for it"}
        if row["expected"]["seconds"] > limit:
            return {**row, "left_out": f"{row['expected']['seconds']:.0f} s expected, {limit:.0f} allowed"}
    try:
        return {**row, **measure_it()}
    except RuntimeError as error:
        return {**row, "failed": str(error)}


def grow(options: argparse.Namespace, keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Measure the ways at each size and return the rows; ``keep`` is told of them after each."""
    rows: list[dict[str, Any]] = []
    for size in options.sizes or _usual_sizes(options.device):
        with tempfile.TemporaryDirectory() as folder:
            shape = 16, (size[0] - 1) // 4 + 1, size[1] // 8, size[2] // 8
            prepare(Path(folder), shape, 1, options.device, scale=8)
            torch.cuda.empty_cache()
            for way in options.ways:
                before = next((row for row in rows[::-1] if row["way"] == way and "seconds" in row), None)
                run = Run(way, folder, options.repeats, options.limit_seconds, options.device, options.dtype)
                # An accelerator says itself, at once and without harm, that it has too little.
                free = SPARE * free_mib("cpu") if options.device == "cpu" else math.inf
                rows.append(attempt(before, way, size, partial(measure, run), free, options.limit_seconds))
                print(json.dumps(rows[-1]), flush=True)
                keep(rows)
    return rows


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each size and each way but the proxy, how many times the proxy's memory and seconds it takes.

    Memory is weights and work. Only measured rows are compared. ``least_whole`` is, for each size, the smallest of the
    ratios over ways that decode whole clips.
    """
    told = []
    for size in dict.fromkeys(tuple(row["size"]) for row in rows):
        at = {row["way"]: row for row in rows if tuple(row["size"]) == size and "seconds" in row}
        base = at.pop("proxy", None)
        if base is None:
            continue
        compared = {way: {name: f(row) / f(base) for name, f in COSTS.items()} for way, row in at.items()}
        whole = [compared[way] for way in WHOLE if way in compared]
        least = {name: min(ratio[name] for ratio in whole) for name in COSTS} if whole else None
        told.append({"size": size, "over_proxy": compared, "least_whole": least})
    return told


def taken_mib(row: dict[str, Any]) -> float:
    """Return weights and work."""
    return float(row["weights"] + row["work"])


def median_seconds(row: dict[str, Any]) -> float:
    """Return the median of a row's updates."""
    return float(statistics.median(row["seconds"]))


COSTS: dict[str, Callable[[dict[str, Any]], float]] = {"memory": taken_mib, "seconds": median_seconds}


def columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return the x and the y of points."""
    return [x for x, _ in points], [y for _, y in points]


def draw(sections: dict[str, Any], path: Path) -> None:
    """Write a picture: memory and seconds of each way over the pixels of a clip, a row of panels for each section.

    Crosses are what was expected and not measured, of ways without checkpoints: theirs would be too high.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(sections), 2, figsize=(11, 4.2 * len(sections)), squeeze=False)
    labels = {"memory": "weights and work, MiB", "seconds": "seconds an update"}
    for pair, section in zip(axes, sections.values(), strict=True):
        for axis, (name, cost) in zip(pair, COSTS.items(), strict=True):
            for way, path_kind in WAYS.items():
                rows = [row for row in section["rows"] if row["way"] == way]
                measured = [(math.prod(row["size"]), cost(row)) for row in rows if "seconds" in row]
                style = "o-" if path_kind.proxy else "s--"
                (line,) = axis.plot(*columns(measured), style, label=way, markersize=4)
                unmeasured = [row for row in rows if "seconds" not in row and "expected" in row]
                foretold = [
                    (math.prod(row["size"]), row["expected"][name]) for row in unmeasured if not path_kind.checkpoints
                ]
                axis.plot(*columns(foretold), "x", color=line.get_color())
            axis.set(xscale="log", yscale="log", xlabel="pixels of a clip (frames x height x width)")
            axis.set(ylabel=labels[name], title=f"{section['device']}, VAE in {section['dtype']}")
            axis.grid(alpha=0.3)
        pair[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Measure, draw, or (``--run``) be the interpreter that is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--sizes", type=read_size, nargs="+", help="clips, ascending, e.g. 9x128x128 81x480x832")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="default: all")
    parser.add_argument("--repeats", type=int, default=3, help="timed updates of each (default: %(default)s)")
    parser.add_argument("--limit-seconds", type=float, default=120, help="longest update to begin")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the VAE")
    parser.add_argument("--draw", action="store_true", help="draw what is stored, and measure nothing")
    parser.add_argument("--note", default="", help="what else the machine did; stored with the result")
    add_results(parser, RESULTS / "reward_path.json", "file that results are written into, and drawn beside")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(Run(**options.run).do()))
        return
    if not options.draw:
        stored, device = Sections(options.results), device_name(options.device)
        grow(options, lambda rows: stored.write({section_of(options): section(options, rows, device)}))
    draw(read_result(options.results), options.results.with_suffix(".png"))


def section_of(options: argparse.Namespace) -> str:
    """Return the name of the section of a result: device, dtype, and what differs from a measurement of everything."""
    parts = [options.device] if options.dtype == "float32" else [options.device, options.dtype]
    if tuple(options.sizes or ()) not in ((), _usual_sizes(options.device)):
        parts += ["x".join(map(str, size)) for size in options.sizes]
    if set(options.ways) != set(WAYS):
        parts += [way for way in WAYS if way in options.ways]
    return "_".join(parts)


def section(options: argparse.Namespace, rows: list[dict[str, Any]], device: str) -> dict[str, Any]:
    """Return rows and ratios as they are stored, with what all rows share."""
    facts = {"device": device, "dtype": options.dtype, "note": options.note, **provenance()}
    return {"rows": rows, "ratios": ratios(rows), **facts}


def _usual_sizes(device: str) -> tuple[Size, ...]:
    return SIZES if device == "cpu" else GPU_SIZES


if __name__ == "__main__":
    main()
