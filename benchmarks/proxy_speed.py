"""What a score costs: the proxy of a codec's user against decoding and measuring; ``python -m benchmarks.proxy_speed``.

Each side scores the same latents in interpreters of its own, warm, and tells its seconds and memory. ``--wan`` does
it with the configuration of Wan 2.1's VAE (random weights) at growing sizes, and ``--ensemble`` times the members of a
proxy one by one against ``torch.func.vmap`` over their stacked weights. Results go into ``results/proxy_speed.json``,
a section each. Linux only.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call, stack_module_state

import latent_rewards as lr
from benchmarks.interpreter import run_apart_whole
from benchmarks.meters import SPARE, free_mib, mebibytes, memory, settle
from benchmarks.provenance import device_name, provenance
from benchmarks.result_files import RESULTS, Sections, add_results
from latent_rewards.training.randomness import generator, sample_noise

NUM_SAMPLES, METRIC, WAN_METRIC = 256, "digits.legibility", "motion.dynamic_degree"
"""What is scored unless the command line says otherwise; in the digits world, and of Wan's size."""

DIGITS = "recipes/moving_digits/weights/teacher"
PROMPTS = [f"a {colour} number {digit} moving left slowly" for colour in ("red", "blue") for digit in range(6)]
WAN_SIZES = ((5, 64, 64), (9, 128, 128), (9, 240, 416), (17, 480, 832), (81, 480, 832))
"""Frames, height and width of videos."""


@dataclass(frozen=True)
class Side:
    """One way to score; JSON-able, so that another interpreter can do it.

    Attributes:
        kind: "proxy" or "oracle".
        folder: where latents and proxy lie.
        vae: folder of a VAE, or "wan" for Wan 2.1's configuration; the oracle's.
        metric: name of the true metric.
        repeats: timed runs.
        device: torch device.
    """

    kind: str
    folder: str
    vae: str
    metric: str
    repeats: int
    device: str

    def run(self) -> dict[str, Any]:
        """Score, and say what it took.

        Returns:
            ``seconds`` of each run, and MiB: ``weights`` (the proxy's, or the VAE's), ``work`` (most memory above what
            is held when warm) and ``peak`` (of the interpreter, or of an accelerator's allocator).
        """
        # What is read is mapped from the file, and would count as work of the side that touches it first.
        latents = load_file(Path(self.folder) / "latents.safetensors")["latents"].to(self.device, copy=True)
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(latents))]
        score, weights = self._proxy() if self.kind == "proxy" else self._oracle()
        score(latents[:2], prompts[:2])
        held = settle(self.device)
        seconds = []
        for _ in range(self.repeats):
            begun = time.perf_counter()
            score(latents, prompts)
            if self.device != "cpu":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - begun)
        peak = memory("VmHWM", self.device)
        return {"seconds": seconds, "weights": weights, "work": peak - held, "peak": peak}

    def _proxy(self) -> tuple[Callable[[Tensor, list[str]], object], float]:
        proxy = lr.RewardProxy.from_pretrained(Path(self.folder) / "proxy").to(self.device)
        return proxy.predict, mebibytes(proxy)

    def _oracle(self) -> tuple[Callable[[Tensor, list[str]], object], float]:
        from distillation.families import import_diffusers
        from distillation.families.wan import WanCodec
        from recipes.moving_digits import metrics as _register  # noqa: F401 - registers digits.*

        autoencoder = import_diffusers().AutoencoderKLWan
        if self.vae == "wan":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                vae = autoencoder()  # the defaults are Wan 2.1's
        else:
            vae = autoencoder.from_pretrained(self.vae).float()
        codec = WanCodec(vae, chunk_size=1 if self.vae == "wan" else 8).to(self.device)
        oracle = lr.MetricOracle(codec, [self.metric], chunk_size=1 if self.vae == "wan" else 16)
        return oracle, mebibytes(vae)


@dataclass(frozen=True)
class Enlarging:
    """A codec of the sizes of Wan's, without its work: what the proxy's tiny decoder learns changes no time.

    Attributes:
        scale: pixels of a latent's side.
    """

    scale: int
    fingerprint = "enlarging"

    def decode(self, latents: Tensor) -> Tensor:
        """Return videos ``[B, 4 F - 3, 3, scale H, scale W]`` of latents ``[B, C, F, H, W]``."""
        frames = torch.sigmoid(latents[:, :3]).repeat_interleave(4, dim=2)[:, :, 3:].transpose(1, 2)
        return frames.repeat_interleave(self.scale, dim=3).repeat_interleave(self.scale, dim=4)

    def encode(self, videos: Tensor) -> Tensor:
        """Nothing is encoded here."""
        raise NotImplementedError


