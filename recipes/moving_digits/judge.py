"""The judge of the digits benchmark: a small video classifier that only ever evaluates.

It is trained once, on real held-in clips with mild noise and blur, and shipped with its accuracy on held-out scans. It
is never a reward, never stops a training early and never chooses a setting: a number it gives cannot have been tuned
for. Eight windows of three neighbouring frames (one frame and the two differences that follow it) go through a shared
2D network; a convolution over time and an average turn them into the features that the four heads read, and in which
diversity and the Fréchet distance are measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.training.randomness import generator
from recipes.moving_digits.world import COLOURS, DIRECTIONS, NUM_FRAMES, SPEEDS, draw_specs, labels, render

ATTRIBUTES: dict[str, int] = {
    "digit": 10,
    "colour": len(COLOURS),
    "direction": len(DIRECTIONS),
    "speed": len(SPEEDS),
}
"""What the judge reads off a clip, and how many classes each has; class indices are those of ``world.labels``."""

WEIGHTS_DIR = Path(__file__).parent / "weights"
MAX_NOISE = 0.05
MAX_BLUR = 0.8


class Judge(nn.Module):
    """Classifies clips ``[B, 17, 3, 32, 32]`` in [0, 1] by digit, colour, direction and speed.

    Args:
        width: channels of the widest 2D layer.
        feature_dim: size D of :meth:`features`.
    """

    def __init__(self, width: int = 64, feature_dim: int = 64) -> None:
        super().__init__()
        self.width, self.feature_dim = width, feature_dim
        self.frames = nn.Sequential(
            _conv(9, 24, kernel=5, stride=2),
            _conv(24, 48, kernel=3, stride=2),
            _conv(48, width, kernel=3, stride=1),
            _conv(width, width, kernel=3, stride=1),
        )
        self.time = nn.Conv1d(2 * width, 2 * width, kernel_size=3, padding=1)
        self.project = nn.Linear(2 * width, feature_dim)
        self.heads = nn.ModuleDict({name: nn.Linear(feature_dim, count) for name, count in ATTRIBUTES.items()})

    def features(self, videos: Tensor) -> Tensor:
        """Return the penultimate features ``[B, D]``.

        Raises:
            DataError: the clips are not ``[B, 17, 3, H, W]``.
        """
        if videos.ndim != 5 or videos.shape[1:3] != (NUM_FRAMES, 3):
            raise DataError(f"the judge reads clips [B, {NUM_FRAMES}, 3, H, W]; got shape {tuple(videos.shape)}")
        first, second, third = videos[:, 0:-2:2], videos[:, 1:-1:2], videos[:, 2::2]
        windows = torch.cat([first, second - first, third - second], dim=2)
        maps = self.frames(windows.flatten(0, 1)).flatten(2)
        pooled = torch.cat([maps.mean(dim=2), maps.amax(dim=2)], dim=1).unflatten(0, windows.shape[:2])
        over_time = functional.silu(self.time(pooled.transpose(1, 2))).mean(dim=2)
        return self.project(over_time)

    def forward(self, videos: Tensor) -> dict[str, Tensor]:
        """Return logits ``{attribute: [B, classes]}``."""
        return self.classify(self.features(videos))

    def classify(self, features: Tensor) -> dict[str, Tensor]:
        """Return logits ``{attribute: [B, classes]}`` of features ``[B, D]``."""
        active = functional.silu(features)
        return {name: head(active) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, videos: Tensor, *, batch_size: int = 100) -> tuple[Tensor, dict[str, Tensor]]:
        """Return features ``[N, D]`` and predicted classes ``{attribute: int64 [N]}`` of clips, in evaluation mode."""
        was_training = self.training
        self.eval()
        features = torch.cat([self.features(batch.float()) for batch in videos.split(batch_size)])
        self.train(was_training)
        return features, {name: logits.argmax(dim=1) for name, logits in self.classify(features).items()}

    def accuracy(self, videos: Tensor, targets: dict[str, Tensor]) -> dict[str, float]:
        """Return the percentage of clips whose class is ``targets[attribute]`` (int64 ``[N]``), per attribute."""
        predicted = self.read(videos)[1]
        return {name: 100 * (predicted[name] == targets[name]).double().mean().item() for name in ATTRIBUTES}

    @property
    def fingerprint(self) -> str:
        """A hash of the weights: numbers of two judges are not comparable."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, directory: Path | str, report: dict[str, object] | None = None) -> None:
        """Write ``judge.safetensors``, and ``judge.json`` with the sizes, the fingerprint and ``report``."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), directory / "judge.safetensors")
        settings = {"width": self.width, "feature_dim": self.feature_dim, "fingerprint": self.fingerprint}
        (directory / "judge.json").write_text(json.dumps({**settings, **(report or {})}, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path | str = WEIGHTS_DIR) -> Judge:
        """Return the judge stored in ``directory`` (default: the shipped one), frozen and in evaluation mode.

        Raises:
            ConfigError: the files are missing, or the weights are not those that ``judge.json`` describes.
        """
        directory = Path(directory)
        if not (directory / "judge.json").is_file() or not (directory / "judge.safetensors").is_file():
            raise ConfigError(
                f"no judge in {directory}: judge.json and judge.safetensors are needed; "
                "train one with `python -m recipes.moving_digits.judge`"
            )
        settings = json.loads((directory / "judge.json").read_text())
        judge = cls(settings["width"], settings["feature_dim"])
        judge.load_state_dict(load_file(directory / "judge.safetensors"))
        if judge.fingerprint != settings["fingerprint"]:
            raise ConfigError(
                f"judge.safetensors in {directory} has fingerprint {judge.fingerprint}, judge.json describes "
                f"{settings['fingerprint']}; restore both files from the same training"
            )
        return judge.eval().requires_grad_(False)


def degrade(videos: Tensor, source: torch.Generator) -> Tensor:
    """Return clips with mild Gaussian blur (std up to 0.8 px) and noise (std up to 0.05), drawn per clip.

    A codec's reconstructions are a little soft and a little noisy; a judge of them must not be surprised.
    """
    batch, frames = videos.shape[:2]
    strength = torch.rand(batch, 2, generator=source)
    positions = torch.arange(-2, 3)
    blur = (strength[:, 0] * MAX_BLUR).clamp_min(1e-3)
    kernel = torch.softmax(-(positions[None] ** 2) / (2 * blur[:, None] ** 2), dim=1)
    per_channel = kernel.repeat_interleave(frames * 3, dim=0)
    stacked = videos.flatten(0, 2)[None]
    for shape, padding in (((-1, 1, 5, 1), (2, 0)), ((-1, 1, 1, 5), (0, 2))):
        stacked = functional.conv2d(stacked, per_channel.view(shape), padding=padding, groups=stacked.shape[1])
    noise = torch.randn(videos.shape, generator=source) * (strength[:, 1] * MAX_NOISE).view(-1, 1, 1, 1, 1)
    return (stacked.view_as(videos) + noise).clamp(0, 1)


def train_judge(
    seed: int = 0,
    *,
    num_steps: int = 700,
    batch_size: int = 64,
    learning_rate: float = 4e-3,
    width: int = 64,
    feature_dim: int = 64,
    progress: bool = True,
) -> Judge:
    """Train a judge on real held-in clips (training scans, held-in combinations), mildly degraded.

    AdamW with a one-cycle learning rate; every batch is rendered anew. One run is a function of ``seed``.

    Raises:
        ConfigError: fewer than 10 steps, too short for a cycle.
    """
    if num_steps < 10:
        raise ConfigError(f"num_steps must be at least 10, or the learning rate has no cycle; got {num_steps}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(width, feature_dim).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps, pct_start=0.2)
    bar = tqdm(range(num_steps), desc="judge", disable=not progress, mininterval=5)
    for step in bar:
        start = step * batch_size
        specs = draw_specs(batch_size, seed=seed + 7919 * (step + 1))
        clips = render(specs, seed=seed, split="train", start_index=start)
        logits = judge(degrade(clips, generator(seed, "judge-degrade", step)))
        targets = labels(specs)
        losses = [functional.cross_entropy(logits[k], targets[k], label_smoothing=0.05) for k in ATTRIBUTES]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return judge.eval().requires_grad_(False)


def heldout_accuracy(judge: Judge, *, num_clips: int = 2000, seed: int = 1) -> dict[str, dict[str, float]]:
    """Return accuracies in percent on clips of held-out scans: held-in combinations, held-out ones, and degraded."""
    results: dict[str, dict[str, float]] = {}
    for name, heldout in (("heldin_combinations", False), ("heldout_combinations", True)):
        specs = draw_specs(num_clips, seed=seed, heldout=heldout)
        clips = render(specs, seed=seed, split="heldout")
        results[name] = judge.accuracy(clips, labels(specs))
        if not heldout:
            results["heldin_combinations_degraded"] = judge.accuracy(
                degrade(clips, generator(seed, "judge-check", 0)), labels(specs)
            )
    return results


def _conv(inputs: int, outputs: int, *, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train a judge and store it with its held-out accuracy: ``python -m recipes.moving_digits.judge``."""
    parser = argparse.ArgumentParser(prog="python -m recipes.moving_digits.judge", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-steps", type=int, default=700)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--num-clips", type=int, default=2000, help="held-out clips per accuracy")
    parser.add_argument("--output-dir", type=Path, default=WEIGHTS_DIR)
    options = parser.parse_args(argv)
    judge = train_judge(
        options.seed,
        num_steps=options.num_steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
    )
    accuracy = heldout_accuracy(judge, num_clips=options.num_clips)
    rounded = {kind: {name: round(value, 2) for name, value in values.items()} for kind, values in accuracy.items()}
    settings = {k: v for k, v in vars(options).items() if k != "output_dir"}
    judge.save(options.output_dir, {"command": parser.prog, "settings": settings, "heldout_accuracy": rounded})
    for name, values in accuracy.items():
        print(f"{name}: " + ", ".join(f"{k} {v:.2f} %" for k, v in values.items()))


if __name__ == "__main__":
    main()
