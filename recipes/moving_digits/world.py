"""The world of the digits benchmark: handwritten digits that move, and the English that describes them.

A clip shows one scan of scikit-learn's handwritten digits, tinted and moving in a straight line at constant speed over
black. What is held out (one scan in ten, about a tenth of the attribute combinations, one phrasing per attribute) is
never shown to a VAE, teacher, student, proxy or any metric's classifier.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from latent_rewards.contracts import DataError
from latent_rewards.training.randomness import generator, sample_index

NUM_FRAMES = 17
SIZE = 32
DIGIT_SIZE = 16

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.2, 0.2),
    "green": (0.2, 1.0, 0.2),
    "blue": (0.25, 0.35, 1.0),
    "yellow": (1.0, 0.95, 0.1),
    "purple": (0.85, 0.25, 1.0),
    "white": (1.0, 1.0, 1.0),
}
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS: dict[str, float] = {"slow": 0.4, "fast": 0.9}
"""Pixels per frame."""

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_PHRASES = ("digit {n}", "number {word}", "handwritten {n}", "figure {word}", "number {n}")
COLOUR_PHRASES = ("{c}", "bright {c}", "{c} coloured", "bright {c} coloured")
DIRECTION_PHRASES = ("moving {d}", "drifting {d}", "heading {d}", "moving {d}wards", "drifting {d}wards")
SPEED_PHRASES = {
    "slow": ("slowly", "at a slow pace", "at low speed", "at a slow speed"),
    "fast": ("quickly", "at a fast pace", "at high speed", "at a fast speed"),
}
"""The last phrasing of each attribute is held out: it recombines words that training prompts use."""


@dataclass(frozen=True)
class ClipSpec:
    """What a clip shows: a digit 0-9, and keys of :data:`COLOURS`, :data:`DIRECTIONS` and :data:`SPEEDS`."""

    digit: int
    colour: str
    direction: str
    speed: str

    @property
    def is_heldout(self) -> bool:
        """Whether this combination of attributes is kept out of all training."""
        text = f"{self.digit} {self.colour} {self.direction} {self.speed}"
        return hashlib.sha256(text.encode()).digest()[0] % 10 == 3


@cache
def all_specs(*, heldout: bool) -> tuple[ClipSpec, ...]:
    """Return every held-in (or held-out) combination, in a fixed order."""
    specs = [ClipSpec(n, c, d, s) for n in range(10) for c in COLOURS for d in DIRECTIONS for s in SPEEDS]
    return tuple(spec for spec in specs if spec.is_heldout == heldout)


@cache
def scans(split: str) -> tuple[Tensor, Tensor]:
    """Return the scans ``[N, 8, 8]`` in [0, 1] and their labels ``[N]`` of ``"train"`` or ``"heldout"``.

    Raises:
        ValueError: another split.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout'; got {split!r}")
    data = load_digits()
    chosen = (torch.arange(len(data.target)) % 10 == 3) == (split == "heldout")
    return torch.tensor(data.images, dtype=torch.float32)[chosen] / 16, torch.tensor(data.target)[chosen]


def draw_specs(count: int, *, seed: int, heldout: bool = False) -> list[ClipSpec]:
    """Return ``count`` combinations drawn uniformly from the held-in (or held-out) ones."""
    choices = all_specs(heldout=heldout)
    return [choices[sample_index(seed, f"specs-{heldout}", i, len(choices))] for i in range(count)]


def write_prompt(spec: ClipSpec, *, seed: int, index: int = 0, heldout_phrasing: bool = False) -> str:
    """Describe ``spec`` in English; with ``heldout_phrasing`` the held-out wordings are among those drawn."""
    source = generator(seed, "phrasing", 0, index)

    def choose(phrases: Sequence[str]) -> str:
        count = len(phrases) if heldout_phrasing else len(phrases) - 1
        return phrases[int(torch.randint(count, (), generator=source))]

    colour = choose(COLOUR_PHRASES).format(c=spec.colour)
    digit = choose(DIGIT_PHRASES).format(n=spec.digit, word=NUMBER_WORDS[spec.digit])
    direction = choose(DIRECTION_PHRASES).format(d=spec.direction)
    return f"a {colour} {digit} {direction} {choose(SPEED_PHRASES[spec.speed])}"