def prepare(folder: Path, latent_shape: tuple[int, ...], num_samples: int, device: str, scale: int) -> None:
    """Write latents to score, and the proxy that a codec's user gets; it has learned little, which costs the same."""
    latents = sample_noise(0, "speed", 0, range(48), latent_shape)
    rewards = latents[:, 0].mean(dim=(1, 2, 3)) + 0.1 * torch.rand(48, generator=generator(0, "speed/rewards", 0))
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(48)]
    little = {"num_updates": 1, "batch_size": 4, "decoder_clips": 4, "decoder_updates": 1}
    config = lr.ProxyConfig(trunk="pixels", progress=False, device=device, **little)
    proxy = lr.train_proxy(latents, rewards, prompts, config=config, codec=Enlarging(scale))
    proxy.save_pretrained(folder / "proxy")
    scored = sample_noise(1, "speed", 0, range(num_samples), latent_shape)
    save_file({"latents": scored}, folder / "latents.safetensors")


def compare(
    latent_shape: tuple[int, ...],
    *,
    num_samples: int,
    vae: str,
    metric: str,
    repeats: int,
    device: str,
    interpreters: int = 1,
) -> dict[str, Any]:
    """Measure both sides in turn, each in so many fresh ``interpreters``, and return them with their ratios.

    Raises:
        RuntimeError: a side failed; the message is what it wrote.
    """
    kinds = "proxy", "oracle"
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), latent_shape, num_samples, device, scale=8 if vae == "wan" else 4)
        rounds = [
            {kind: measure(Side(kind, name, vae, metric, repeats, device)) for kind in kinds}
            for _ in range(interpreters)
        ]
    sides = {kind: pooled([told[kind] for told in rounds]) for kind in kinds}
    return {"latent_shape": latent_shape, "num_samples": num_samples, "metric": metric, **sides, **ratios(**sides)}


