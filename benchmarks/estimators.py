"""Variance and bias of the gradient estimators at real latent sizes; ``python -m benchmarks.estimators``.

Every estimator takes the gradient of the same proxy's reward at the untuned student, update after update: each with
prompts and noise of its own, the same for all estimators. Backpropagation through all steps is unbiased for the proxy
and is what the others are compared with. Over N updates, with a and b the gradients of an estimator and of that one:

    size     |E a|^2, estimated without bias from products of different updates
    spread   standard deviation of one update's gradient over |E b|
    cosine   of E a with E b;   slope   <E a, E b> / |E b|^2: 1 without bias, 0.5 if half is missed

Results go into ``results/estimators.json``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.provenance import provenance
from benchmarks.result_files import RESULTS, add_results, write_result
from benchmarks.tuning import NUM_STEPS, TuningWorld, open_samples
from latent_rewards.contracts import ConfigError
from latent_rewards.lro import estimators
from latent_rewards.lro.sampling import Batch, SampleSource
from latent_rewards.lro.scoring import ProxyReward
from latent_rewards.rollout import Trajectory, rollout
from recipes.moving_digits.benchmark import TUNED

EXACT = "pathwise"
HEAD_STDS = (0.1, 0.3)
GROUP = 4

Estimator = Callable[["Update"], Tensor]


@dataclass(frozen=True)
class Update:
    """What an update's estimators share.

    Attributes:
        policy: the student.
        trajectory: its samples.
        reward: of latents.
        heads: noise ``[M, B, C, F, H, W]`` of the last step's head.
    """

    policy: Any
    trajectory: Trajectory
    reward: estimators.RewardFunction
    heads: Tensor


def make_estimators(draws: tuple[int, ...]) -> dict[str, Estimator]:
    """Return the estimators by name; ``draws`` are those of the smoothed ones, even."""
    group = {"num_generations": GROUP}
    made: dict[str, Estimator] = {
        EXACT: lambda u: estimators.pathwise(u.policy, u.trajectory, u.reward),
        "pathwise, last step": lambda u: estimators.pathwise(u.policy, u.trajectory, u.reward, last_k=1),
        "hybrid": lambda u: estimators.hybrid(u.policy, u.trajectory, u.reward, **group),
        "score terms, last step dropped": lambda u: estimators.reinforce(
            u.policy, u.trajectory, u.reward, head_std=1.0, head_noise=None, **group
        ),
    }
    for std in HEAD_STDS:
        made[f"reinforce, head {std}"] = _reinforce(std)
        for count in draws:
            made[f"smoothed, head {std}, {count} draws"] = _smoothed(std, count)
    return made


def _reinforce(std: float) -> Estimator:
    return lambda u: estimators.reinforce(
        u.policy, u.trajectory, u.reward, head_std=std, head_noise=u.heads[0], num_generations=GROUP
    )


def _smoothed(std: float, count: int) -> Estimator:
    return lambda u: estimators.smoothed(
        u.policy,
        u.trajectory,
        u.reward,
        head_std=std,
        head_noise=u.heads[: count // 2],
        num_generations=GROUP,
        antithetic=True,
        chain="path",
    )


@dataclass
class Moments:
    """Sums over updates of an estimator's gradients a, and of their products with the exact one's b."""

    count: int = 0
    seconds: float = 0.0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: float = 0.0
    products: float = 0.0

    def add(self, gradient: Tensor, exact: Tensor, seconds: float) -> None:
        """Count one update's gradient, a flat vector, and that of the exact estimator."""
        gradient = gradient.double()
        self.count, self.seconds = self.count + 1, self.seconds + seconds
        self.total = self.total + gradient
        self.squares += float(gradient @ gradient)
        self.products += float(gradient @ exact.double())

    def told(self, exact: Moments) -> dict[str, float | None]:
        """Return spread, cosine, slope and seconds an update; see the module.

        None where the noise leaves no size to compare with, of this estimator or of the exact one.
        """
        pairs = self.count * (self.count - 1)
        size = (float(self.total @ self.total) - self.squares) / pairs
        exact_size = (float(exact.total @ exact.total) - exact.squares) / pairs
        along = (float(self.total @ exact.total) - self.products) / pairs
        variance = self.squares / self.count - size
        known = exact_size > 0
        return {
            "spread": (max(0.0, variance) / exact_size) ** 0.5 if known else None,
            "cosine": along / (size * exact_size) ** 0.5 if known and size > 0 else None,
            "slope": along / exact_size if known else None,
            "seconds": self.seconds / self.count,
        }