@cache
def parse_prompt(prompt: str) -> ClipSpec:
    """Recover what a prompt of this world asks for; punctuation does not matter.

    Raises:
        DataError: an attribute is not mentioned, or with two different values.
    """
    words = [word.removesuffix("wards") for word in re.findall(r"\w+", prompt.lower())]
    names = {**{str(n): n for n in range(10)}, **{word: n for n, word in enumerate(NUMBER_WORDS)}}
    speeds = {"slow": "slow", "slowly": "slow", "low": "slow", "fast": "fast", "quickly": "fast", "high": "fast"}

    def find(kind: str, known: dict) -> object:
        found = list(dict.fromkeys(known[word] for word in words if word in known))
        if not found:
            raise DataError(f"prompt {prompt!r} names no {kind}; name one of {', '.join(known)}")
        if len(found) > 1:
            raise DataError(f"prompt {prompt!r} names more than one {kind} ({', '.join(map(str, found))}); name one")
        return found[0]

    return ClipSpec(
        digit=int(str(find("digit", names))),
        colour=str(find("colour", {c: c for c in COLOURS})),
        direction=str(find("direction", {d: d for d in DIRECTIONS})),
        speed=str(find("speed", speeds)),
    )


def vocabulary() -> list[str]:
    """Return every word a prompt can hold, sorted."""
    phrases = [*DIGIT_PHRASES, *COLOUR_PHRASES, *DIRECTION_PHRASES, *SPEED_PHRASES["slow"], *SPEED_PHRASES["fast"]]
    plain = {word for phrase in phrases for word in phrase.split() if "{" not in word}
    moving = {direction + ending for direction in DIRECTIONS for ending in ("", "wards")}
    return sorted({"a", *plain, *moving, *COLOURS, *NUMBER_WORDS, *(str(n) for n in range(10))})


def render(
    specs: Sequence[ClipSpec],
    *,
    seed: int,
    split: str = "train",
    start_index: int = 0,
    frames: Tensor | None = None,
) -> Tensor:
    """Render clips ``[B, 17, 3, 32, 32]`` float32 in [0, 1]; or of each only some of its ``frames``, int64 ``[B, T]``.

    Scan, position, speed and brightness (each within 10 %) of clip ``i`` depend on ``(seed, start_index + i)`` and
    its spec only. A digit stays inside the canvas throughout.
    """
    images, labels = scans(split)
    glyphs, centres, velocities, tints = [], [], [], []
    for row, spec in enumerate(specs):
        source = generator(seed, f"render-{split}", 0, start_index + row)
        candidates = (labels == spec.digit).nonzero()[:, 0]
        glyphs.append(images[candidates[int(torch.randint(len(candidates), (), generator=source))]])
        draws = torch.rand(4, generator=source)
        speed = SPEEDS[spec.speed] * (0.9 + 0.2 * draws[0])
        velocity = speed * torch.tensor(DIRECTIONS[spec.direction], dtype=torch.float32)
        half_travel = velocity.abs() * (NUM_FRAMES - 1) / 2
        room = (SIZE - DIGIT_SIZE) / 2 - half_travel
        centres.append(SIZE / 2 + room * (2 * draws[1:3] - 1))
        velocities.append(velocity)
        tints.append(torch.tensor(COLOURS[spec.colour]) * (0.9 + 0.1 * draws[3]))
    offsets = torch.arange(NUM_FRAMES) - (NUM_FRAMES - 1) / 2
    paths = torch.stack(centres)[:, None] + offsets[None, :, None] * torch.stack(velocities)[:, None]
    if frames is not None:
        paths = paths.gather(1, frames[:, :, None].expand(-1, -1, 2))
    masks = _place(torch.stack(glyphs), paths)
    return masks[:, :, None] * torch.stack(tints)[:, None, :, None, None]


def _place(glyphs: Tensor, paths: Tensor) -> Tensor:
    """Draw glyphs ``[B, 8, 8]`` centred at ``paths`` ``[B, T, 2]`` (x, y in pixels) on canvases ``[B, T, 32, 32]``."""
    batch, frames = paths.shape[:2]
    pixels = torch.arange(SIZE) + 0.5
    x = (pixels[None, None, :] - paths[..., 0:1]) / (DIGIT_SIZE / 2)
    y = (pixels[None, None, :] - paths[..., 1:2]) / (DIGIT_SIZE / 2)
    grid = torch.stack(torch.broadcast_tensors(x[:, :, None, :], y[:, :, :, None]), dim=-1)
    sources = glyphs[:, None].expand(-1, frames, -1, -1).reshape(batch * frames, 1, 8, 8)
    drawn = functional.grid_sample(
        sources, grid.reshape(batch * frames, SIZE, SIZE, 2), mode="bicubic", align_corners=False
    )
    return drawn.reshape(batch, frames, SIZE, SIZE).clamp(0, 1)


def labels(specs: Sequence[ClipSpec]) -> dict[str, Tensor]:
    """Return class indices ``{attribute: int64 [B]}`` for digit, colour, direction and speed."""
    orders = {"digit": range(10), "colour": [*COLOURS], "direction": [*DIRECTIONS], "speed": [*SPEEDS]}
    return {name: torch.tensor([order.index(getattr(s, name)) for s in specs]) for name, order in orders.items()}