def pooled(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what several interpreters of a side tell: the seconds of all, medians of memory, and ``each_work``.

    Where an allocator finds room differs from one interpreter to the next, by a third of the memory and more.
    """
    seconds = [taken for told in measured for taken in told["seconds"]]
    middle = {name: statistics.median(told[name] for told in measured) for name in ("weights", "work", "peak")}
    return {"seconds": seconds, **middle, "each_work": [told["work"] for told in measured]}


def measure(side: Side) -> dict[str, Any]:
    """Run a side in a fresh interpreter.

    Raises:
        RuntimeError: it failed or was killed.
    """
    return run_apart_whole("benchmarks.proxy_speed", f"the {side.kind}", asdict(side))


def ratios(proxy: dict[str, Any], oracle: dict[str, Any]) -> dict[str, float]:
    """Return oracle over proxy in median seconds, and proxy over oracle in memory.

    ``memory_ratio`` is of weights and work, ``peak_ratio`` of all that the two interpreters held.
    """
    taken = {name: side["weights"] + side["work"] for name, side in (("proxy", proxy), ("oracle", oracle))}
    return {
        "times_faster": statistics.median(oracle["seconds"]) / statistics.median(proxy["seconds"]),
        "memory_ratio": taken["proxy"] / taken["oracle"],
        "peak_ratio": proxy["peak"] / oracle["peak"],
    }


def grow(
    sizes: tuple[tuple[int, int, int], ...],
    compare_at: Callable[[tuple[int, int, int]], dict[str, Any]],
    free_mib: Callable[[], float],
    limit_seconds: float,
) -> list[dict[str, Any]]:
    """Compare at growing (frames, height, width) until one is expected to take too much.

    The working memory of a causal VAE grows with the area of a frame, since it decodes a few frames at a time; seconds
    grow with area and frames. Both are foretold from the size before.

    Args:
        sizes: ascending.
        compare_at: size -> result of :func:`compare`.
        free_mib: free memory now.
        limit_seconds: most seconds that a run of the oracle may be expected to take.

    Returns:
        One dict a size; the last has ``left_out``, the reason, where not all were measured.
    """
    results: list[dict[str, Any]] = []
    for size in sizes:
        if results:
            before, oracle = results[-1]["size"], results[-1]["oracle"]
            area = size[1] * size[2] / (before[1] * before[2])
            work = area * oracle["work"] + oracle["weights"] + size[0] * size[1] * size[2] * 12 / 2**20
            seconds = area * size[0] / before[0] * max(oracle["seconds"])
            reasons = {
                f"{work:.0f} MiB expected, {free_mib():.0f} free": work > SPARE * free_mib(),
                f"{seconds:.0f} s a run expected, {limit_seconds:.0f} allowed": seconds > limit_seconds,
            }
            if any(reasons.values()):
                results.append({"size": size, "left_out": next(text for text, holds in reasons.items() if holds)})
                break
        results.append({"size": size, **compare_at(size)})
    return results


def compare_members(batch_sizes: tuple[int, ...], repeats: int, device: str) -> list[dict[str, float]]:
    """Time the default proxy's members one by one and all in one call, each the best of ``repeats`` taken in turn.

    Returns:
        Per batch size: milliseconds forward (``loop``, ``vmap``) and with the gradient of what the members read
        (``loop_gradient``, ``vmap_gradient``), and the largest difference of the standardised scores.
    """
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), (16, 5, 8, 8), max(batch_sizes), device, scale=4)
        proxy = lr.RewardProxy.from_pretrained(Path(name) / "proxy").to(device)
        latents = proxy.normalise(load_file(Path(name) / "latents.safetensors")["latents"].to(device))
    prompts = proxy.read_prompts([PROMPTS[i % len(PROMPTS)] for i in range(len(latents))], len(latents))
    with torch.no_grad():
        latents = proxy.member_inputs(latents, prompts)[0]
    members = list(proxy.members)
    parameters, buffers = stack_module_state(members)
    skeleton = copy.deepcopy(members[0]).to("meta")
    together = torch.vmap(
        lambda weights, extra, x, p: functional_call(skeleton, (weights, extra), (x, p)), in_dims=(0, 0, None, None)
    )
    ways: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
        "loop": lambda x, p: torch.stack([member(x, p) for member in members]),
        "vmap": lambda x, p: together(parameters, buffers, x, p),
    }
    results = []
    for size in batch_sizes:
        x, p = latents[:size], None if prompts is None else prompts[:size]
        with torch.no_grad():
            difference = float((ways["loop"](x, p) - ways["vmap"](x, p)).abs().max())
        best: dict[str, float] = {}
        for _ in range(repeats):
            for name, way in ways.items():
                for label, gradient in ((name, False), (f"{name}_gradient", True)):
                    best[label] = min(best.get(label, float("inf")), _milliseconds(way, x, p, gradient))
        results.append({"batch": size, "difference": difference, **best})
    return results


def _milliseconds(way: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, p: Tensor | None, gradient: bool) -> float:
    x = x.clone().requires_grad_(gradient)
    begun = time.perf_counter()
    with torch.set_grad_enabled(gradient):
        mean = way(x, p).mean()
        if gradient:
            mean.backward()
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return 1000 * (time.perf_counter() - begun)


def read_size(text: str) -> tuple[int, int, int]:
    """Return frames, height and width of a text like 81x480x832.

    Raises:
        ValueError: it is not 4 n + 1 frames of sides that are multiples of 8.
    """
    frames, height, width = (int(number) for number in text.split("x"))
    if frames % 4 != 1 or height % 8 or width % 8 or min(frames, height, width) < 1:
        raise ValueError(f"a size is 4 n + 1 frames and sides that are multiples of 8, e.g. 81x480x832; got {text}")
    return frames, height, width


def main() -> None:
    """Measure the section asked for, or (``--run``) be the interpreter that is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--samples", type=int, default=NUM_SAMPLES, help="latents of the digits world (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs in each interpreter")
    parser.add_argument("--interpreters", type=int, default=1, help="fresh interpreters of each side, in turn")
    parser.add_argument("--metric", default=METRIC, help="the digits world's true metric")
    parser.add_argument("--wan", action="store_true", help="Wan 2.1's VAE instead")
    parser.add_argument("--sizes", type=read_size, nargs="+", default=WAN_SIZES, help="with --wan: of clips, ascending")
    parser.add_argument("--wan-metric", default=WAN_METRIC, help="its true metric")
    parser.add_argument("--limit-seconds", type=float, default=600, help="longest run of Wan's oracle to begin")
    parser.add_argument("--ensemble", action="store_true", help="the members of a proxy instead")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--note", default="", help="what else the machine did; stored with the result")
    add_results(parser, RESULTS / "proxy_speed.json", "file that results are written into")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(Side(**options.run).run()))
        return
    section, name, stored = section_of(options), device_name(options.device), Sections(options.results)
    measured = measure_section(options)
    told = {"result": measured, "device": name, "note": options.note, **provenance()}
    stored.write({section: told})
    print(json.dumps({section: measured}, indent=1))


def section_of(options: argparse.Namespace) -> str:
    """Return the name of the section of a result: what is scored, the device, and what differs from the default."""
    kind = "ensemble" if options.ensemble else "wan" if options.wan else "digits"
    parts = [kind] if options.device == "cpu" else [kind, options.device]
    if kind == "wan" and tuple(options.sizes) != WAN_SIZES:
        parts += ["x".join(map(str, size)) for size in options.sizes]
    if kind == "wan" and options.wan_metric != WAN_METRIC:
        parts.append(options.wan_metric)
    if kind == "digits" and options.samples != NUM_SAMPLES:
        parts.append(f"{options.samples} samples")
    if kind == "digits" and options.metric != METRIC:
        parts.append(options.metric)
    return "_".join(parts)


def measure_section(options: argparse.Namespace) -> Any:  # noqa: ANN401 - JSON-able
    """Return what the command line asks for."""
    shared = {"repeats": options.repeats, "device": options.device, "interpreters": options.interpreters}
    if options.ensemble:
        return compare_members((1, 8, 24, 64, 128), max(options.repeats, 5), options.device)
    if options.wan:

        def compare_at(size: tuple[int, int, int]) -> dict[str, Any]:
            shape = 16, (size[0] - 1) // 4 + 1, size[1] // 8, size[2] // 8
            return compare(shape, num_samples=1, vae="wan", metric=options.wan_metric, **shared)

        return grow(options.sizes, compare_at, lambda: free_mib(options.device), options.limit_seconds)
    vae = f"{DIGITS}/vae"
    return compare((16, 5, 8, 8), num_samples=options.samples, vae=vae, metric=options.metric, **shared)


if __name__ == "__main__":
    main()