def gradient_of(loss: Tensor, policy: Any) -> Tensor:  # noqa: ANN401 - a student
    """Return minus the loss's gradient as a flat vector on the CPU."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    parts = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, parts, strict=True)]
    return -torch.cat([part.flatten() for part in flat]).cpu()


def measure(
    world: TuningWorld, reward: ProxyReward, made: Mapping[str, Estimator], updates: int, draws: int
) -> dict[str, Any]:
    """Return ``{estimator: what Moments tell}`` over updates of 6 prompts with 4 samples each, of at most ``draws``."""
    source = SampleSource(
        world.student, world.prompts(0), step_counts=[NUM_STEPS], seed=0, device=world.device, dtype=torch.float32
    )
    moments = {name: Moments() for name in made}
    for step in tqdm(range(updates), desc="updates"):
        batch: Batch = source.update_batch(step, 6, GROUP)
        with torch.no_grad():
            trajectory = rollout(world.student, batch.condition, batch.noise, NUM_STEPS)
        heads = source.noise("estimators/head", step, batch.sample_ids, draws // 2)

        def score(latents: Tensor, texts: list[str] = batch.prompts) -> Tensor:
            return reward(latents, texts * (len(latents) // len(texts)))[0]

        update = Update(world.student, trajectory, score, heads)
        exact = torch.zeros(())
        for name, estimate in made.items():
            begun = time.perf_counter()
            gradient = gradient_of(estimate(update), world.student)
            seconds = time.perf_counter() - begun
            exact = gradient if name == EXACT else exact
            moments[name].add(gradient, exact, seconds)
    return {name: value.told(moments[EXACT]) for name, value in moments.items()}


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True, help="folder that student.save_pretrained wrote")
    parser.add_argument("--teacher", default="recipes/moving_digits/weights/teacher", help="pipeline folder")
    parser.add_argument("--samples", type=Path, default=Path("runs/proxies/samples"), help="pools of scored samples")
    parser.add_argument("--labels", type=int, default=512, help="true scores the proxy is fitted on")
    parser.add_argument("--updates", type=int, default=48, help="gradients of each estimator")
    parser.add_argument("--draws", type=int, nargs="+", default=[8, 32, 128], help="of the smoothed ones, even")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add_results(parser, RESULTS / "estimators.json", "file that the result is written into")
    options = parser.parse_args()
    check_request(options.updates, options.draws)
    world = TuningWorld(open_samples(options), Path("runs"))
    world.student.eval()
    proxy = world.proxy(0, options.labels)
    reward = ProxyReward(proxy, lambda scores: scores[TUNED], pessimism=0.0, cap=None, micro_batch=128)
    told = measure(world, reward, make_estimators(tuple(options.draws)), options.updates, max(options.draws))
    settings = {"updates": options.updates, "labels": options.labels, "samples_per_update": 6 * GROUP}
    where = {"latent_shape": list(world.student.latent_shape()), "device": world.device_name}
    write_result(options.results, {"estimators": told, **where, **settings, **provenance()})
    print(table(told))


def check_request(updates: int, draws: Sequence[int]) -> None:
    """Refuse before any work what could not be told.

    Raises:
        ConfigError: a single update, whose gradients have no products of different ones; or draws that are no pairs.
    """
    if updates < 2:
        raise ConfigError(f"updates must be at least 2, whose gradients are multiplied; got {updates}")
    if odd := [count for count in draws if count < 2 or count % 2]:
        raise ConfigError(f"draws come in pairs with opposite signs, so give even numbers; got {odd[0]}")


def table(told: Mapping[str, Mapping[str, float | None]]) -> str:
    """Return a Markdown table."""
    lines = ["| estimator | spread | cosine | slope | seconds |", "|---" * 5 + "|"]
    for name, values in told.items():
        numbers = [values[key] for key in ("spread", "cosine", "slope", "seconds")]
        cells = ["–" if number is None else f"{number:.3g}" for number in numbers]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
